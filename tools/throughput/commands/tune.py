"""The options of `throughput tune`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.config import DataConfig
from pipelines.mix import MixConfig
from tools.throughput.commands.job import Job, Network, trainer_config
from tools.throughput.commands.output import check_place


@dataclass(frozen=True)
class Tune(Job):
    """Search settings of the loader for this machine, and write those that are faster than the defaults to a file.

    Threads, depth of the prefetch queue, on a GPU the load of its JPEG decoder: each value takes turns with the defaults, those
    that fall behind are dropped, and the best meets the defaults once more. It is written only if it is faster beyond the noise
    of this machine, and otherwise the defaults are. `train.py --data.tuned FILE` takes the file; flags beside it win. Settings
    that are given here are not searched, and are written down as given.

    On a GPU the loader alone is measured, on a CPU the loader and training steps, which share the cores. Options are those of
    train.py.
    """

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """File to write, JSON."""
    data: DataConfig = DataConfig()
    mix: MixConfig = MixConfig()
    model: Network = Network()
    seed: int = 0
    """As --seed of train.py."""
    seconds: float = 75.0
    """For the search; what comes before and after it takes about half as long again, and twice as long at the most."""
    rounds: int = 9
    """In which the best found meets the defaults; at least 6, as fewer say nothing with 95 % confidence."""

    def run(self) -> int:
        self.check()
        self._check_settings()
        from tools.throughput.tune import benchmark

        self.publish(benchmark(trainer_config(self), self.output, seconds=self.seconds, rounds=self.rounds))
        return 0

    def _check_settings(self) -> None:
        check_place("--output", self.output)
        if not self.data.train:
            raise ValueError("--data.train is needed, the shards to load")
        if self.data.tuned:
            raise ValueError(f"--data.tuned {self.data.tuned}: such a file is what is made here; the defaults are without it")
        if self.data.backend != "dali":
            raise ValueError(f"--data.backend {self.data.backend}: the settings are those of --data.backend dali")
        if self.data.size_schedule:
            raise ValueError("--data.size-schedule: one size is measured, that of --image-size")
        if not self.seconds > 0 or self.rounds < 6:
            raise ValueError(f"--seconds {self.seconds} --rounds {self.rounds}: some time and at least 6 rounds are needed")
