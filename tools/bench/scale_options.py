"""The options of `throughput scale`."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.throughput.commands.output import Output


@dataclass(frozen=True)
class Scale(Output):
    """Measure how the loader's cost grows: with shards, samples, ranks, threads and the size of images, on the CPU.

    At each point of an axis, in a process of its own: the time to the first batch, the rate from there on, memory and open
    files. Shards, samples and ranks are measured on data sets that are made up, thousands of names for a few tars of small
    images, which take hardly any room. With the default values, three rounds take about ten minutes.
    """

    axes: tuple[Literal["shards", "bucket", "samples", "ranks", "threads", "sizes"], ...] = (
        *("shards", "bucket", "samples", "ranks", "threads", "sizes"),
    )
    """What to let grow; `bucket` is shards again, in a bucket served on this machine."""
    shards: tuple[int, ...] = (10, 100, 1_000, 10_000)
    """Numbers of shards into which --base-samples are parted."""
    bucket_shards: tuple[int, ...] = (10, 100, 1_000)
    """The same in a bucket; each is asked for over HTTP from a server on the same cores, so that more say little."""
    samples: tuple[int, ...] = (14_000, 128_000, 1_280_000, 14_000_000)
    """Numbers of samples in --base-shards shards."""
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of processes that share a data set, with one thread each."""
    threads: tuple[int, ...] | None = None
    """Numbers of threads; by default powers of two up to the number of CPUs, and that."""
    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Sides of the images, pixels."""
    base_shards: int = 1024
    """Shards where they are not what grows."""
    base_samples: int = 1_280_000
    """Samples where they are not what grows."""
    data: str = ""
    """Training shards for the axes `threads` and `sizes`, as --data.train takes them; by default made-up images of 110 KB."""
    batch_size: int = 32
    """Images a batch, on each rank."""
    image_size: int = 224
    """Side of the images where it is not what grows, pixels."""
    latency: float = 30.0
    """Milliseconds until the bucket answers a request."""
    seconds: float = 2.0
    """For which each turn goes on after its first batches."""
    rounds: int = 3
    """Turns of each point."""
    scratch: Path | None = None
    """Folder for what is made up, left empty; by default the system's for temporary files."""

    def run(self) -> int:
        self.check()
        cores = len(os.sched_getaffinity(0))
        threads = sorted({*(2**power for power in range(cores.bit_length())), cores})
        values = {
            "shards": self.shards,
            "bucket": self.bucket_shards,
            "samples": self.samples,
            "ranks": self.ranks,
            "threads": tuple(threads) if self.threads is None else self.threads,
            "sizes": self.sizes,
        }
        self._check_numbers(values)
        import tempfile

        from tools.bench.scale import benchmark, plan

        points = plan(
            {axis: list(dict.fromkeys(values[axis])) for axis in dict.fromkeys(self.axes)},
            shards=self.base_shards,
            samples=self.base_samples,
            threads=cores,
            image_size=self.image_size,
            batch_size=self.batch_size,
        )
        report = benchmark(
            points,
            data=self.data,
            latency_seconds=self.latency / 1000,
            seconds=self.seconds,
            rounds=self.rounds,
            scratch=self.scratch or Path(tempfile.gettempdir()),
        )
        self.publish(report)
        return 1 if any(result.error for result in report.results) else 0

    def _check_numbers(self, values: Mapping[str, tuple[int, ...]]) -> None:
        """Whether there is something to measure.

        Raises:
            ValueError: There is not; names the option.
        """
        for axis in self.axes:
            if min(values[axis], default=0) < 1:
                option = "bucket-shards" if axis == "bucket" else axis
                raise ValueError(f"--{option} {' '.join(map(str, values[axis]))}: numbers from 1 on are needed")
        for name in ("base_shards", "base_samples", "batch_size", "image_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1 is needed")
        if self.seconds <= 0 or self.latency < 0:
            raise ValueError(
                f"--seconds {self.seconds:g} --latency {self.latency:g}: more than 0 is needed, and no less than 0"
            )
        missing = [name for name in ("aiohttp", "s3fs") if importlib.util.find_spec(name) is None]
        if "bucket" in self.axes and missing:
            raise ValueError(
                f"--axes bucket needs {' and '.join(missing)}; pip install 'googlenet-dali[remote]', or name the other axes"
            )
