"""The peers' writers, each as its documentation has it, run by an interpreter that has them installed.

`python -m tools.bench.peer_writers WRITER LIST DST [--workers N] [--resize S --codec pillow|opencv]`; the last line
printed is a JSON object. It imports nothing of this project, so that the interpreter needs nothing but the peer.
"""

import argparse
import csv
import functools
import io
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

Work = Callable[[str], bytes]
Entry = tuple[str, int]

SHARD_SAMPLES = 1000  # what `shards convert` has by default
CHUNK_BYTES = 64 << 20  # MDSWriter's default
IMG2DATASET_THREADS = 16  # a process; its default of 256 is for slow servers


def main() -> None:
    """Writes a data set, and prints the seconds that it took without imports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("writer", choices=WRITERS)
    parser.add_argument("list")
    parser.add_argument("destination")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="decode, and keep the bytes")
    parser.add_argument("--resize", type=int)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--codec", choices=("pillow", "opencv"), default="pillow")
    options = parser.parse_args()
    work = check_with_peer if options.check else read_bytes
    if options.resize:
        shape = {"pillow": shape_with_pillow, "opencv": shape_with_opencv}[options.codec]
        work = functools.partial(shape, resize=options.resize, quality=options.quality)
    write = WRITERS[options.writer]()
    started = time.perf_counter()
    write(read_list(options.list), options.destination, options.workers, work)
    print(json.dumps({"seconds": time.perf_counter() - started}))


def read_list(path: str) -> list[Entry]:
    """Paths and labels of a file with a line `LABEL PATH` for each image."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        pairs = [line.rstrip("\n").split(" ", 1) for line in file]
    return [(name, int(label)) for label, name in pairs]


def read_bytes(path: str) -> bytes:
    """The file as it is."""
    with open(path, "rb") as file:
        return file.read()


def check_with_peer(path: str) -> bytes:
    """The file as it is, once it has been decoded; for the peer that does so itself."""
    raise NotImplementedError(path)


def shape_with_pillow(path: str, *, resize: int, quality: int) -> bytes:
    """The image with its shorter side of that length, as a JPEG."""
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
    """The same with OpenCV, whose antialiasing filter is INTER_AREA."""
    import cv2  # type: ignore[import-not-found]

    cv2.setNumThreads(1)  # there is a process for each core
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    scale = resize / min(image.shape[:2])
    if scale < 1:
        size = (int(image.shape[1] * scale), int(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def _webdataset() -> Callable[[list[Entry], str, int, Work], None]:
    import webdataset  # type: ignore[import-untyped]  # noqa: F401  (imported before the clock starts)

    return lambda entries, destination, workers, work: _spread(_write_webdataset, entries, destination, workers, work)


def _write_webdataset(part: int, entries: Iterable[Entry], destination: str, work: Work) -> None:
    import webdataset

    pattern = os.path.join(destination, f"train-{part:02d}-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=SHARD_SAMPLES, verbose=0) as writer:
        for number, (path, label) in enumerate(entries):
            writer.write({"__key__": f"{part:02d}{number:08d}", "jpg": work(path), "cls": label})


def _mds() -> Callable[[list[Entry], str, int, Work], None]:
    from streaming.base.util import merge_index  # type: ignore[import-not-found]

    def write(entries: list[Entry], destination: str, workers: int, work: Work) -> None:
        _spread(_write_mds, entries, destination, workers, work)
        merge_index(destination, keep_local=True)

    return write


def _write_mds(part: int, entries: Iterable[Entry], destination: str, work: Work) -> None:
    from streaming import MDSWriter  # type: ignore[import-not-found]

    folder = os.path.join(destination, f"{part:02d}")
    with MDSWriter(columns={"image": "bytes", "label": "int"}, out=folder, size_limit=CHUNK_BYTES) as writer:
        for path, label in entries:
            writer.write({"image": work(path), "label": label})


def _litdata() -> Callable[[list[Entry], str, int, Work], None]:
    import litdata  # type: ignore[import-not-found]

    def write(entries: list[Entry], destination: str, workers: int, work: Work) -> None:
        litdata.optimize(
            fn=functools.partial(_litdata_sample, work=work),
            inputs=entries,
            output_dir=destination,
            chunk_bytes=CHUNK_BYTES,
            num_workers=workers,
        )

    return write


def _litdata_sample(entry: Entry, *, work: Work) -> dict[str, Any]:
    path, label = entry
    return {"image": work(path), "label": label}


def _img2dataset() -> Callable[[list[Entry], str, int, Work], None]:
    import img2dataset  # type: ignore[import-not-found]

    def write(entries: list[Entry], destination: str, workers: int, work: Work) -> None:
        table = os.path.join(destination, "images.csv")
        with open(table, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("url", "label"), *((pathlib.Path(path).as_uri(), label) for path, label in entries)])
        shaping: dict[str, Any] = {"disable_all_reencoding": True}
        if work is check_with_peer:
            shaping = {"resize_mode": "no", "skip_reencode": True}
        elif isinstance(work, functools.partial):
            shaping = {
                "resize_mode": "keep_ratio",
                "resize_only_if_bigger": True,
                "image_size": work.keywords["resize"],
                "encode_quality": work.keywords["quality"],
            }
        img2dataset.download(
            table,
            output_folder=os.path.join(destination, "shards"),
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
        reports = [json.loads(report.read_text()) for report in pathlib.Path(destination, "shards").glob("*_stats.json")]
        written = sum(report["successes"] for report in reports)
        if written < len(entries):
            raise RuntimeError(f"img2dataset wrote {written} of {len(entries)} images: {[r['status_dict'] for r in reports]}")

    return write


def _spread(write_part: Callable[..., None], entries: list[Entry], destination: str, workers: int, work: Work) -> None:
    """One writer a process, each with a part of the images."""
    if workers == 1:
        write_part(0, entries, destination, work)
        return
    with multiprocessing.Pool(workers) as pool:
        pool.starmap(write_part, [(part, entries[part::workers], destination, work) for part in range(workers)])


WRITERS = {"webdataset": _webdataset, "mds": _mds, "litdata": _litdata, "img2dataset": _img2dataset}

if __name__ == "__main__":
    main()
