"""The settings of the network and its training step. This module imports no torch, so `--help` answers at once."""

import math
import shlex
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from typing_extensions import Self

# The defaults of settings that `StepConfig.choose` adapts to the number of steps.
LR, WARMUP_EPOCHS, NORM_MOMENTUM = 0.05, 1.0, 0.1
MOST_EPOCHS, MAX_IMAGE_SIZE = 1_000_000, 4096  # a judgment; more is a slip, and would take hours or all memory to find out
SHORT_EPOCH = 100  # steps; in shorter epochs, a network changes much between two validations


@dataclass(frozen=True)
class Arch:
    """The name of a network, as --model.arch and --model.options give it and a checkpoint keeps it.

    Attributes:
        factory: PACKAGE.MODULE:FACTORY or FILE.py:FACTORY; "" for GoogLeNet.
        options: Its arguments besides `num_classes`, each as NAME=VALUE.
    """

    factory: str = ""
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(filter(None, (self.factory or "GoogLeNet", *self.options)))

    def flags(self, flag: str) -> str:
        """Returns the flags that name this network, given the name of the first: --arch or --model.arch."""
        options = f" {flag.replace('arch', 'options')} {shlex.join(self.options)}" if self.options else ""
        return f"{flag} {shlex.quote(self.factory)}{options}"


@dataclass(frozen=True)
class ModelConfig:
    """The network, its loss, and the average of its weights."""

    arch: str = ""
    """Network, as PACKAGE.MODULE:FACTORY or FILE.py:FACTORY. The factory is called with num_classes. By default, GoogLeNet."""
    options: tuple[str, ...] = ()
    """Other arguments for the factory of --model.arch, each as NAME=VALUE."""
    aux_logits: bool = True
    """Train GoogLeNet with its two auxiliary heads. They are not used after training."""
    aux_weight: float = 0.3
    """Weight of each auxiliary head's loss."""
    dropout: float = 0.2
    """Dropout probability before the last layer of GoogLeNet."""
    label_smoothing: float = 0.1
    """Share of the target probability that is spread over all classes."""
    class_weights: str = ""
    """Weights of the classes in the loss: balanced (rarer classes weigh more), or a file with a weight for each class."""
    ema_decay: float = 0.999
    """Decay of the averaged weights per step. The average covers about 1 / (1 - decay) steps."""
    norm_momentum: float | None = None
    """Weight of the newest batch in batch normalization's statistics. By default 0.1 (more in short epochs) or a factory's."""
    transform_input: bool | None = None
    """Renormalize the input as torchvision's GoogLeNet weights expect it. By default, only if --init-from needs it."""

    def __post_init__(self) -> None:
        check_arch("model.", self.arch, self.options)
        if self.arch and self.transform_input:
            raise ValueError("--model.transform-input is for GoogLeNet, and --model.arch names another network")
        for name in ("dropout", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"--model.{name.replace('_', '-')} {value}: a number from 0 to below 1 is needed")
        if not 0 <= self.aux_weight < math.inf:
            raise ValueError(f"--model.aux-weight {self.aux_weight}: a number of at least 0 is needed")
        if self.norm_momentum is not None and not 0 < self.norm_momentum <= 1:
            raise ValueError(f"--model.norm-momentum {self.norm_momentum}: a number above 0, at most 1, is needed")

    @property
    def named(self) -> Arch:
        """The name of the network."""
        return Arch(self.arch, self.options)

    def choose(self, steps_per_epoch: int) -> "ModelConfig":
        """Returns the settings with a momentum of the running statistics.

        The layers of another network may have their own, so `build_network` decides there.
        """
        if self.norm_momentum is not None or self.arch:
            return self
        return replace(self, norm_momentum=choose_norm_momentum(steps_per_epoch))


