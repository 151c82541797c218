"""`throughput remote`: training from a bucket against training from the disk, at a given time for each request."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines import DataConfig, ShardSet, build_loader, open_shards
from pipelines.dali import SegmentPipeline, Settings
from pipelines.segments import Part, Segment
from tools.throughput.bucket import serve
from tools.throughput.hardware import versions
from tools.throughput.report import Bar, Report
from tools.throughput.rounds import Statistic, summarize, take_turns

DALI_BATCH_SIZE = 8  # its own reader is so slow that a few samples tell
DALI_BATCHES = 4


@dataclass(frozen=True)
class Turn:
    """One epoch from a loader just made: time to its first batch, and images a second from there on."""

    first_seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Result:
    """Of one way to read, over the rounds; `ratio` is to the local disk in the same round."""

    name: str
    first_seconds: Statistic
    images_per_second: Statistic
    ratio: Statistic


@dataclass(frozen=True)
class RemoteReport(Report):
    """All that was measured."""

    shards: str
    images: int
    latency_seconds: float
    segment_samples: int
    batch_size: int
    image_size: int
    threads: int
    results: tuple[Result, ...]

    def bars(self) -> Iterable[Bar]:
        return [Bar("", result.name, result.images_per_second) for result in self.results]

    def __str__(self) -> str:
        lines = [
            f"{self.shards}: {self.images:,} images, {1000 * self.latency_seconds:g} ms a request, segments of "
            f"{self.segment_samples:,}, batches of {self.batch_size}, {self.threads} threads; {self.hardware}",
            f"{'':<34}{'images/s':>10}{'ratio':>8}{'':>16}{'first batch':>13}",
        ]
        for result in self.results:
            ratio = result.ratio
            lines.append(
                f"{result.name:<34}{result.images_per_second.median:>10,.0f}{ratio.median:>8.2f}"
                f"{f'({ratio.low:.2f}-{ratio.high:.2f})':>16}{result.first_seconds.median:>11.1f} s"
            )
        return "\n".join(lines)


def benchmark(
    folder: Path, *, latency_seconds: float, segment_samples: int, batch_size: int, image_size: int, threads: int, rounds: int
) -> RemoteReport:
    """Reads one epoch of the training split of a folder of shards in each way, in turns.

    Raises:
        ValueError: There are no such shards.
    """
    shards = open_shards(str(folder), "train")
    tars = [Path(tar).name for tar in shards.tars]
    names = f"{{{','.join(tars)}}}" if len(tars) > 1 else tars[0]
    with serve(folder, latency_seconds) as bucket:

        def epoch(location: str) -> Turn:
            config = DataConfig(train=location, segment_samples=segment_samples)
            started = time.perf_counter()
            loader = build_loader(
                config, "train", batch_size=batch_size, image_size=image_size, device=torch.device("cpu"), num_threads=threads
            )
            with loader:
                loader.next()
                first = time.perf_counter()
                images = sum(len(batch["target"]) for batch in iter(loader.next, None))
                return Turn(first - started, images / (time.perf_counter() - first))

        competitors: dict[str, Callable[[], Turn]] = {
            "local disk": lambda: epoch(str(folder)),
            "bucket, shards copied ahead": lambda: epoch(f"{bucket}/{names}"),
            "bucket, DALI's own reader": lambda: _dali_itself(shards, bucket, image_size, threads),
        }
        outcomes = take_turns(competitors, rounds)
    local = [turn.images_per_second for turn in outcomes["local disk"].turns]
    results = [
        Result(
            name,
            summarize([turn.first_seconds for turn in outcome.turns]),
            summarize([turn.images_per_second for turn in outcome.turns]),
            summarize([turn.images_per_second / base for turn, base in zip(outcome.turns, local, strict=True)]),
        )
        for name, outcome in outcomes.items()
    ]
    return RemoteReport(
        str(folder),
        shards.num_samples,
        latency_seconds,
        segment_samples,
        batch_size,
        image_size,
        threads,
        tuple(results),
        versions=versions(("nvidia-dali-cuda120", "torch", "s3fs", "aiohttp")),
    )


def _dali_itself(shards: ShardSet, bucket: str, image_size: int, threads: int) -> Turn:
    """The same graph, its reader at the bucket, for a few batches in order."""
    tar, count = f"{bucket}/{Path(shards.tars[0]).name}", DALI_BATCHES * DALI_BATCH_SIZE
    part = Part(0, 0, shards.lengths[0])
    settings = Settings(
        train=False,
        batch_size=DALI_BATCH_SIZE,
        image_size=image_size,
        device=torch.device("cpu"),
        dtype=torch.float32,
        num_threads=threads,
        seed=0,
        rank=0,
        segment_samples=part.stop,
        label_extension=shards.label_reader.extension,
        config=DataConfig(),
    )
    started = time.perf_counter()
    pipeline = SegmentPipeline(settings, Segment(0, 0, 0, DALI_BATCHES + 1, (part,)), [(tar, str(shards.indices[0]))])
    pipeline.run()
    first = time.perf_counter()
    for _ in range(DALI_BATCHES):
        pipeline.run()
    return Turn(first - started, count / (time.perf_counter() - first))
