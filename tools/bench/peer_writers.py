"""The writers of the peers, each as its documentation shows, for an interpreter that has the peers and nothing else.

`python -m tools.bench.peer_writers WRITER LIST DST [--workers N] [--resize S --codec pillow|opencv]`; the last line of output
is a JSON object.
"""

import argparse
import collections
import csv
import functools
import importlib
import io
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tools.throughput.peer_loaders import Entry, Work, read_bytes, write_litdata, write_mds
from tools.throughput.turn import read_list

SHARD_SAMPLES = 1000  # the default of `shards convert`
IMG2DATASET_THREADS = 16  # per process; the default of 256 is for slow servers


def main() -> None:
    """Writes a data set, and prints the seconds that it took without imports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("writer", choices=WRITERS)
    parser.add_argument("list")
    parser.add_argument("destination")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="decode the images, and keep their bytes")
    parser.add_argument("--resize", type=int)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--codec", choices=("pillow", "opencv"), default="pillow")
    options = parser.parse_args()
    work: Work = check_with_peer if options.check else read_bytes
    if options.resize:
        shape = {"pillow": shape_with_pillow, "opencv": shape_with_opencv}[options.codec]
        work = functools.partial(shape, resize=options.resize, quality=options.quality)
    importlib.import_module(MODULES.get(options.writer, options.writer))
    started = time.perf_counter()
    WRITERS[options.writer](read_list(options.list), options.destination, options.workers, work)
    print(json.dumps({"seconds": time.perf_counter() - started}))


def check_with_peer(path: str) -> bytes:
    """Marks work that the peer does itself: to decode the file and keep its bytes."""
    raise NotImplementedError(path)


def shape_with_pillow(path: str, *, resize: int, quality: int) -> bytes:
    """Returns the image as a JPEG with a shorter side of `resize` pixels."""
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = resize / min(image.size)
    if scale < 1:
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def shape_with_opencv(path: str, *, resize: int, quality: int) -> bytes:
    """Does the same with OpenCV, whose antialiasing filter is INTER_AREA."""
    import cv2  # type: ignore[import-not-found]

    cv2.setNumThreads(1)  # there is a process for each core
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    scale = resize / min(image.shape[:2])
    if scale < 1:
        size = (int(image.shape[1] * scale), int(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def webdataset(entries: list[Entry], destination: str, workers: int, work: Work) -> None:
    _spread(_write_webdataset, entries, destination, workers, work)


def _write_webdataset(part: int, entries: Iterable[Entry], destination: str, work: Work) -> None:
    import webdataset  # type: ignore[import-untyped]

    with webdataset.ShardWriter(f"{destination}/train-{part:02d}-%06d.tar", maxcount=SHARD_SAMPLES, verbose=0) as writer:
        for number, (path, label) in enumerate(entries):
            writer.write({"__key__": f"{part:02d}{number:08d}", "jpg": work(path), "cls": label})


def mds(entries: list[Entry], destination: str, workers: int, work: Work) -> None:
    from streaming.base.util import merge_index

    _spread(_write_mds, entries, destination, workers, work)
    merge_index(destination, keep_local=True)


def _write_mds(part: int, entries: Iterable[Entry], destination: str, work: Work) -> None:
    write_mds(entries, f"{destination}/{part:02d}", work)


def img2dataset(entries: list[Entry], destination: str, workers: int, work: Work) -> None:
    import img2dataset  # type: ignore[import-not-found]

    table, shards = Path(destination, "images.csv"), Path(destination, "shards")
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "label"), *((Path(path).as_uri(), label) for path, label in entries)])
    shaping: dict[str, Any] = {"disable_all_reencoding": True}
    if work is check_with_peer:
        shaping = {"resize_mode": "no", "skip_reencode": True}
    elif isinstance(work, functools.partial):
        shaping = {"resize_mode": "keep_ratio", "resize_only_if_bigger": True}
        shaping |= {"image_size": work.keywords["resize"], "encode_quality": work.keywords["quality"]}
    img2dataset.download(
        str(table),
        output_folder=str(shards),
        input_format="csv",
        caption_col="label",
        output_format="webdataset",
        number_sample_per_shard=SHARD_SAMPLES,
        processes_count=workers,
        thread_count=IMG2DATASET_THREADS,
        extract_exif=False,
        compute_hash=None,
        **shaping,
    )
    # It reports failed images in files, and never in its exit status.
    reports = [json.loads(report.read_text()) for report in shards.glob("*_stats.json")]
    written = sum(report["successes"] for report in reports)
    if written < len(entries):
        statuses = sum((collections.Counter(report["status_dict"]) for report in reports), collections.Counter[str]())
        counts = ", ".join(f"{count} {status}" for status, count in statuses.items())
        raise RuntimeError(f"img2dataset wrote {written} of {len(entries)} images: {counts}")


def _spread(write_part: Callable[..., None], entries: list[Entry], destination: str, workers: int, work: Work) -> None:
    """Runs one writer per process, each with a part of the images."""
    if workers == 1:
        write_part(0, entries, destination, work)
        return
    with multiprocessing.Pool(workers) as pool:
        pool.starmap(write_part, [(part, entries[part::workers], destination, work) for part in range(workers)])


WRITERS: dict[str, Callable[[list[Entry], str, int, Work], None]] = {
    "webdataset": webdataset,
    "mds": mds,
    "litdata": write_litdata,
    "img2dataset": img2dataset,
}
MODULES = {"mds": "streaming.base.util"}  # that a writer imports, if its name differs

if __name__ == "__main__":
    main()
