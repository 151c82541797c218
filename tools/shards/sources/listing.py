"""What a source is: where each image's bytes lie, and which class it is of."""

import contextlib
import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pipelines.shards.shard_set import IMAGE_EXTENSIONS

WHOLE_FILE = -1
MAX_CLASSES = 1_000_000  # a number beyond is a mistake, and so many names would fill the memory


class Extent(NamedTuple):
    """An image as a run of bytes in a file.

    Attributes:
        name: What people call it: its path in the source.
        path: The file that holds it.
        offset: Of its first byte in that file, or `WHOLE_FILE`.
        size: Bytes.
        modified: Time of the file's last change, ns since 1970; 0 where it does not matter.
    """

    name: str
    path: str
    offset: int
    size: int
    modified: int


class Extents:
    """A list of extents in columns, since a data set has millions: some 150 bytes each, names included.

    Args:
        root: The folder in which a `WHOLE_FILE` lies under its name; its path is not kept.
        unpacked: The files are not the source's but made from it, so that their times say nothing.
    """

    def __init__(self, root: str = "", unpacked: bool = False) -> None:
        self.root, self._unpacked = root, unpacked
        self.names: list[str] = []
        self._paths: list[str] = []
        self.offsets = array("q")
        self.sizes = array("q")
        self.modified = array("q")  # of the source's files; see `Extent`

    def append(self, extent: Extent) -> None:
        self.names.append(extent.name)
        self._paths.append("" if extent.offset == WHOLE_FILE else extent.path)
        self.offsets.append(extent.offset)
        self.sizes.append(extent.size)
        self.modified.append(extent.modified)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Extent:
        path = self._paths[i] or f"{self.root}/{self.names[i]}"
        return Extent(self.names[i], path, self.offsets[i], self.sizes[i], 0 if self._unpacked else self.modified[i])


@dataclass
class Listing:
    """All images of a source with their classes, in an order that depends on nothing but the source.

    Attributes:
        location: What the user called the source.
        extents: Where the images are.
        labels: The class of each, a place in `classes`.
        classes: Class names.
        numbered: The source has class numbers only, and `classes` are those numbers.
        left_out: Name and reason of what can be no sample.
        notes: What the user should know.
    """

    location: str
    extents: Extents
    labels: "array[int]"
    classes: tuple[str, ...]
    numbered: bool = False
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> tuple[str, bytearray]:
        """What tells one state of the source from another.

        Returns:
            SHA-256 over names, sizes and classes, not times, so that a copy of a source has the same; and a table with a line
            an image of size, class, name and time.
        """
        digest, table = hashlib.sha256(), bytearray()
        extents = self.extents
        for name, size, modified, label in zip(extents.names, extents.sizes, extents.modified, self.labels, strict=True):
            fields = (field.replace("\t", "\\t").replace("\n", "\\n") for field in (self.classes[label], name))
            line = "\t".join((str(size), *fields)).encode("utf-8", "surrogateescape")
            digest.update(line)
            digest.update(b"\n")
            table += line + b"\t%d\n" % modified
        return digest.hexdigest(), table


class Source(Protocol):
    """A kind of image collection."""

    def listing(self) -> Listing:
        """All of its images.

        Raises:
            ValueError: The collection cannot be used as it is; says what to change.
        """


# Those that training reads first; the others are encoded anew.
ALL_EXTENSIONS = (*IMAGE_EXTENSIONS, "gif", "avif", "jpe", "jfif", "tga", "ico")


def is_image_name(name: str) -> bool:
    """Whether a file's extension is one of images, such as training cannot read included."""
    return name.rpartition(".")[2].lower() in ALL_EXTENSIONS


def named_classes(location: str, extents: Extents, class_names: Sequence[str]) -> Listing:
    """A listing from the name of each image's class; classes are numbered in sorted order."""
    classes = tuple(sorted(set(class_names)))
    numbers = {name: number for number, name in enumerate(classes)}
    return Listing(location, extents, array("i", [numbers[name] for name in class_names]), classes)


def labelled(location: str, extents: Extents, labels: Sequence[str], names: Sequence[str] | None = None) -> Listing:
    """A listing from labels that are class numbers or class names.

    Numbers stay what they are, with `names` to go with them where the source has some.

    Raises:
        ValueError: A label is neither one of the names nor a number that can be a class's; says whose.
    """
    places = {name: place for place, name in enumerate(names or ())}
    if not labels or all(label in places for label in labels):
        return Listing(location, extents, array("i", [places[label] for label in labels]), tuple(names or ()))
    any_number = any(map(str.isdecimal, labels))
    for i, label in enumerate(labels):
        number_like = re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", label) is not None
        good = label.isascii() and label.isdecimal() and int(label) < (len(names) if names else MAX_CLASSES)
        if not good and (names or (any_number and number_like)):
            kind = f"a class number below {len(names) if names else MAX_CLASSES:,}" + (
                " or one of the class names" if names else ""
            )
            raise ValueError(f"{location}: the label of {extents.names[i]} is {label!r}; {kind} is needed")
    if not all(map(str.isdecimal, labels)):
        return named_classes(location, extents, labels)
    numbers = array("i", map(int, labels))
    if names:
        return Listing(location, extents, numbers, tuple(names))
    return Listing(location, extents, numbers, tuple(str(i) for i in range(max(numbers) + 1)), numbered=True)


def read_bytes(extent: Extent) -> bytes:
    """The bytes of an image; raises what `read_into` does."""
    with _opened(extent) as descriptor:
        begin = max(extent.offset, 0)
        data = os.pread(descriptor, extent.size, begin)
        while len(data) < extent.size and (more := os.pread(descriptor, extent.size - len(data), begin + len(data))):
            data += more
    _require_all(extent, len(data))
    return data


def read_into(extent: Extent, buffer: memoryview) -> None:
    """Reads the bytes of an image.

    Args:
        extent: Where they are.
        buffer: `extent.size` bytes of room.

    Raises:
        ValueError: The file has changed since it was listed.
        OSError: It cannot be read.
    """
    with _opened(extent) as descriptor:
        done, begin = 0, max(extent.offset, 0)
        # A read of the kernel may end early: at 2 GiB, and at signals on some file systems.
        while done < extent.size and (count := os.preadv(descriptor, [buffer[done:]], begin + done)):
            done += count
    _require_all(extent, done)


@contextlib.contextmanager
def _opened(extent: Extent) -> Iterator[int]:
    descriptor = os.open(extent.path, os.O_RDONLY)
    try:
        yield descriptor
        status = os.fstat(descriptor)
    except OSError as error:  # a read does not say of what
        raise type(error)(error.errno, error.strerror, extent.path) from error
    finally:
        os.close(descriptor)
    if (extent.offset == WHOLE_FILE and status.st_size != extent.size) or extent.modified not in (0, status.st_mtime_ns):
        raise ValueError(f"{extent.path}: changed while it was converted; convert anew")


def _require_all(extent: Extent, num_bytes: int) -> None:
    if num_bytes < extent.size:
        raise ValueError(f"{extent.path}: changed while it was converted; it ends within {extent.name}")
