"""The options of `throughput loader`."""

from dataclasses import dataclass
from typing import Literal, get_args

from pipelines.config import DataConfig
from tools.throughput.commands.job import trainer_config
from tools.throughput.commands.output import Output

Stage = Literal["read", "headers", "decode", "resize", "normalize", "hand-over"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Loader(Output):
    """Measure the loader alone, and what each of its stages costs.

    The graph up to each stage takes turns with the others, each turn a process of its own. Options are those of train.py.
    """

    data: DataConfig = DataConfig()
    splits: tuple[Literal["train", "valid"], ...] = ("train",)
    """What to measure; each needs its --data."""
    stages: tuple[Stage, ...] = STAGES
    """Where the graph ends; what a stage costs is the difference to the one before in this list."""
    images: int = 2000
    """That a turn gives, once it is warm, epoch after epoch."""
    batch_size: int = 0
    """As --batch-size of train.py."""
    image_size: int = 224
    """As --image-size of train.py."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As --device of train.py."""
    seed: int = 0
    """As --seed of train.py."""
    rounds: int = 6
    """Turns of each."""

    def run(self) -> int:
        self.check()
        stages = [stage for stage in STAGES if stage in self.stages]
        if not (self.splits and stages):
            raise ValueError("--splits and --stages: at least 1 of each is needed")
        for split in self.splits:
            if not getattr(self.data, split):
                raise ValueError(f"--data.{split} is needed, the shards to load")
        if self.data.backend != "dali":
            raise ValueError(f"--data.backend {self.data.backend}: the stages are those of dali; throughput compare has others")
        if self.data.size_schedule:
            raise ValueError("--data.size-schedule: one size is measured, that of --image-size")
        if self.images < 1 or self.rounds < 1:
            raise ValueError(f"--images {self.images} --rounds {self.rounds}: at least 1 of each is needed")
        from tools.throughput.loader import benchmark

        report = benchmark(trainer_config(self), splits=self.splits, stages=stages, images=self.images, rounds=self.rounds)
        self.publish(report)
        return 1 if any(result.error for result in report.results) else 0
