"""Exponential moving average of a model's weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel


class EMA(AveragedModel):
    """The average of a model's parameters and buffers over the steps: `average = decay * average + (1 - decay) * newest`.

    Early on the decay is `(1 + n) / (10 + n)` after n updates where that is less, as in TensorFlow's
    `ExponentialMovingAverage`, so that the first, bad weights are soon forgotten. Batch normalization's statistics are averaged
    along with the weights; its counters are copied.

    Call it like the model. Make it after the model has been moved to its device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"--model.ema-decay {decay}: a number from 0 to below 1 is needed")
        super().__init__(model, multi_avg_fn=self._average, use_buffers=True)
        self.decay = decay
        self.requires_grad_(False)

    @torch.no_grad()
    def _average(self, averaged: PARAM_LIST, newest: PARAM_LIST, _: Tensor | int) -> None:
        if not averaged[0].is_floating_point():
            torch._foreach_copy_(averaged, newest)
            return
        updates = int(self.n_averaged)  # this buffer stays on the CPU, so reading it waits for no device
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(averaged, newest, 1 - decay)
