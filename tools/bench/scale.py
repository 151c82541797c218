"""`python -m tools.bench.scale` measures how start-up, memory, and rate of the loader scale."""

import concurrent.futures
import contextlib
import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from model.config import MAX_IMAGE_SIZE, at_least, at_most
from pipelines.machine import num_cpus
from pipelines.printable import counted
from pipelines.shards.shard_set import open_shards
from tools.bench.command import check_json, check_latency
from tools.bench.linked import LinkedShards, photograph, small
from tools.cli import run_command
from tools.parse import parse
from tools.run.config import MOST_THREADS
from tools.throughput.hardware import DALI_PACKAGES, versions
from tools.throughput.process import Run, open_scratch, run_measured
from tools.throughput.report import MEMORY, RATE, Column, Report, Row, Table
from tools.throughput.rounds import Turn, TurnError, take_turns

Axis = Literal["shards", "bucket", "samples", "ranks", "threads", "sizes"]
AXES: tuple[Axis, ...] = get_args(Axis)
VARIED = {"bucket": "shards", "sizes": "image_size"}  # the field of a point that an axis varies, if its name differs

# Batches that a loader always holds: one in use and one in preparation. They grow with the images and are no overhead.
BATCHES_HELD = 2
SCRATCH_BYTES = 2 * 10**9
PHOTOGRAPHS = (64, 64 * 128)  # shards and samples of the data set for threads and sizes
# Seconds: imports; then finding shards and indices; then the first batch; the last two together.
COLUMNS = (
    Column("imports_seconds", "imports s", ".1f"),
    Column("open_seconds", "find s", ".2f"),
    Column("first_seconds", "first s", ".2f"),
    Column("start_seconds", "start-up s", ".2f"),
    RATE,
    MEMORY,
    Column("beyond_batches_bytes", "beyond batches MB", scale=1e-6, largest=True),
    Column("batch_bytes", "batch MB", ",.1f", scale=1e-6, largest=True),
    Column("open_files", "files", largest=True),
)


Point = dict[str, Any]  # a value on an axis, and all other settings