@dataclass(frozen=True)
class OptimConfig:
    """SGD, and its learning rate: a linear warm-up, then cosine decay with warm restarts."""

    lr: float | None = None
    """Peak learning rate, for steps of --optim.reference-batch-size images. By default 0.05; less in runs under 300 steps."""
    reference_batch_size: int = 64
    """Images per step that --optim.lr is for; other steps scale it linearly (arXiv 1706.02677). 0: no scaling."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-5
    """L2 penalty on the weights of convolutions and linear layers. Biases and normalization have none."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up, at most half of the run. 0: none. By default 1, or as many as make 100 steps."""
    cycle_epochs: int | None = None
    """Epochs of each cosine cycle. By default, one cosine fills the run after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of each cosine cycle, scaled like --optim.lr."""

    def __post_init__(self) -> None:
        checks = (
            ("lr", 0 < self.peak_lr < math.inf, "a positive number"),
            ("reference_batch_size", self.reference_batch_size >= 0, "a number of at least 0"),
            ("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1"),
            ("min_lr", 0 <= self.min_lr <= self.peak_lr, f"a number from 0 to --optim.lr {self.peak_lr:g}"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0"),
            ("warmup_epochs", self.warmup_epochs is None or self.warmup_epochs >= 0, "a number of at least 0"),
        )
        for name, is_right, needed in checks:
            if not is_right:
                raise ValueError(f"--optim.{name.replace('_', '-')} {getattr(self, name)}: {needed} is needed")
        at_least(self, "optim.", cycle_epochs=1)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, before it is scaled to the batch."""
        return LR if self.lr is None else self.lr

    def choose(self, *, epochs: int, steps_per_epoch: int) -> "OptimConfig":
        """Returns the settings with a warm-up and a peak learning rate.

        The warm-up takes at least `SHORT_EPOCH` steps, as a warm-up protects the first steps (arXiv 1706.02677), however many
        epochs these are. It is at most half of the run. A run that is too short for it has a lower peak.
        """
        warmup, lr = self.warmup_epochs, self.lr
        if warmup is None:
            warmup = max(WARMUP_EPOCHS, round(SHORT_EPOCH / steps_per_epoch, 3))
        if lr is None:
            lr = max(self.min_lr, min(LR, round(LR * epochs * steps_per_epoch / 3 / SHORT_EPOCH, 6)))
        return replace(self, warmup_epochs=warmup, lr=lr)

    def warmup_steps(self, *, epochs: int, steps_per_epoch: int) -> int:
        """Returns the steps of the warm-up."""
        warmup = WARMUP_EPOCHS if self.warmup_epochs is None else self.warmup_epochs
        return round(min(warmup, epochs / 2) * steps_per_epoch)

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
    """Images per batch and device. 0: 16 to 64 on a CPU, 16 to 256 per GPU, by memory, number of GPUs, and training samples."""
    accumulate_steps: int = 1
    """Batches whose gradients are accumulated for one optimizer step."""
    image_size: int = 224
    """Side of the training images, in pixels; at least 32."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Numeric precision. auto: bf16 on GPUs that support it, otherwise fp16 with loss scaling; on a CPU bf16 if much faster."""
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

    def choose(self, steps_per_epoch: int) -> "Self":
        """Returns the settings with those chosen that are left open and depend on the number of steps."""
        optim = self.optim.choose(epochs=self.epochs, steps_per_epoch=steps_per_epoch)
        return replace(self, model=self.model.choose(steps_per_epoch), optim=optim)

    def global_batch_size(self, world_size: int) -> int:
        """Returns the images per optimizer step, over all ranks."""
        return self.batch_size * self.accumulate_steps * world_size

    def __post_init__(self) -> None:
        at_least(self, epochs=1, accumulate_steps=1, image_size=32, seed=0)
        at_most("--epochs", self.epochs, MOST_EPOCHS)
        at_most("--image-size", self.image_size, MAX_IMAGE_SIZE)
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


def choose_norm_momentum(steps_per_epoch: int) -> float:
    """Returns a momentum of the running statistics, which cover about 1 / momentum steps.

    torch's 0.1 covers ten steps. At the beginning of a run, the weights change so much in ten steps that a network that fits
    its batches may have a loss in the hundreds with these statistics. Large data sets are not scored so early. In epochs of
    fewer than `SHORT_EPOCH` steps, the statistics cover a tenth of an epoch, and at least two steps.
    """
    return min(0.5, NORM_MOMENTUM * max(1, SHORT_EPOCH / steps_per_epoch))


def check_arch(part: str, arch: str, options: tuple[str, ...]) -> None:
    """Raises a `ValueError` if the name of a factory or one of its arguments is malformed. `part` begins the flags' names."""
    place, _, factory = arch.rpartition(":")
    if arch and not (place and factory.isidentifier()):
        raise ValueError(f"--{part}arch {arch}: PACKAGE.MODULE:FACTORY is needed, such as torchvision.models:resnet50")
    if options and not arch:
        raise ValueError(f"--{part}options is for the factory of --{part}arch; give both")
    for option in options:
        name, is_set, _ = option.partition("=")
        if not (is_set and name.isidentifier()) or name == "num_classes":
            reason = "the data decide it" if name == "num_classes" else "NAME=VALUE is needed"
            raise ValueError(f"--{part}options {option}: {reason}")


def at_least(config: Any, part: str = "", **minimums: int) -> None:
    """Raises a `ValueError` if a setting that is given is below its minimum."""
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"--{part}{name.replace('_', '-')} {value}: at least {minimum} is needed")


def at_most(flag: str, number: int | None, most: int) -> None:
    """Raises a `ValueError` if a number that is given is above its maximum."""
    if number is not None and number > most:
        raise ValueError(f"{flag} {number}: at most {most} is possible")
