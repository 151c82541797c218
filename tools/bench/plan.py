"""`throughput plan`: what planning a conversion costs, shown with names that are made up, without files."""

import dataclasses
import json
import re
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

from tools.shards.plan import Options, make_plan
from tools.shards.sources.listing import WHOLE_FILE, Extent, Extents, Listing


@dataclass(frozen=True)
class PlanCost:
    """What was measured; `peak_memory_bytes` is the process's largest resident set, interpreter and listing included."""

    images: int
    shards: int
    seconds: float
    peak_memory_bytes: int

    def as_json(self) -> str:
        """One JSON object with the attributes as keys."""
        return json.dumps(dataclasses.asdict(self))

    def __str__(self) -> str:
        return (
            f"{self.images:,} images into {self.shards:,} shards: planned in {self.seconds:.1f} s, "
            f"{self.peak_memory_bytes / 1e6:,.0f} MB in all"
        )


def measure_plan(images: int, classes: int) -> PlanCost:
    """Plans a conversion as `shards convert` does: shuffle, shards, the record of the source, every shard's task."""
    listing = _made_up(images, classes)
    started = time.perf_counter()
    plan = make_plan(listing, listing.labels, listing.classes, Options())
    plan.describe()
    for number in range(plan.num_shards):
        tuple(plan.samples(number))
    seconds = time.perf_counter() - started
    return PlanCost(images, plan.num_shards, seconds, _peak_memory_bytes())


def _peak_memory_bytes() -> int:
    """`getrusage` counts what the parent had before this program was loaded into its copy."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _made_up(images: int, classes: int) -> Listing:
    """A listing like that of ImageNet's training set."""
    extents, labels = Extents("/data/imagenet/train"), array("i")
    names = tuple(f"n{1_000_000 + 7 * i:08d}" for i in range(classes))
    for i in range(images):
        label = i * classes // images
        name = f"{names[label]}/{names[label]}_{i}.JPEG"
        extents.append(Extent(name, "", WHOLE_FILE, 50_000 + i * 7919 % 120_000, i))
        labels.append(label)
    return Listing("made up", extents, labels, names)
