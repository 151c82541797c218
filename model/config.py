"""The settings of the network and its training step. This module imports no torch, so `--help` answers at once."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """The network, its loss, and the average of its weights."""

    aux_logits: bool = True
    """Train with the two auxiliary heads. They are not used after training."""
    aux_weight: float = 0.3
    """Weight of each auxiliary head's loss."""
    dropout: float = 0.2
    """Dropout probability before the last layer."""
    label_smoothing: float = 0.1
    """Share of the target probability that is spread over all classes."""
    ema_decay: float = 0.999
    """Decay of the averaged weights per step. The average covers about 1 / (1 - decay) steps."""
    transform_input: bool | None = None
    """Renormalize the input as torchvision's published weights expect it. By default, only if --init-from needs it."""

    def __post_init__(self) -> None:
        for name in ("dropout", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"--model.{name.replace('_', '-')} {value}: a number from 0 to below 1 is needed")
        if not 0 <= self.aux_weight < math.inf:
            raise ValueError(f"--model.aux-weight {self.aux_weight}: a number of at least 0 is needed")


@dataclass(frozen=True)
class OptimConfig:
    """SGD, and its learning rate: a linear warm-up, then cosine decay with warm restarts."""

    lr: float = 0.05
    """Peak learning rate, for steps of --optim.reference-batch-size images."""
    reference_batch_size: int = 64
    """Images per step that --optim.lr is for; other steps scale it linearly (arXiv 1706.02677). 0: no scaling."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-5
    """L2 penalty on the weights of convolutions and linear layers. Biases and normalization have none."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up, at most half of the run. 0: none."""
    cycle_epochs: int | None = None
    """Epochs of each cosine cycle. By default, one cosine fills the run after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of each cosine cycle, scaled like --optim.lr."""

    def __post_init__(self) -> None:
        checks = (
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("reference_batch_size", self.reference_batch_size >= 0, "a number of at least 0"),
            ("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1"),
            ("min_lr", 0 <= self.min_lr <= self.lr, f"a number from 0 to --optim.lr {self.lr}"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0"),
            ("warmup_epochs", self.warmup_epochs >= 0, "a number of at least 0"),
        )
        for name, is_right, needed in checks:
            if not is_right:
                raise ValueError(f"--optim.{name.replace('_', '-')} {getattr(self, name)}: {needed} is needed")
        at_least(self, "optim.", cycle_epochs=1)

    def scaled(self, lr: float, global_batch_size: int) -> float:
        """Scales a learning rate in proportion to the images per step."""
        return lr * global_batch_size / self.reference_batch_size if self.reference_batch_size else lr


@dataclass(frozen=True)
class StepConfig:
    """The settings of a training step. `Config` in tools/run/config.py adds the settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: int = 30
    """Passes over the training shards."""
    batch_size: int = 0
    """Images per batch and device. 0: 64 on a CPU; 32 to 256 per GPU, by memory, number of GPUs, and training samples."""
    accumulate_steps: int = 1
    """Batches whose gradients are accumulated for one optimizer step."""
    image_size: int = 224
    """Side of the training images, in pixels; at least 32."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Numeric precision. auto: bf16 on GPUs that support it, otherwise fp16 with loss scaling; fp32 on a CPU."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """Mode of torch.compile for the training step. reduce-overhead uses CUDA graphs."""
    deterministic: bool = False
    """Use deterministic kernels only; an operation without one ends the run. By default, cuDNN picks the fastest kernels."""
    sync_batchnorm: bool = False
    """Share batch normalization statistics among all GPUs. This helps small batches, but the GPUs wait for each other."""
    grad_clip: float | None = None
    """Clip gradients to this norm."""
    seed: int = 0
    """Seed of the initial weights, the sample order, augmentation, and dropout."""

    def global_batch_size(self, world_size: int) -> int:
        """Returns the images per optimizer step, over all ranks."""
        return self.batch_size * self.accumulate_steps * world_size

    def __post_init__(self) -> None:
        at_least(self, epochs=1, accumulate_steps=1, image_size=32, seed=0)
        # Batch normalization needs two values per channel, and an image of 32 pixels has one in the last feature map.
        if self.batch_size != 0 and self.batch_size < 2:
            raise ValueError(f"--batch-size {self.batch_size}: at least 2 is needed, or 0 to have it chosen")
        if self.compile in ("reduce-overhead", "max-autotune") and self.accumulate_steps > 1:
            raise ValueError(
                f"--compile {self.compile}: its CUDA graphs reuse the memory of gradients; "
                "use --compile default with --accumulate-steps"
            )
        if self.compile != "no" and self.sync_batchnorm:
            raise ValueError(
                "--sync-batchnorm cannot be combined with --compile: a GPU whose batch has bad samples runs uncompiled, and "
                "GPUs would wait for each other in different layers"
            )
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"--grad-clip {self.grad_clip}: a positive number is needed")


def at_least(config: Any, part: str = "", **minimums: int) -> None:
    """Raises a `ValueError` if a setting that is given is below its minimum."""
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{part}{name.replace('_', '-')} {value}: at least {minimum} is needed")
