"""Runs the DALI graph on the batches it is fed. On a CPU, each thread runs a graph of its own on a part of each batch."""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from pipelines.dali.cpu_finish import BatchMemory, Finish, resized
from pipelines.dali.cpu_resize import CenterCropResize, Resize, WholeResize
from pipelines.dali.graph import Stage, has_conditionals
from pipelines.dali.operators import Preprocessing
from pipelines.dali.part import Graph, GraphThread, Work

if TYPE_CHECKING:
    from pipelines.config import DataConfig
    from pipelines.spec import LoaderSpec

# Parts of a batch on a CPU. An image takes the GIL for 30 microseconds, so the threads of more parts would wait for it.
MOST_PARTS = 16
MOST_TRANSLATED_PARTS = 4  # translating the graph of RandAugment takes a second for each part


class ImagePipeline:
    """The pipeline of a loader. It is fed batches of encoded images, and returns images of one size in the same order.

    DALI runs the CPU operators of a graph one after the other, and after each, threads wait for the slowest. So on a CPU a
    batch is divided into parts, and each part has a graph with one thread, and a thread that finishes the graph's images. Each
    goes on with its part of the next batch as soon as it can.

    Args:
        config: Names the crop and the augmentations.
        spec: Describes the images.
        until: Last stage of the graph, for measurements.
        preprocessing: Says how to resize for validation, and how to normalize. By default as `Preprocessing` does.
    """

    def __init__(
        self,
        config: "DataConfig",
        spec: "LoaderSpec",
        until: Stage = "normalize",
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.spec, self._until = spec, until
        self.queue_depth: int = spec.prefetch(config)  # batches that the pipeline works on at a time
        is_cpu, num_threads = spec.device.type == "cpu", spec.threads(config)
        most = MOST_TRANSLATED_PARTS if has_conditionals(config, spec) else MOST_PARTS
        num_parts = min(num_threads, spec.batch_size, most) if is_cpu else 1
        self._part_size = -(-spec.batch_size // num_parts)
        options = {"batch_size": self._part_size, "num_threads": -(-num_threads // num_parts)}
        options["prefetch_queue_depth"] = self.queue_depth
        preprocessing = preprocessing or Preprocessing()
        resize = _cpu_resize(spec, preprocessing) if is_cpu else None
        graphs = [Graph(config, spec, preprocessing, resize, until, **options) for _ in range(num_parts)]
        self._parts: Sequence[Graph | GraphThread] = graphs
        if resize is not None:
            finish = _finish(resize, preprocessing, until)
            self._parts = [GraphThread(graph, finish) for graph in graphs]
        shape = (spec.batch_size, spec.image_size, spec.image_size, 3)
        # One more batch is in use, and its successor has been taken.
        self._memory = BatchMemory(shape, self.queue_depth + 2) if is_cpu and until == "normalize" else None
        self._fed = deque[tuple[torch.Tensor | None, int]]()  # of each batch its memory and its number of parts

    @property
    def num_pending(self) -> int:
        """Batches that were fed, and whose images were not taken yet."""
        return len(self._fed)

    def feed(self, images: Sequence[NDArray[np.uint8]], epoch: int, place: int) -> None:
        """Starts work on a batch.

        Args:
            images: Encoded images, uint8 `(size,)`. Nobody may write to them until the batch is done.
            epoch: Epoch; with `place` it determines the random draws.
            place: Place of the first image in the order of the epoch; the others follow.
        """
        batch = self._memory.take(len(images)) if self._memory is not None else None
        starts = range(0, len(images), self._part_size)
        for part, start in zip(self._parts, starts, strict=False):
            own = slice(start, start + self._part_size)
            part.feed(Work(images[own], epoch, place + start, None if batch is None else batch[own]))
        self._fed.append((batch, len(starts)))

    def images(self, stream: torch.cuda.Stream | None = None) -> Any:
        """Returns the images of the oldest batch fed: a tensor `(N, H, W, 3)`, or what an earlier stage gives for each image.

        On a GPU, the tensor is DALI's buffer.

        Args:
            stream: Stream that waits for images on a GPU. Without it the host waits.

        Raises:
            RuntimeError: DALI cannot read an image. The pipeline cannot be used afterwards.
        """
        batch, num_parts = self._fed[0]
        outputs = [part.outputs(stream) for part in self._parts[:num_parts]]
        self._fed.popleft()
        if batch is not None:
            return batch
        if self.spec.device.type == "cpu":
            return [*itertools.chain(*outputs)]
        [[images]] = outputs
        return from_dlpack(images.as_tensor()) if self._until == "normalize" else [*images]

    def close(self) -> None:
        """Ends the work under way. Batches that were taken stay valid."""
        for part in self._parts:
            part.close()
        self._fed.clear()


def _cpu_resize(spec: "LoaderSpec", preprocessing: Preprocessing) -> Resize:
    size = spec.image_size
    if spec.is_train:
        return WholeResize(size=size)
    return CenterCropResize(size=size, resize_shorter=preprocessing.shorter(size))


def _finish(resize: Resize, preprocessing: Preprocessing, until: Stage) -> Callable[[Sequence[Any], Work], Any]:
    """Returns what a CPU does with the outputs of a graph that ends with a stage."""
    if until == "normalize":
        finish = Finish(resize, preprocessing.mean, preprocessing.std)
        return lambda outputs, work: finish(outputs, work.target)  # type: ignore[arg-type]
    if until == "resize":
        return lambda outputs, _: [*resized(resize, outputs)]
    return lambda outputs, _: outputs[0]


def describe(error: RuntimeError) -> str:
    """Returns DALI's error as one line, without the twenty lines of graph and C++ around it."""
    _, _, what = str(error).partition("encountered:")
    lines = [line.strip() for line in what.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("C++ context", "Current pipeline", "Assert on"))]
    return f"the data pipeline stopped: {' '.join(kept) or error}"
