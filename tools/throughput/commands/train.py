"""The options of `throughput train`."""

from dataclasses import dataclass
from typing import Literal

from pipelines.config import DataConfig
from pipelines.mix import MixConfig
from tools.throughput.commands.job import Job, Network, by_device, trainer_config


@dataclass(frozen=True)
class Train(Job):
    """Measure a training job beside the same job without its data, and try what may make it faster.

    Job, model alone, loader alone take turns: the job whole; on shards that have left the page cache; on a few of its batches,
    held in memory; on a synthetic batch. The last line says whether data holds it up, and which of the remedies tried helped:
    other numbers of --data.threads, smaller images in the shards, on a GPU other loads of its JPEG decoder. Options are those
    of train.py, but for those that its speed does not depend on. --data.valid is not used.
    """

    data: DataConfig = DataConfig()
    mix: MixConfig = MixConfig()
    model: Network = Network()
    accumulate_steps: int = 1
    """As --accumulate-steps of train.py."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """As --compile of train.py."""
    grad_clip: float | None = None
    """As --grad-clip of train.py."""
    seed: int = 0
    """As --seed of train.py."""
    steps: int | None = None
    """Steps of a turn, after those that warm up; by default 20 on a GPU, 2 on a CPU."""
    rounds: int = 5
    """Turns of each; at least 3, as fewer say nothing of the noise."""

    def run(self) -> int:
        self.check()
        if not self.data.train:
            raise ValueError("--data.train is needed, the shards to train on")
        if self.data.size_schedule:
            raise ValueError("--data.size-schedule: one size is measured, that of --image-size")
        from model.distributed import choose_device
        from tools.throughput.train import benchmark

        steps = by_device(self.steps, choose_device(self.device).type, gpu=20, cpu=2)
        if steps < 1 or self.rounds < 3:
            raise ValueError(f"--steps {steps} --rounds {self.rounds}: at least 1 step and 3 rounds are needed")
        report = benchmark(trainer_config(self), steps=steps, rounds=self.rounds)
        self.publish(report)
        return 0
