"""Makes DALI's random draws a function of seed, epoch and place, independent of what a pipeline did before.

DALI's random operators have an undocumented argument, `_random_state`, that sets the state of their Philox generator for a
batch; DALI's dynamic mode uses it. The sample at position `i` of a batch draws from the subsequence `i * 65537` after that
state (`GetSampleRNG` in DALI's `operators/random/rng_base.h`). If a batch starts `place * 65537` subsequences in, each sample
gets the draws of its place, for any batch size and rank, and no state has to be saved.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, do_not_convert

from pipelines.shards.order import random_key

SUBSEQUENCES_A_SAMPLE = 65_537  # `kSkipaheadPerSample` of rng_base.h
# The operators that a graph may draw with; `Draws.check` finds others.
DRAWING = ((fn.random, "uniform"), (fn.random, "coin_flip"), (fn.decoders, "image_random_crop"))


class Draws:
    """The random operators of a graph, by the names of the inputs that set the states of their generators."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def state(self) -> DataNode:
        """Returns the input for one more operator."""
        self.names.append(f"random_state_{len(self.names)}")
        return fn.external_source(name=self.names[-1], dtype=types.UINT32, ndim=1)

    def check(self, pipeline: Pipeline) -> None:
        """Checks that no operator of the graph draws by itself, since its draws could not be reproduced.

        Raises:
            ValueError: An augmentation uses such an operator.
        """
        drawing = [operator for operator in pipeline._ops if operator._op.schema.HasRandomStateArg()]
        if len(drawing) > len(self.names):
            names = ", ".join(sorted({operator._op.schema.Name().replace("__", ".") for operator in drawing}))
            allowed = ", ".join(name for _, name in DRAWING)
            raise ValueError(f"the augmentations use the random operators {names}, of which only {allowed} are supported")

    def feed(self, pipeline: Pipeline, num_samples: int, seed: int, epoch: int, place: int) -> None:
        """Feeds the states for a batch whose first sample has this place in the order of the epoch."""
        for number, name in enumerate(self.names):
            # A 64-bit key; then the counter, 64 bits within a subsequence and 64 bits for its number; then padding.
            words = np.zeros((1, 3), np.uint64)
            words[0, 0], words[0, 2] = random_key(seed, epoch, number)[0], place * SUBSEQUENCES_A_SAMPLE % 2**64
            state = np.concatenate([words.view(np.uint32), np.zeros((1, 1), np.uint32)], axis=1)
            pipeline.feed_input(name, np.repeat(state, num_samples, axis=0))


@contextlib.contextmanager
def draws_from_outside() -> Iterator[Draws]:
    """Context in which the random operators of a new graph get generators whose state is fed as an input.

    DALI's automatic augmentations call `fn.random.uniform` themselves without such an argument, so the context replaces the
    functions. Only one thread may be inside.
    """
    draws = Draws()
    originals = [getattr(module, name) for module, name in DRAWING]
    for (module, name), original in zip(DRAWING, originals, strict=True):
        setattr(module, name, _fed(original, draws))
    try:
        yield draws
    finally:
        for (module, name), original in zip(DRAWING, originals, strict=True):
            setattr(module, name, original)


def _fed(operator: Callable[..., DataNode], draws: Draws) -> Callable[..., DataNode]:
    @do_not_convert  # DALI translates the Python of a graph with conditionals
    def with_state(*inputs: Any, **arguments: Any) -> DataNode:
        return operator(*inputs, **arguments, _random_state=draws.state())

    return with_state
