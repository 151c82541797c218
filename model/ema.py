"""Exponential moving average of a model's weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class EMA(AveragedModel):
    """The average of a model's parameters and buffers over the steps: `average = decay * average + (1 - decay) * newest`.

    Early on the decay is `(1 + n) / (10 + n)` after n updates where that is less, as in TensorFlow's
    `ExponentialMovingAverage`, so that the first, bad weights are soon forgotten. Batch normalization's statistics are averaged
    along with the weights; its counters are copied.

    Call it like the model. Make it after the model has been moved to its device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        assert 0 <= decay < 1, decay
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self.requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the model's present weights into the average.

        Does what `AveragedModel` does, without its copies of the counter to the device, each of which would make the host wait
        for a GPU: the counter stays on the CPU.
        """
        updates = int(self.n_averaged)
        decay = min(self.decay, (1 + updates) / (10 + updates)) if updates else 0.0
        averaged = [*self.module.parameters(), *self.module.buffers()]
        newest = [*model.parameters(), *model.buffers()]
        floats = [i for i, tensor in enumerate(averaged) if tensor.is_floating_point()]
        torch._foreach_lerp_([averaged[i] for i in floats], [newest[i] for i in floats], 1 - decay)
        if counters := [i for i, tensor in enumerate(averaged) if not tensor.is_floating_point()]:
            torch._foreach_copy_([averaged[i] for i in counters], [newest[i] for i in counters])
        self.n_averaged += 1
