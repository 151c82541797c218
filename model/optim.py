"""The optimizer and the learning rate schedule."""

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LinearLR, LRScheduler, SequentialLR

from model.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig, global_batch_size: int) -> SGD:
    """Builds SGD with Nesterov momentum. Weight decay applies to matrices and kernels only, not to biases and scales."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    lr = config.scaled(config.peak_lr, global_batch_size)
    optimizer = SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)
    if config.momentum:
        # If gradient scaling skips the first step, the fused kernel leaves the buffers that it creates uninitialized.
        # A buffer of zeros gives the same first step.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_scheduler(optimizer: Optimizer, config: OptimConfig, *, epochs: int, steps_per_epoch: int) -> LRScheduler:
    """Builds the learning rate schedule. Call its `step()` after each step of the optimizer."""
    total = epochs * steps_per_epoch
    warmup = config.warmup_steps(epochs=epochs, steps_per_epoch=steps_per_epoch)
    first_cycle = config.cycle_epochs * steps_per_epoch if config.cycle_epochs else total - warmup
    lowest = config.min_lr / config.peak_lr * optimizer.param_groups[0]["lr"]  # scaled to the batch like the peak
    cosine = CosineAnnealingWarmRestarts(optimizer, first_cycle, eta_min=lowest)
    if not warmup:
        return cosine
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, cosine], milestones=[warmup])
