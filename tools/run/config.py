"""Every setting of a training run. The fields are the flags of train.py, and their docstrings are its help.

This module imports no torch, so `--help` and wrong flags are answered at once.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from model.config import MAX_IMAGE_SIZE, StepConfig, at_least, at_most
from pipelines.config import DataConfig
from pipelines.mix import MixConfig

MOST_THREADS = 1024  # a judgment; far more than the machine can start abort the process
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save a checkpoint, besides at the end of each epoch."""

    every_steps: int | None = None
    """Steps between two checkpoints."""
    every_minutes: float | None = None
    """Minutes between two checkpoints."""
    keep: int = 3
    """Number of recent checkpoints to keep. If the newest cannot be read, a resumed run falls back to the one before."""

    def __post_init__(self) -> None:
        at_least(self, "checkpoint.", every_steps=1, keep=1)
        if self.every_minutes is not None and not 0 < self.every_minutes < math.inf:
            raise ValueError(f"--checkpoint.every-minutes {self.every_minutes}: a finite number above 0 is needed")


@dataclass(frozen=True)
class Config(StepConfig):
    """Train GoogLeNet on WebDataset shards. Without --data.train, train.py runs the embedded demo on images that it draws."""

    recipe: Literal["demo", "paper", "imagenet", "resnet50", "finetune"] | None = None
    """Start from a complete set of settings; see docs/recipes.md. Other flags override it."""
    data: DataConfig = field(default_factory=DataConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init_from: Path | None = None
    """Start from this checkpoint or state dict; torchvision: from its published weights. Layers for other classes are reset."""
    init_from_partial: bool = False
    """Load the tensors of --init-from that fit and reset the others, instead of refusing the file."""
    init_from_weights: Literal["auto", "ema", "raw"] = "auto"
    """Weights of an --init-from checkpoint of train.py. auto: those that scored better in its last validation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: the GPU if there is one."""
    max_nonfinite_steps: int = 25
    """End the run after this many consecutive steps with non-finite gradients. Such steps are skipped."""
    torch_threads: int | None = None
    """CPU threads of torch. By default, torch and the loader share the cores, and torch may use fewer beside other programs."""
    run_dir: Path | None = None
    """Folder for the output of the run. By default, runs/DATE-TIME-PROCESS."""
    resume: Literal["no", "auto"] = "no"
    """auto: continue the run in --run-dir from its last checkpoint, or start it if there is none."""
    log_every: int | None = None
    """Steps between two log lines. By default 20; in short epochs a fifth of the epoch."""
    log: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Send settings and metrics to Weights & Biases, MLflow or both, too. Without a network, they stay in the run folder."""
    profile: int | None = None
    """Trace this many steps, starting with the eleventh. The run folder receives trace.json, and a summary in profile.txt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, max_nonfinite_steps=1, log_every=1, torch_threads=1, profile=1)
        if self.resume == "auto" and self.run_dir is None:
            raise ValueError("--resume auto needs --run-dir, the folder of the run to continue")
        at_most("--torch-threads", self.torch_threads, MOST_THREADS)
        at_most("--data.threads", self.data.threads, MOST_THREADS)
        at_most("--seed", self.seed, LARGEST_SEED)
        for entry in self.data.size_schedule:
            at_most(f"--data.size-schedule {entry}: size", int(entry.partition(":")[2]), MAX_IMAGE_SIZE)
        for name, is_given in (("partial", self.init_from_partial), ("weights", self.init_from_weights != "auto")):
            if is_given and self.init_from is None:
                raise ValueError(f"--init-from-{name} needs --init-from")

    def choose(self, steps_per_epoch: int) -> "Config":
        """Returns the settings with those chosen that are left open and depend on the number of steps."""
        config = super().choose(steps_per_epoch)
        return config if self.log_every else replace(config, log_every=min(20, max(1, steps_per_epoch // 5)))

    @property
    def has_fixed_threads(self) -> bool:
        """Whether the number of torch's threads must not change during the run. Compiled code is for one number."""
        return self.deterministic or self.torch_threads is not None or self.compile != "no"

    @property
    def largest_image_size(self) -> int:
        """The largest training image side of the run, in pixels, with --data.size-schedule."""
        return max(self.image_size, *(self.data.image_size_of(epoch, self.image_size) for epoch in range(self.epochs)))
