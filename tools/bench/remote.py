"""`throughput remote`: training from a bucket against training from the disk, at a given time for each request."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.augment import validation_images
from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.shards.shard_set import IMAGE_EXTENSIONS, ShardSet, open_shards
from tools.bench.bucket import serve
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
    block_shards: int | None
    batch_size: int
    image_size: int
    threads: int
    results: tuple[Result, ...]

    def bars(self) -> Iterable[Bar]:
        return [Bar("", result.name, result.images_per_second) for result in self.results]

    def __str__(self) -> str:
        blocks = "blocks as by default" if self.block_shards is None else f"blocks of {self.block_shards:,} shards"
        lines = [
            f"{self.shards}: {self.images:,} images, {1000 * self.latency_seconds:g} ms a request, {blocks}, "
            f"batches of {self.batch_size}, {self.threads} threads; {self.hardware}",
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
    folder: Path,
    *,
    latency_seconds: float,
    block_shards: int | None,
    batch_size: int,
    image_size: int,
    threads: int,
    rounds: int,
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
            config = DataConfig(train=location, order="blocks", block_shards=block_shards)
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
        block_shards,
        batch_size,
        image_size,
        threads,
        tuple(results),
        versions=versions(("nvidia-dali-cuda120", "torch", "s3fs", "aiohttp")),
    )


def _dali_itself(shards: ShardSet, bucket: str, image_size: int, threads: int) -> Turn:
    """DALI's reader at the bucket, a few batches in order, decoded and cropped to the centre as validation does."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    @pipeline_def(batch_size=DALI_BATCH_SIZE, num_threads=threads, device_id=None)
    def pipeline() -> Any:
        encoded, _ = fn.readers.webdataset(
            paths=[f"{bucket}/{Path(shards.tars[0]).name}"],
            index_paths=[str(shards.indices[0])],
            ext=[";".join(IMAGE_EXTENSIONS), shards.label_reader.extension],
            case_sensitive_extensions=False,
        )
        return validation_images(encoded, size=image_size, device="cpu", dtype=types.FLOAT)

    started = time.perf_counter()
    made = pipeline()
    made.run()
    first = time.perf_counter()
    for _ in range(DALI_BATCHES):
        made.run()
    return Turn(first - started, DALI_BATCHES * DALI_BATCH_SIZE / (time.perf_counter() - first))
