"""The plan of a conversion: which image goes into which shard, decided before the first byte is written."""

import importlib.metadata
import random
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.shards.shape import Shape
from tools.shards.sources.listing import Extent, Listing
from tools.shards.write import member_bytes

END_BYTES = 10240  # a tar's end mark, rounded up to a record, at most


@dataclass(frozen=True)
class Options:
    """What decides the bytes that a conversion writes; nothing else does.

    Attributes:
        name: Of the split.
        seed: Of the shuffle.
        shard_samples: Samples planned for a shard; 1000 where neither this nor `shard_bytes` is given.
        shard_bytes: Largest size of a shard with all images as they are in the source, headers included.
        shape: How images are checked and shaped.

    Raises:
        ValueError: An option is out of its range; names it as the command line does.
    """

    name: str = "train"
    seed: int = 0
    shard_samples: int | None = None
    shard_bytes: int | None = None
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", self.name):
            raise ValueError(f"--name {self.name!r}: letters, digits and underscores are allowed")
        if self.shard_samples is not None and self.shard_bytes is not None:
            raise ValueError("--shard-samples and --shard-bytes are two ways to say the same; give one")
        for option, value in (
            ("samples", self.shard_samples),
            ("bytes", self.shard_bytes),
        ):
            if value is not None and value < 1:
                raise ValueError(f"--shard-{option} {value}: at least 1 is needed")
        if self.shape.resize is not None and self.shape.resize < 1:
            raise ValueError(f"--resize {self.shape.resize}: at least 1 pixel is needed")
        if not 1 <= self.shape.quality <= 100:
            raise ValueError(f"--quality {self.shape.quality}: 1 to 100 is the range")

    def record(self) -> dict[str, Any]:
        """The options as they are kept beside the shards, without the name."""
        shard_samples = self.shard_samples
        if shard_samples is None and self.shard_bytes is None:
            shard_samples = DEFAULT_SHARD_SAMPLES
        # Another version may encode to other bytes, and GIFs are encoded in any case.
        encoder = f"Pillow {importlib.metadata.version('pillow')}"
        sizes = {"shard_samples": shard_samples, "shard_bytes": self.shard_bytes}
        return {"seed": self.seed, **sizes, **asdict(self.shape), "encoder": encoder}


DEFAULT_SHARD_SAMPLES = 1000


@dataclass(frozen=True)
class Plan:
    """All shards of a split.

    Attributes:
        listing: The source.
        labels: Of each image of the listing, a place in `classes`.
        classes: The class names of the data set.
        options: What the user asked for.
        order: Places in the listing, in the order of the samples.
        bounds: Where in `order` each shard begins, and where the last ends.
    """

    listing: Listing
    labels: Sequence[int]
    classes: tuple[str, ...]
    options: Options
    order: "array[int]"
    bounds: tuple[int, ...]

    @property
    def num_shards(self) -> int:
        return len(self.bounds) - 1

    def shard_name(self, number: int) -> str:
        """The file name of a shard."""
        return f"{self.options.name}-{number:06d}.tar"

    def samples(self, number: int) -> Iterator[tuple[str, Extent, int]]:
        """Key, image and label of each sample of a shard."""
        for position in range(self.bounds[number], self.bounds[number + 1]):
            place = self.order[position]
            extent = self.listing.extents[place]
            yield sample_key(position, extent.name), extent, self.labels[place]

    def planned_bytes(self, number: int) -> int:
        """The size of a shard with all its images as they are in the source, at most."""
        sizes = self.listing.extents.sizes
        places = self.order[self.bounds[number] : self.bounds[number + 1]]
        return sum(_sample_bytes(sizes[place]) for place in places) + END_BYTES

    def describe(self) -> tuple[dict[str, Any], bytearray]:
        """What the split is made from and how, for `_info.json`; and the source's table, see `Listing.describe`."""
        digest, table = self.listing.describe()
        return {**self.options.record(), "source": {"images": len(self.listing.extents), "sha256": digest}}, table


def parse_bytes(text: str) -> int:
    """A size as people write it: 256MB (of 1000), 256MiB (of 1024), or bytes.

    Raises:
        ValueError: It is not written so.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMG]?)(i?)B?", text.strip())
    if not found:
        raise ValueError(f"--shard-bytes {text!r}: a size as 256MB or 1GiB is needed")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMG".index(prefix.upper() or " "))


def make_plan(listing: Listing, labels: Sequence[int], classes: tuple[str, ...], options: Options) -> Plan:
    """Shuffles the images over the whole set and parts them into shards."""
    places = list(range(len(listing.extents)))
    random.Random(options.seed).shuffle(places)
    order = array("q", places)
    if options.shard_bytes is not None:
        bounds = _bounds_by_bytes(listing.extents.sizes, order, options.shard_bytes)
    else:
        samples = options.shard_samples or DEFAULT_SHARD_SAMPLES
        bounds = [*range(0, len(order), samples), len(order)]
    return Plan(listing, labels, classes, options, order, tuple(bounds))


def _bounds_by_bytes(sizes: Sequence[int], order: Sequence[int], shard_bytes: int) -> list[int]:
    bounds, used = [0], END_BYTES
    for position, place in enumerate(order):
        size = _sample_bytes(sizes[place])
        if used + size > shard_bytes and position > bounds[-1]:
            bounds.append(position)
            used = END_BYTES
        used += size
    return [*bounds, len(order)]


def _sample_bytes(image_bytes: int) -> int:
    return member_bytes(image_bytes) + member_bytes(1)  # a label's digits take one block


KEY_LENGTH = 80  # USTAR holds names of up to 100 bytes in one header block


def sample_key(position: int, name: str) -> str:
    """The sample's place for uniqueness and its origin for people, without dots, blanks or slashes."""
    stem = name[: name.rfind(".")] if "." in name.rpartition("/")[2] else name
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", stem)
    return f"{position:08d}_{readable}"[:KEY_LENGTH]
