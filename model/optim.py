"""The optimizer and the learning rate over the steps."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LinearLR, LRScheduler, SequentialLR


@dataclass(frozen=True)
class OptimConfig:
    """Stochastic gradient descent, and its learning rate: a linear warm-up, then cosines that restart."""

    lr: float = 0.05
    """Learning rate at the top of each cosine, for steps of --optim.reference-batch-size images."""
    reference_batch_size: int = 64
    """Learning rates are for steps of so many images, and grow in proportion with them (arXiv 1706.02677); 0: they do not."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-5
    """L2 penalty on the weights of convolutions and linear layers; biases and normalization have none."""
    warmup_epochs: float = 1.0
    """Epochs over which the learning rate rises linearly, but no more than half of the run; 0 for none."""
    cycle_epochs: int | None = None
    """Epochs from the top of the first cosine to its restart. Without it one cosine fills the run after the warm-up."""
    cycle_mult: int = 1
    """How many times longer each cosine is than the one before."""
    min_lr: float = 0.0
    """Learning rate at the bottom of each cosine, likewise."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--optim.lr {self.lr}: a positive number is needed")
        if self.reference_batch_size < 0:
            raise ValueError(f"--optim.reference-batch-size {self.reference_batch_size}: a number from 0 on is needed")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--optim.momentum {self.momentum}: a number from 0 to below 1 is needed")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"--optim.min-lr {self.min_lr}: a number from 0 to --optim.lr {self.lr} is needed")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--optim.weight-decay {self.weight_decay}: a number from 0 on is needed")
        if not self.warmup_epochs >= 0:
            raise ValueError(f"--optim.warmup-epochs {self.warmup_epochs}: a number from 0 on is needed")
        if self.cycle_epochs is not None and self.cycle_epochs < 1:
            raise ValueError(f"--optim.cycle-epochs {self.cycle_epochs}: at least 1 is needed")
        if self.cycle_mult < 1:
            raise ValueError(f"--optim.cycle-mult {self.cycle_mult}: at least 1 is needed")

    def scaled(self, lr: float, global_batch_size: int) -> float:
        """A learning rate for steps of so many images: in proportion to them."""
        return lr * global_batch_size / self.reference_batch_size if self.reference_batch_size else lr


def build_optimizer(model: nn.Module, config: OptimConfig, global_batch_size: int) -> SGD:
    """SGD with Nesterov momentum for steps of `global_batch_size` images; weight decay on matrices and kernels only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    lr = config.scaled(config.lr, global_batch_size)
    optimizer = SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)
    if config.momentum:
        # Where gradient scaling skips the first step for infinite gradients, the fused kernel leaves the buffers that it made
        # uninitialized. A buffer of zeros gives the same first step.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_scheduler(optimizer: Optimizer, config: OptimConfig, *, epochs: int, steps_per_epoch: int) -> LRScheduler:
    """The learning rate of each step; call `step()` after each of the optimizer's."""
    total = epochs * steps_per_epoch
    warmup = round(min(config.warmup_epochs, epochs / 2) * steps_per_epoch)
    first_cycle = config.cycle_epochs * steps_per_epoch if config.cycle_epochs else total - warmup
    lowest = config.min_lr / config.lr * optimizer.param_groups[0]["lr"]  # scaled to the batch like the highest
    cosine = CosineAnnealingWarmRestarts(optimizer, first_cycle, config.cycle_mult, lowest)
    if not warmup:
        return cosine
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, cosine], milestones=[warmup])
