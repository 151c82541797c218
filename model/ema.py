"""Exponential moving average of a model's weights."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class EMA(AveragedModel):
    """Averages a model's parameters and buffers over the steps: `average = decay * average + (1 - decay) * newest`.

    After n updates, the decay is at most `(1 + n) / (10 + n)`, as in TensorFlow's `ExponentialMovingAverage`, which soon
    forgets the first weights. Batch normalization statistics are averaged too; its counters are copied.

    Call it like the model. Create it after the model has moved to its device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        assert 0 <= decay < 1, decay
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self.requires_grad_(False)
        self._updates = 0  # the value of `n_averaged`, without reading a tensor
        self._tensors: tuple[nn.Module, _Pairs, _Pairs] | None = None
        self.register_load_state_dict_post_hook(_take_count)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Adds the model's current weights to the average.

        Unlike `AveragedModel`, this keeps the counter on the CPU. Each copy to a GPU would make the host wait.

        Args:
            model: The same model each time, with the same tensors. They are looked up once, because the lookup takes longest.
        """
        if self._tensors is None or self._tensors[0] is not model:
            self._tensors = model, *_pair_tensors(self.module, model)
        _, floats, counters = self._tensors
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates)) if self._updates else 0.0
        torch._foreach_lerp_(floats.averaged, floats.newest, 1 - decay)
        if counters.averaged:
            torch._foreach_copy_(*counters)
        self._updates += 1
        self.n_averaged += 1


class _Pairs(NamedTuple):
    averaged: list[Tensor]
    newest: list[Tensor]


def _pair_tensors(average: nn.Module, model: nn.Module) -> tuple[_Pairs, _Pairs]:
    """Pairs the parameters and buffers of both: those to average, and the counters."""
    floats, counters = _Pairs([], []), _Pairs([], [])
    averaged, newest = ([*side.parameters(), *side.buffers()] for side in (average, model))
    for pair in zip(averaged, newest, strict=True):
        for side, tensor in zip(floats if pair[0].is_floating_point() else counters, pair, strict=True):
            side.append(tensor)
    return floats, counters


def _take_count(ema: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(ema, EMA)
    ema._updates = int(ema.n_averaged)


def averaged_weights(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the averaged model's state dict, given the state dict of its `EMA`."""
    prefix = "module."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