@dataclass(frozen=True)
class Scale:
    """Measure how the cost of the loader scales with shards, samples, ranks, threads, and image size, on the CPU.

    Each point of an axis is a process of its own, or one per rank: the time to the first batch, the rate from there on, memory,
    and open files. Shards, samples, and ranks are measured on made-up data sets: thousands of names for a few tars of small
    images, which take little space. With the default values, three rounds take about ten minutes.
    """

    axes: tuple[Axis, ...] = AXES
    """Axes to measure; `bucket` is shards again, in a bucket that this machine serves."""
    shards: tuple[int, ...] = (10, 100, 1_000, 10_000)
    """Numbers of shards for --base-samples samples."""
    bucket_shards: tuple[int, ...] = (10, 100, 1_000)
    """Numbers of shards in a bucket. Each takes an HTTP request to a server on the same cores, so larger numbers say little."""
    samples: tuple[int, ...] = (14_000, 128_000, 1_280_000, 14_000_000)
    """Numbers of samples in --base-shards shards."""
    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of processes that share a data set, with one thread each."""
    threads: tuple[int, ...] | None = None
    """Numbers of threads; by default the number of CPUs, and all powers of two below it."""
    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Image sides, in pixels."""
    base_shards: int = 1024
    """Shards on the other axes."""
    base_samples: int = 1_280_000
    """Samples on the other axes."""
    data: str = ""
    """Training shards for the axes `threads` and `sizes`, as --data.train takes them; by default made-up images of 110 KB."""
    batch_size: int = 32
    """Images per batch, on each rank."""
    image_size: int = 224
    """Image side on the other axes, in pixels."""
    latency: float = 30.0
    """Milliseconds until the bucket answers a request."""
    seconds: float = 2.0
    """Seconds to time per turn, after warm-up."""
    rounds: int = 3
    """Turns of each point."""
    scratch: Path | None = None
    """Folder for what is made up, left empty; by default the system's folder for temporary files."""
    json: Path | None = None
    """File for all figures."""

    def run(self) -> int:
        """Measures the points in turns, and prints the tables; returns the exit status."""
        points = self.points()
        with contextlib.ExitStack() as stack:
            folder, environment = stack.enter_context(open_scratch(self.scratch, SCRATCH_BYTES))
            bucket = ""
            if "bucket" in self.axes:
                from tools.bench.bucket import serve  # needs aiohttp

                bucket = stack.enter_context(serve(folder, self.latency / 1000))
            made_of = functools.cache(lambda encode: LinkedShards(folder / encode.__name__, encode))
            turns = dict[str, Callable[[], Turn]]()
            for name, point in points.items():
                if point["axis"] in ("threads", "sizes"):
                    shards = self.data or str(made_of(photograph).make(*PHOTOGRAPHS))
                else:
                    shards = str(made_of(small).make(point["shards"], point["samples"]))
                if point["axis"] == "bucket":
                    shards = shards.replace(str(folder), bucket)
                task = {**point, "location": shards, "seconds": self.seconds}
                turns[name] = _turn(name, task, folder, environment["TMPDIR"])
                if point["axis"] == "bucket":
                    with contextlib.suppress(TurnError):  # the first round meets it as well
                        turns[name]()  # fetches the indices into the cache
            outcomes = take_turns(turns, self.rounds)
        tables = {axis: Table(axis, COLUMNS, []) for axis in AXES}
        for name, point in points.items():
            tables[point["axis"]].rows.append(Row.of(f"{point['value']:,}", outcomes[name], COLUMNS, point=point))
        report = Report(
            heading=f"medians of {counted(self.rounds, 'round')}; peak memory of a process, with and without "
            f"{BATCHES_HELD} batches",
            tables=[*tables.values()],
            settings={**vars(self), "batches_held": BATCHES_HELD},
            versions=versions(*DALI_PACKAGES, "torch", "s3fs"),
        )
        report.publish(self.json)
        return int(report.has_failed)

    def points(self) -> dict[str, Point]:
        """Returns the points by their names, axis by axis. An axis that does not vary the ranks has one.

        Raises:
            ValueError: There would be shards without a sample, a number is too small, or --data names no local shards.
        """
        at_least(self, base_shards=1, base_samples=1, batch_size=1, image_size=1, rounds=1)
        at_most("--image-size", self.image_size, MAX_IMAGE_SIZE)
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"--seconds {self.seconds:g}: a finite number above 0 is needed")
        check_latency(self.latency)
        check_json(self.json)
        if not self.axes:
            raise ValueError(f"--axes: at least one of {', '.join(AXES)} is needed")
        if self.data and {"threads", "sizes"} & {*self.axes}:
            shards = open_shards(self.data, "train")
            if shards.is_remote:
                raise ValueError(f"--data {self.data}: local shards are needed; the axis `bucket` measures a bucket")
            shards.num_classes()  # fills the cache of labels
        cores, points = num_cpus(), dict[str, Point]()
        powers = {*(2**power for power in range(cores.bit_length())), cores}
        for axis in dict.fromkeys(self.axes):
            option = "bucket_shards" if axis == "bucket" else axis
            values = sorted(powers) if axis == "threads" and self.threads is None else getattr(self, option)
            if min(values, default=0) < 1:
                flag = f"--{option.replace('_', '-')}"
                raise ValueError(f"{' '.join([flag, *map(str, values)])}: numbers from 1 on are needed")
            most = {"ranks": MOST_THREADS, "threads": MOST_THREADS, "sizes": MAX_IMAGE_SIZE}
            at_most(f"--{axis}", max(values), most.get(axis, max(values)))
            threads = 1 if axis == "ranks" else cores  # more threads would measure the cores
            base = {"shards": self.base_shards, "samples": self.base_samples, "ranks": 1, "threads": threads}
            base |= {"image_size": self.image_size, "batch_size": self.batch_size}
            for value in dict.fromkeys(values):
                point: Point = {"axis": axis, "value": value, **base, VARIED.get(axis, axis): value}
                points[f"{axis} {value:,}"] = point
                if point["samples"] < point["shards"]:
                    raise ValueError(
                        f"axis {axis} at {value:,}: {point['samples']:,} samples are fewer than {point['shards']:,} shards; "
                        "lower --shards, --bucket-shards or --base-shards, or raise --samples or --base-samples"
                    )
        return points


def _turn(name: str, task: Point, folder: Path, temporary: str) -> Callable[[], Turn]:
    path, num_ranks = folder / f"{name}.json", task["ranks"]
    path.write_text(json.dumps(task))
    environment = {"TMPDIR": temporary}
    if task["axis"] == "bucket":
        environment["XDG_CACHE_HOME"] = str(folder / "cache")  # the user's cache stays as it is

    def rank(number: int, meeting: str) -> Run:
        with tempfile.TemporaryDirectory(dir=folder) as logs:
            command = (sys.executable, "-m", "tools.bench.start", path, meeting, str(number), str(time.monotonic()))
            return run_measured(command, Path(logs), environment)

    def run() -> Turn:
        with tempfile.TemporaryDirectory(dir=folder) as meeting, concurrent.futures.ThreadPoolExecutor(num_ranks) as pool:
            runs = list(pool.map(rank, range(num_ranks), [meeting] * num_ranks))
        # Of several ranks: the slowest start-up, the largest memory, the sum of the rates.
        turn: Turn = {name: max(run.said[name] for run in runs) for name in runs[0].said}
        memory = max(run.peak_memory_bytes for run in runs)
        beyond = memory - BATCHES_HELD * runs[0].said["batch_bytes"]
        rate = sum(run.said["images_per_second"] for run in runs)
        return {**turn, "images_per_second": rate, "peak_memory_bytes": memory, "beyond_batches_bytes": beyond}

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(lambda: parse(lambda words: tyro.cli(Scale, prog="python -m tools.bench.scale", args=words), arguments).run())


if __name__ == "__main__":
    main()
