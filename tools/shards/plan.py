"""The plan of a conversion: it assigns each image to a shard before the first byte is written."""

import importlib.metadata
import random
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.bad_samples.limits import MAX_PIXELS, check_max_pixels
from tools.shards.parallel import require_positive
from tools.shards.shape import Shape
from tools.shards.sources.listing import Extent, Listing
from tools.shards.write import member_bytes

DEFAULT_SHARD_SAMPLES = 1000
END_BYTES = 10240  # upper bound of a tar's end mark, which is rounded up to a record
KEY_LENGTH = 80  # a USTAR header block holds names of up to 100 bytes


@dataclass(frozen=True)
class Options:
    """The options of `shards convert` that determine the bytes of a conversion. No other option does.

    Raises:
        ValueError: An option is out of range.
    """

    name: str = "train"
    seed: int = 0
    shard_samples: int | None = None
    shard_bytes: int | None = None
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", self.name):
            raise ValueError(
                f"--name {self.name!r}: letters, digits and underscores are allowed, and no underscore at the start"
            )
        if self.shard_samples is not None and self.shard_bytes is not None:
            raise ValueError("--shard-samples and --shard-bytes exclude each other; give one")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: at least 0 is needed")
        require_positive("shard-samples", self.shard_samples)
        require_positive("shard-bytes", self.shard_bytes)
        require_positive("resize", self.shape.resize)
        check_max_pixels(self.shape.max_pixels)
        if not 1 <= self.shape.quality <= 100:
            raise ValueError(f"--quality {self.shape.quality}: 1 to 100 is the range")

    def record(self) -> dict[str, Any]:
        """Returns the options as `_info.json` keeps them, without the name."""
        shard_samples = self.shard_samples
        if shard_samples is None and self.shard_bytes is None:
            shard_samples = DEFAULT_SHARD_SAMPLES
        # Another version may encode to other bytes, and GIFs are always encoded.
        encoder = f"Pillow {importlib.metadata.version('pillow')}"
        sizes = {"shard_samples": shard_samples, "shard_bytes": self.shard_bytes}
        shape = asdict(self.shape)
        if self.shape.max_pixels == MAX_PIXELS:  # conversions of earlier versions did not record it
            del shape["max_pixels"]
        return {"seed": self.seed, **sizes, **shape, "encoder": encoder}


@dataclass(frozen=True)
class Plan:
    """All shards of a split.

    Attributes:
        listing: The images of the source.
        labels: Index into `classes` of each image of the listing.
        classes: Class names of the data set.
        options: The options of the conversion.
        order: Indices into the listing, in the order of the samples.
        bounds: Start of each shard in `order`, followed by the end of the last shard.
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
        """Returns the file name of a shard."""
        return f"{self.options.name}-{number:06d}.tar"

    def shard_length(self, number: int) -> int:
        """Returns the number of images that are planned for a shard."""
        return self.bounds[number + 1] - self.bounds[number]

    def samples(self, number: int) -> Iterator[tuple[str, Extent, int]]:
        """Yields key, image and label of each sample of a shard."""
        for position in range(self.bounds[number], self.bounds[number + 1]):
            place = self.order[position]
            extent = self.listing.extents[place]
            yield sample_key(position, extent.name), extent, self.labels[place]

    def planned_bytes(self, number: int) -> int:
        """Returns an upper bound of the size of a shard if all its images are copied unchanged."""
        sizes = self.listing.extents.sizes
        places = self.order[self.bounds[number] : self.bounds[number + 1]]
        return sum(_sample_bytes(sizes[place]) for place in places) + END_BYTES

    def describe(self) -> tuple[dict[str, Any], bytearray]:
        """Returns the record of options and source for `_info.json`, and the table of `Listing.describe`."""
        digest, table = self.listing.describe()
        return {**self.options.record(), "source": {"images": len(self.listing.extents), "sha256": digest}}, table


def parse_bytes(text: str) -> int:
    """Parses a size: a number of bytes, or a number with a unit: 256MB (powers of 1000), 256MiB (powers of 1024).

    Raises:
        ValueError: The text is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMG]?)(i?)B?", text.strip())
    if not found:
        raise ValueError(f"--shard-bytes {text!r}: a size such as 256MB or 1GiB is needed")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMG".index(prefix.upper() or " "))


def make_plan(listing: Listing, labels: Sequence[int], classes: tuple[str, ...], options: Options) -> Plan:
    """Shuffles the images over the whole set and divides them into shards."""
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
    return member_bytes(image_bytes) + member_bytes(1)  # the digits of a label take one block


def sample_key(position: int, name: str) -> str:
    """Returns a key without dots, blanks and slashes. The position makes it unique, and the name shows its origin."""
    stem = name[: name.rfind(".")] if "." in name.rpartition("/")[2] else name
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", stem)
    return f"{position:08d}_{readable}"[:KEY_LENGTH]
