"""`throughput scale`: how start-up, memory and rate of the loader grow with shards, samples, ranks, threads, image size."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.shards.shard_set import open_shards
from tools.bench.converters import ROOT
from tools.bench.start import Task
from tools.throughput.hardware import versions
from tools.throughput.process import Run, absolute, run_measured
from tools.throughput.report import Bar, Curve, Report
from tools.throughput.rounds import Outcome, Statistic, TurnError, summarize, take_turns
from tools.throughput.scratch import open_scratch

Axis = Literal["shards", "bucket", "samples", "ranks", "threads", "sizes"]
AXES: dict[Axis, str] = {
    "shards": "shards",
    "bucket": "shards in a bucket",
    "samples": "samples",
    "ranks": "ranks",
    "threads": "threads",
    "sizes": "side of the images, pixels",
}

# Of each loader, at least: one in use and one that is made ready. They grow with the images, and are nobody's waste.
BATCHES_HELD = 2
SCRATCH_BYTES = 2 * 10**9
PHOTOGRAPHS = (64, 64 * 128)  # shards and samples of the data set for threads and sizes


@dataclass(frozen=True)
class Point:
    """A place on an axis: the value there, and all else."""

    axis: Axis
    value: int
    shards: int
    samples: int
    ranks: int
    threads: int
    image_size: int
    batch_size: int


@dataclass(frozen=True)
class Turn:
    """What one turn came to: of several ranks the slowest start-up, the largest memory, the sum of the rates."""

    imports_seconds: float
    open_seconds: float
    first_seconds: float
    start_seconds: float
    images_per_second: float
    peak_memory_bytes: int
    batch_bytes: int
    open_files: int


@dataclass(frozen=True)
class Result:
    """A point, over the rounds.

    Attributes:
        point: What was measured.
        error: What it printed last, where it failed.
        imports_seconds: From the start of the process until its imports are done, which is the same everywhere.
        open_seconds: From there on: finding the shards and their indices.
        first_seconds: From there on: making the loader, and its first batch.
        start_seconds: The last two together.
        images_per_second: From there on, over all ranks.
        peak_memory_bytes: Of a process, the largest of ranks and rounds.
        batch_bytes: Of the images of a batch.
        beyond_batches_bytes: The peak without the batches that a loader holds.
        open_files: Of a process, the most of ranks and rounds.
    """

    point: Point
    error: str | None = None
    imports_seconds: Statistic | None = None
    open_seconds: Statistic | None = None
    first_seconds: Statistic | None = None
    start_seconds: Statistic | None = None
    images_per_second: Statistic | None = None
    peak_memory_bytes: int = 0
    batch_bytes: int = 0
    beyond_batches_bytes: int = 0
    open_files: int = 0


@dataclass(frozen=True)
class ScaleReport(Report):
    """All that was measured."""

    batches_held: int
    latency_seconds: float
    seconds: float
    rounds: int
    results: tuple[Result, ...]

    def axes(self) -> dict[Axis, list[Result]]:
        """The results by axis."""
        return {axis: found for axis in AXES if (found := [each for each in self.results if each.point.axis == axis])}

    def bars(self) -> Iterable[Bar]:
        return ()

    def curves(self) -> Iterable[Curve]:
        for axis, results in self.axes().items():
            done = [(each, each.start_seconds, each.images_per_second) for each in results]
            starts = [(each.point.value, start) for each, start, _ in done if start]
            memory = [(each.point.value, summarize([each.beyond_batches_bytes / 1e6])) for each, start, _ in done if start]
            rates = [(each.point.value, rate) for each, _, rate in done if rate]
            for name, points in (("start-up, s", starts), ("memory beyond batches, MB", memory), ("images/s", rates)):
                yield Curve(AXES[axis], name, points)

    def __str__(self) -> str:
        lines = [
            f"medians of {self.rounds} rounds, {self.hardware}; memory of a process, at its "
            f"peak, and without {self.batches_held} batches; seconds: imports; then finding shards and indices; then the first "
            "batch; the last two together"
        ]
        for axis, results in self.axes().items():
            lines += ["", self._what(axis, results[0].point)]
            header = f"{'imports s':>11}{'find s':>8}{'first s':>9}{'start-up s':>12}{'images/s':>10}"
            lines += [f"{axis:>12}{header}{'memory MB':>11}{'beyond MB':>11}{'files':>7}"]
            lines += [_line(result) for result in results]
        return "\n".join(lines)

    def _what(self, axis: Axis, point: Point) -> str:
        """What is the same all along an axis."""
        batches = f"batches of {point.batch_size} x {point.image_size} pixels, {point.threads} threads"
        return {
            "shards": f"{point.samples:,} samples, {batches}",
            "bucket": f"the same in a bucket, {1000 * self.latency_seconds:g} ms a request, indices in the cache folder",
            "samples": f"{point.shards:,} shards, {batches}",
            "ranks": f"{point.samples:,} samples in {point.shards:,} shards, {batches} each, on {self.hardware.cores} cores",
            "threads": f"batches of {point.batch_size} x {point.image_size} pixels, on {self.hardware.cores} cores",
            "sizes": f"batches of {point.batch_size}, {point.threads} threads",
        }[axis]


def _line(result: Result) -> str:
    imports, find, first = result.imports_seconds, result.open_seconds, result.first_seconds
    start, rate = result.start_seconds, result.images_per_second
    if imports is None or find is None or first is None or start is None or rate is None:
        return f"{result.point.value:>12,}  failed: {result.error}"
    return (
        f"{result.point.value:>12,}{imports.median:>11.1f}{find.median:>8.2f}{first.median:>9.2f}{start.median:>12.2f}"
        f"{rate.median:>10,.0f}{result.peak_memory_bytes / 1e6:>11,.0f}{result.beyond_batches_bytes / 1e6:>11,.0f}"
        f"{result.open_files:>7}"
    )


def plan(
    values: Mapping[Axis, Sequence[int]], *, shards: int, samples: int, threads: int, image_size: int, batch_size: int
) -> list[Point]:
    """The points, axis by axis; what an axis does not vary is as given, with one rank.

    Raises:
        ValueError: There would be shards without a sample.
    """
    names: dict[Axis, str] = {
        "shards": "shards",
        "bucket": "shards",
        "samples": "samples",
        "ranks": "ranks",
        "threads": "threads",
        "sizes": "image_size",
    }
    points = []
    for axis, along in values.items():
        base = Point(axis, 0, shards, samples, 1, threads, image_size, batch_size)
        if axis == "ranks":
            base = dataclasses.replace(base, threads=1)  # more would make it a question of the cores
        for value in along:
            changed: dict[str, Any] = {names[axis]: value}
            point = dataclasses.replace(base, value=value, **changed)
            if point.samples < point.shards:
                raise ValueError(
                    f"axis {axis} at {value:,}: {point.samples:,} samples are not one for each of {point.shards:,} shards; "
                    "lower --shards, --bucket-shards or --base-shards, or raise --samples or --base-samples"
                )
            points.append(point)
    return points


def benchmark(
    points: Sequence[Point], *, data: str, latency_seconds: float, seconds: float, rounds: int, scratch: Path
) -> ScaleReport:
    """Lets the points take turns, each rank of each turn a process of its own.

    Args:
        points: What to measure.
        data: Training shards for the axes `threads` and `sizes`; made up where it is empty.
        latency_seconds: Until the bucket answers a request.
        seconds: Of a turn after the first batch.
        rounds: Turns of each point.
        scratch: Folder for what is made up, left empty.

    Raises:
        ValueError: Not enough room; or `data` names no local shards.
    """
    if data and any(point.axis in ("threads", "sizes") for point in points):
        shards = open_shards(data, "train")
        if shards.is_remote:
            raise ValueError(f"--data {data}: local shards are needed; the axis `bucket` measures a bucket")
        shards.num_classes()  # what has to be read once is read here
    with contextlib.ExitStack() as stack:
        folder, environment = stack.enter_context(open_scratch(scratch, SCRATCH_BYTES))
        environment = {"TMPDIR": environment["TMPDIR"]}
        bucket = stack.enter_context(_bucket(folder, latency_seconds, any(point.axis == "bucket" for point in points)))
        outcomes = take_turns(_turns(points, _locations(folder, data, bucket), folder, environment, seconds), rounds)
    return ScaleReport(
        BATCHES_HELD,
        latency_seconds,
        seconds,
        rounds,
        tuple(map(_result, points, outcomes.values())),
        versions=versions(("nvidia-dali-cuda120", "torch", "s3fs")),
    )


@contextlib.contextmanager
def _bucket(folder: Path, latency_seconds: float, needed: bool) -> Iterator[str]:
    """The URL of the folder as a bucket; nothing where none is needed."""
    if not needed:
        yield ""
        return
    from tools.bench.bucket import serve

    with serve(folder, latency_seconds) as url:
        yield url


def _locations(folder: Path, data: str, bucket: str) -> Callable[[Point], str]:
    """Gives the shards of a point; what is made up is made when it is first asked for."""
    from tools.bench.linked import LinkedShards, photograph, small

    small_images = functools.cache(lambda: LinkedShards(folder / "small", small))
    photographs = functools.cache(lambda: LinkedShards(folder / "photographs", photograph))

    def locate(point: Point) -> str:
        if point.axis in ("threads", "sizes"):
            return absolute(data) or str(photographs().make(*PHOTOGRAPHS))
        made = small_images().make(point.shards, point.samples)
        return f"{bucket}/{made.relative_to(folder)}" if point.axis == "bucket" else str(made)

    return locate


def _turns(
    points: Sequence[Point], locate: Callable[[Point], str], folder: Path, environment: Mapping[str, str], seconds: float
) -> dict[str, Callable[[], Turn]]:
    """A turn of each point by its name; the indices in the bucket have been fetched."""
    turns = dict[str, Callable[[], Turn]]()
    for point in points:
        own = dict(environment)
        if point.axis == "bucket":
            own["XDG_CACHE_HOME"] = str(folder / "cache")  # what is fetched is of no use later
        turn = turns[f"{point.axis} {point.value}"] = _turn(point, locate(point), folder, own, seconds)
        if point.axis == "bucket":
            with contextlib.suppress(TurnError):  # the first round meets it as well
                turn()
    return turns


def _turn(point: Point, location: str, folder: Path, environment: Mapping[str, str], seconds: float) -> Callable[[], Turn]:
    task = Task(location, point.batch_size, point.image_size, point.threads, point.ranks, seconds)
    path = folder / f"{point.axis}-{point.value}.json"
    path.write_text(json.dumps(dataclasses.asdict(task)))

    def rank(number: int, meeting: str) -> Run:
        with tempfile.TemporaryDirectory(dir=folder) as logs:
            command = (sys.executable, "-m", "tools.bench.start", path, meeting, str(number), str(time.monotonic()))
            return run_measured(command, ROOT, Path(logs), environment)

    def run() -> Turn:
        with tempfile.TemporaryDirectory(dir=folder) as meeting, concurrent.futures.ThreadPoolExecutor(point.ranks) as pool:
            return _together(list(pool.map(rank, range(point.ranks), [meeting] * point.ranks)))

    return run


def _together(runs: Sequence[Run]) -> Turn:
    said = [run.said for run in runs]
    return Turn(
        imports_seconds=max(each["imports_seconds"] for each in said),
        open_seconds=max(each["open_seconds"] for each in said),
        first_seconds=max(each["first_seconds"] for each in said),
        start_seconds=max(each["open_seconds"] + each["first_seconds"] for each in said),
        images_per_second=sum(each["images_per_second"] for each in said),
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
        batch_bytes=int(said[0]["batch_bytes"]),
        open_files=int(max(each["open_files"] for each in said)),
    )


def _result(point: Point, outcome: Outcome[Turn]) -> Result:
    turns = outcome.turns
    if outcome.error is not None:
        return Result(point, outcome.error)
    peak, batch = max(turn.peak_memory_bytes for turn in turns), turns[0].batch_bytes
    return Result(
        *(point, None),
        summarize([turn.imports_seconds for turn in turns]),
        summarize([turn.open_seconds for turn in turns]),
        summarize([turn.first_seconds for turn in turns]),
        summarize([turn.start_seconds for turn in turns]),
        summarize([turn.images_per_second for turn in turns]),
        *(peak, batch, peak - BATCHES_HELD * batch, max(turn.open_files for turn in turns)),
    )
