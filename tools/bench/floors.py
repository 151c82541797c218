"""Work on images in memory, without files, on all cores: what a conversion cannot be faster than.

Run by `throughput convert`, and with `decode` by `throughput compare`: `python -m tools.bench.floors decode|resize LIST`;
the last line printed is a JSON object.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

from tools.bench.peer_writers import read_list
from tools.shards.parallel import num_cpus

BATCH = 16  # images that a process takes at a time, few enough for all to end together

# What the processes, forked, share with the one that started them.
_work: Callable[[Sequence[tuple[str, bytes]]], None]
_images: list[tuple[str, bytes]]
_next: Any
_ready: Any


def main() -> None:
    """Prints the seconds that the work took, the start of the processes left out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=("decode", "resize"))
    parser.add_argument("list")
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--quality", type=int, default=90)
    options = parser.parse_args()
    global _images, _next, _ready
    _images = []
    for path, _ in read_list(options.list):
        with open(path, "rb") as file:
            _images.append((path, file.read()))
    # Forked, not spawned, so that the images are there once. Nothing has started a thread: codecs are imported in the workers.
    context = multiprocessing.get_context("fork")
    _next, _ready = context.Value("q", 0), context.Barrier(num_cpus())
    with concurrent.futures.ProcessPoolExecutor(num_cpus(), context, _prepare, (options,)) as pool:
        spans = [future.result() for future in [pool.submit(_take_part) for _ in range(num_cpus())]]
    seconds = max(end for _, end in spans) - min(start for start, _ in spans)
    print(json.dumps({"seconds": seconds}))


def _prepare(options: argparse.Namespace) -> None:
    global _work
    _work = _decode() if options.work == "decode" else _resize(options.resize, options.quality)
    _work(_images[:1])  # libraries load when they are first needed


def _decode() -> Callable[[Sequence[tuple[str, bytes]]], None]:
    from tools.shards.check import ImageCheck

    check = ImageCheck("decode")

    def work(images: Sequence[tuple[str, bytes]]) -> None:
        check([encoded for _, encoded in images])

    return work


def _resize(resize: int, quality: int) -> Callable[[Sequence[tuple[str, bytes]]], None]:
    from tools.shards.encode import Encoder
    from tools.shards.shape import Shape

    encoder = Encoder(Shape(check="decode", resize=resize, quality=quality))

    def work(images: Sequence[tuple[str, bytes]]) -> None:
        encoder([encoded for _, encoded in images])

    return work


def _take_part() -> tuple[float, float]:
    """Works until nothing is left; when it began and ended, on the clock that all processes share."""
    _ready.wait()
    started = time.perf_counter()
    while True:
        with _next:
            first = _next.value
            _next.value += BATCH
        if first >= len(_images):
            return started, time.perf_counter()
        _work(_images[first : first + BATCH])


if __name__ == "__main__":
    main()
