"""The options of `throughput step`."""

from dataclasses import dataclass

from tools.throughput.commands.job import Job, by_device, trainer_config


@dataclass(frozen=True)
class Step(Job):
    """Measure the trainer's step against the barest loop that does the same arithmetic.

    Both take the same batch, which lies in memory: what the trainer takes longer is its bookkeeping.
    """

    steps: int | None = None
    """Steps of a turn; by default 20 on a GPU, 1 on a CPU."""
    rounds: int = 10
    """Turns of each loop."""

    def run(self) -> int:
        self.check()
        from model.distributed import choose_device
        from tools.bench.step import benchmark

        steps = by_device(self.steps, choose_device(self.device).type, gpu=20, cpu=1)
        if steps < 1 or self.rounds < 1:
            raise ValueError(f"--steps {steps} --rounds {self.rounds}: at least 1 of each is needed")
        report = benchmark(trainer_config(self), steps=steps, rounds=self.rounds)
        self.publish(report)
        return 0
