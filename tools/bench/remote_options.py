"""The options of `throughput remote`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from tools.throughput.commands.output import Output


@dataclass(frozen=True)
class Remote(Output):
    """Measure training from a bucket against training from the disk.

    The bucket is the folder, served on this machine with a given time for each request, as a distant store has it.
    """

    shards: tyro.conf.Positional[Path]
    """Folder of shards with a training split, as `shards convert` writes it."""
    latency: float = 30.0
    """Milliseconds until each request is answered."""
    block_shards: int | None = None
    """As --data.block-shards; a small set has several blocks only if this is small."""
    batch_size: int = 64
    """Images a batch."""
    image_size: int = 224
    """Side of the images, pixels."""
    threads: int = 2
    """CPU threads that decode."""
    rounds: int = 5
    """Turns of each competitor."""

    def run(self) -> int:
        self.check()
        from tools.bench.remote import benchmark

        report = benchmark(
            self.shards,
            latency_seconds=self.latency / 1000,
            block_shards=self.block_shards,
            batch_size=self.batch_size,
            image_size=self.image_size,
            threads=self.threads,
            rounds=self.rounds,
        )
        self.publish(report)
        return 0
