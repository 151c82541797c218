"""`python -m tools.bench.remote SHARDS` compares training from a bucket with training from the disk."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from model.config import MAX_IMAGE_SIZE, at_most
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.dali.cpu_finish import resized
from pipelines.dali.cpu_resize import CenterCropResize
from pipelines.dali.operators import Preprocessing, validation_images
from pipelines.loader import resize_shorter_for
from pipelines.printable import counted
from pipelines.remote.object_store import is_url
from pipelines.shards.members import IMAGE_EXTENSIONS
from pipelines.shards.shard_set import ShardSet, open_shards
from tools.bench.bucket import serve
from tools.bench.command import check_json, check_latency, run_measurement
from tools.run.config import MOST_THREADS
from tools.shards.parallel import require_positive
from tools.shards.sources.folders import require_folder
from tools.throughput.hardware import DALI_PACKAGES, versions
from tools.throughput.report import RATE, RATIO, Column, Report, Row, Table
from tools.throughput.rounds import Turn, take_turns

DALI_BATCH_SIZE = 8  # DALI's own reader is so slow that a few samples suffice
DALI_BATCHES = 4
LOCAL, COPIED, DIRECT = "local disk", "bucket, shards copied ahead", "bucket, DALI's own reader"
COLUMNS = (RATE, RATIO, Column("first_seconds", "first batch s", ",.1f"))


def remote(
    shards: tyro.conf.Positional[str],
    /,
    *,
    latency: float = 30.0,
    block_shards: int | None = None,
    batch_size: int = 64,
    image_size: int = 224,
    threads: int = 2,
    rounds: int = 5,
    json: Path | None = None,
) -> int:
    """Compare training from a bucket with training from the disk, one epoch per turn.

    This machine serves the folder as a bucket, with a latency for each request like a distant object store.

    Args:
        shards: Folder of shards with a training split, as `shards convert` writes it.
        latency: Milliseconds until the bucket answers a request.
        block_shards: As --data.block-shards. A small data set has several blocks only if this is small.
        batch_size: Images per batch.
        image_size: Image side, in pixels.
        threads: CPU threads that decode.
        rounds: Turns of each competitor.
        json: File for all figures.
    """
    settings = {**locals(), "latency_seconds": latency / 1000}
    _check(settings)
    opened = open_shards(shards, "train")
    tars = [Path(tar).name for tar in opened.tars]
    names = f"{{{','.join(tars)}}}" if len(tars) > 1 else tars[0]
    device = torch.device("cpu")
    spec = LoaderSpec(split="train", batch_size=batch_size, image_size=image_size, device=device, num_threads=threads)
    with serve(Path(shards), latency / 1000) as bucket:

        def epoch(location: str) -> Turn:
            config = DataConfig(train=location, order="blocks", block_shards=block_shards)
            started = time.perf_counter()
            with build_loader(config, spec) as loader:
                loader.next()
                first = time.perf_counter()
                images = sum(len(batch["target"]) for batch in iter(loader.next, None))
                seconds = time.perf_counter() - first
            return {"first_seconds": first - started, "images_per_second": images / seconds}

        competitors: dict[str, Callable[[], Turn]] = {
            LOCAL: lambda: epoch(shards),
            COPIED: lambda: epoch(f"{bucket}/{names}"),
            DIRECT: lambda: _dali_reader(opened, bucket, image_size, threads),
        }
        outcomes = take_turns(competitors, rounds)
    rows = [Row.of(name, outcome, COLUMNS, outcomes[LOCAL], name=name) for name, outcome in outcomes.items()]
    Report(
        heading=f"{shards}: {counted(opened.num_samples, 'image')}, {latency:g} ms per request, "
        f"{block_shards or 'default'} shards per block, batches of {batch_size}, {counted(threads, 'thread')}",
        tables=[Table("", COLUMNS, rows)],
        settings={**settings, "images": opened.num_samples},
        versions=versions(*DALI_PACKAGES, "torch", "s3fs", "aiohttp"),
    ).publish(json)
    return 0


def _check(settings: dict[str, Any]) -> None:
    for option in ("block_shards", "batch_size", "image_size", "threads", "rounds"):
        require_positive(option.replace("_", "-"), settings[option])
    at_most("--threads", settings["threads"], MOST_THREADS)
    at_most("--image-size", settings["image_size"], MAX_IMAGE_SIZE)
    check_latency(settings["latency"])
    check_json(settings["json"])
    if is_url(settings["shards"]):
        raise ValueError(f"{settings['shards']}: a local folder is needed; this machine serves it as a bucket")
    require_folder(Path(settings["shards"]))


def _dali_reader(shards: ShardSet, bucket: str, image_size: int, threads: int) -> Turn:
    """Reads a few batches from the bucket in order with DALI's reader, and decodes them as validation does."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    resize = CenterCropResize(size=image_size, resize_shorter=resize_shorter_for(image_size))

    @pipeline_def(batch_size=DALI_BATCH_SIZE, num_threads=threads, device_id=None)
    def pipeline() -> Any:
        encoded, _ = fn.readers.webdataset(
            paths=[f"{bucket}/{Path(shards.tars[0]).name}"],
            index_paths=[str(shards.indices[0])],
            ext=[";".join(IMAGE_EXTENSIONS), shards.label_reader.extension],
            case_sensitive_extensions=False,
        )
        options = {"size": image_size, "dtype": types.FLOAT, "resize": resize}
        return validation_images(encoded, Preprocessing(), **options)

    started = time.perf_counter()
    built = pipeline()
    batches = ([*resized(resize, built.run())] for _ in range(1 + DALI_BATCHES))
    next(batches)
    first = time.perf_counter()
    for _ in batches:
        pass
    images = DALI_BATCHES * DALI_BATCH_SIZE
    return {"first_seconds": first - started, "images_per_second": images / (time.perf_counter() - first)}


def main(arguments: Sequence[str] | None = None) -> None:
    run_measurement(remote, "remote", arguments)


if __name__ == "__main__":
    main()
