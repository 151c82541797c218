"""`python -m tools.bench.plan` measures the planning of a conversion, with made-up names and without files."""

import re
import time
from array import array
from collections.abc import Sequence
from json import dumps
from pathlib import Path

from pipelines.printable import counted
from tools.bench.command import run_measurement
from tools.shards.parallel import require_positive
from tools.shards.plan import Options, make_plan
from tools.shards.sources.listing import WHOLE_FILE, Extent, Extents, Listing


def measure_plan(*, images: int = 1_281_167, classes: int = 1000, json: bool = False) -> int:
    """Plan a conversion as `shards convert` does: shuffle, shards, the record of the source, the task of each shard.

    The memory is the largest resident set of the process, with interpreter and listing.

    Args:
        images: Number of images; by default ImageNet's.
        classes: Number of classes.
        json: Print one JSON object.
    """
    for option, number in {"images": images, "classes": classes}.items():
        require_positive(option, number)
    extents, labels = Extents("/data/imagenet/train"), array("i")
    names = tuple(f"n{1_000_000 + 7 * i:08d}" for i in range(classes))
    for i in range(images):  # a listing that resembles ImageNet's training set
        label = i * classes // images
        extents.append(Extent(f"{names[label]}/{names[label]}_{i}.JPEG", "", WHOLE_FILE, 50_000 + i * 7919 % 120_000, i))
        labels.append(label)
    listing = Listing("made up", extents, labels, names)
    started = time.perf_counter()
    plan = make_plan(listing, listing.labels, listing.classes, Options())
    plan.describe()
    for number in range(plan.num_shards):
        tuple(plan.samples(number))
    seconds = time.perf_counter() - started
    # `getrusage` would count the memory that the parent had before this program was loaded.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    memory = 1024 * int(found[1]) if found else 0
    if json:
        print(dumps({"images": images, "shards": plan.num_shards, "seconds": seconds, "peak_memory_bytes": memory}))
    else:
        planned = f"{counted(images, 'image')} into {counted(plan.num_shards, 'shard')}: planned in {seconds:.1f} s"
        print(f"{planned}, {memory / 1e6:,.0f} MB in total")
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    run_measurement(measure_plan, "plan", arguments)


if __name__ == "__main__":
    main()
