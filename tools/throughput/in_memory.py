"""Decoding, or resizing, of images in memory on all cores: the upper bound of a conversion's speed.

`python -m tools.throughput.in_memory decode|resize LIST`; the last line of output is a JSON object.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.machine import num_cpus
from tools.throughput.turn import read_list

BATCH = 16  # images that a process takes at a time, few enough for all processes to end together

# The processes are forked, so they share the images with their parent.
_images: list[bytes]
_work: Callable[[Sequence[bytes]], Any]


def main() -> None:
    """Prints the number of images and the seconds of the work, without the start of the processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=("decode", "resize"))
    parser.add_argument("list")
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--quality", type=int, default=90)
    options = parser.parse_args()
    global _images
    _images = [Path(path).read_bytes() for path, _ in read_list(options.list)]
    # Forked, not spawned, to hold the images once. No thread runs yet, because only the workers import codecs.
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(num_cpus() + 1)
    with context.Pool(num_cpus(), _prepare, (options, ready)) as pool:
        ready.wait()
        started = time.perf_counter()
        pool.map(_process, range(0, len(_images), BATCH), chunksize=1)
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "images": len(_images)}))


def _prepare(options: argparse.Namespace, ready: Any) -> None:
    from tools.shards.check import ImageCheck
    from tools.shards.encode import Encoder
    from tools.shards.shape import Shape

    global _work
    shape = Shape(check="decode", resize=options.resize, quality=options.quality)
    _work = ImageCheck("decode") if options.work == "decode" else Encoder(shape)
    list(_work(_images[:1]))  # libraries load on first use
    ready.wait()


def _process(first: int) -> None:
    list(_work(_images[first : first + BATCH]))  # the checks are made as they are asked for


if __name__ == "__main__":
    main()
