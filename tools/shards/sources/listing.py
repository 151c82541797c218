"""The list of a source's images: the location of their bytes, and their classes."""

import hashlib
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipelines.printable import printable
from pipelines.shards.labels import no_class_zero
from pipelines.shards.members import IMAGE_EXTENSIONS

WHOLE_FILE = -1
MAX_CLASSES = 1_000_000  # a larger class number is a mistake, and as many names would fill the memory
# The formats that training reads come first. The others are re-encoded.
ALL_EXTENSIONS = (*IMAGE_EXTENSIONS, "gif", "avif", "jpe", "jfif", "tga", "ico")
# What systems add to a folder: file servers (Synology, QNAP, NetApp), file systems, Windows, and zip files of macOS.
# Names that begin with a dot are not in the list: .git, .Trash-1000, .ipynb_checkpoints, .DS_Store, ._x.jpg.
SYSTEM_NAMES = frozenset(
    (
        *("@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot"),
        *("lost+found", "found.000", "$recycle.bin", "system volume information", "__macosx", "__pycache__"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)
# First bytes of JPEG, PNG, GIF, BMP, TIFF and BigTIFF, JPEG 2000 (file and code stream), PNM, and icons.
SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"\0\0\1\0"),
)


class Extent(NamedTuple):
    """An image as a range of bytes in a file.

    Attributes:
        name: Path of the image in the source, for messages.
        path: The file that holds it.
        offset: Offset of its first byte in the file, or `WHOLE_FILE`.
        size: Size in bytes.
        modified: Modification time of the file, in ns since 1970, or 0 if it is irrelevant.
    """

    name: str
    path: str
    offset: int
    size: int
    modified: int


class Extents:
    """A list of extents, stored in columns to save memory: data sets have millions, and each takes about 150 bytes.

    Args:
        root: Folder of the files whose offset is `WHOLE_FILE`. Their paths are not stored.
        unpacked: Whether the files were unpacked from the source. Their modification times are irrelevant then.
    """

    def __init__(self, root: str = "", unpacked: bool = False) -> None:
        self.root, self._unpacked = root, unpacked
        self.names: list[str] = []
        self._paths: list[str] = []
        self.offsets = array("q")
        self.sizes = array("q")
        self.modified = array("q")  # of the files of the source, even if unpacked

    def append(self, extent: Extent) -> None:
        self.names.append(extent.name)
        self._paths.append("" if extent.offset == WHOLE_FILE else extent.path)
        self.offsets.append(extent.offset)
        self.sizes.append(extent.size)
        self.modified.append(extent.modified)

    def cut(self, length: int) -> None:
        """Removes the extents from place `length` on."""
        for column in (self.names, self._paths, self.offsets, self.sizes, self.modified):
            del column[length:]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Extent:
        path = self._paths[i] or f"{self.root}/{self.names[i]}"
        return Extent(self.names[i], path, self.offsets[i], self.sizes[i], 0 if self._unpacked else self.modified[i])


@dataclass
class Listing:
    """All images of a source with their classes, in an order that depends on the source only.

    Attributes:
        location: The source as the user named it.
        extents: The images.
        labels: Index into `classes` of each image.
        classes: Class names.
        numbered: The source has only class numbers, and `classes` are these numbers.
        left_out: Name and reason of images that cannot become samples.
        notes: Warnings for the user.
    """

    location: str
    extents: Extents
    labels: "array[int]"
    classes: tuple[str, ...]
    numbered: bool = False
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> tuple[str, bytearray]:
        """Describes the state of the source.

        Returns:
            SHA-256 of names, sizes and classes. It is independent of times, so copies of a source share it.
            A table with size, class, name and time of each image, one per line.
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


def is_system_name(name: str) -> bool:
    """Returns whether a file or a folder of this name belongs to a system or a tool, so that nothing in it is a sample.

    Args:
        name: One part of a path, not a path.
    """
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_image_name(name: str) -> bool:
    """Returns whether a file name has the extension of an image, including formats that training cannot read."""
    return name.rpartition(".")[2].lower() in ALL_EXTENSIONS


def begins_like_image(extent: Extent) -> bool:
    """Returns whether the first bytes are those of a common image format, or are unknown because they cannot be read."""
    try:
        with open(extent.path, "rb") as file:
            file.seek(max(extent.offset, 0))
            begin = file.read(min(extent.size, 16))
    except OSError:
        return True
    return begin.startswith(SIGNATURES) or begin[4:8] == b"ftyp" or (begin[:4] == b"RIFF" and begin[8:12] == b"WEBP")


def require_images(location: str, extents: Extents, left_out: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError if there is no image. `left_out` has name and reason of those that cannot be used."""
    if not len(extents):
        found = f"; {printable(left_out[0][0])}: {left_out[0][1]}" if left_out else ""
        raise ValueError(f"{location}: no file in it has the extension of an image{found}")


def named_classes(location: str, extents: Extents, class_names: Sequence[str]) -> Listing:
    """Makes a listing from the class name of each image. Classes are numbered in sorted order."""
    classes = tuple(sorted(set(class_names)))
    numbers = {name: number for number, name in enumerate(classes)}
    return Listing(location, extents, array("i", [numbers[name] for name in class_names]), classes)


def labelled(location: str, extents: Extents, labels: Sequence[str], names: Sequence[str] | None = None) -> Listing:
    """Makes a listing from labels that are class numbers or class names.

    Numbers are kept. They index `names` if the source has class names.

    Raises:
        ValueError: A label is neither one of the names nor a valid class number.
    """
    places = {name: place for place, name in enumerate(names or ())}
    if all(label in places for label in labels):
        return Listing(location, extents, array("i", [places[label] for label in labels]), tuple(names or ()))
    limit = len(names) if names else MAX_CLASSES
    for i, label in enumerate(labels):
        good = label.isascii() and label.isdecimal() and int(label) < limit
        if not good and (names or label.isdecimal()):
            needed = f"a class number below {limit:,}{' or one of the class names' if names else ''}"
            raise ValueError(f"{location}: the label of {extents.names[i]} is {label!r}; {needed} is needed")
    if not all(map(str.isdecimal, labels)):
        listing = named_classes(location, extents, labels)
        if any(map(str.isdecimal, labels)):
            number, name = (next(label for label in labels if label.isdecimal() is kind) for kind in (True, False))
            listing.notes.append(
                f"some labels are numbers, such as {number!r}, and some are not, such as {name!r}, so all are class names, and "
                "classes are numbered in the order of these names"
            )
        return listing
    numbers = array("i", map(int, labels))
    if names:
        return Listing(location, extents, numbers, tuple(names))
    listing = Listing(location, extents, numbers, tuple(str(i) for i in range(max(numbers) + 1)), numbered=True)
    if note := no_class_zero(set(numbers)):
        listing.notes.append(note)
    return listing


def read_bytes(extent: Extent) -> bytes:
    """Reads an image, with the errors of `read_into`."""
    parts: list[bytes] = []

    def read(descriptor: int, done: int, offset: int) -> int:
        parts.append(os.pread(descriptor, extent.size - done, offset))
        return len(parts[-1])

    _read(extent, read)
    return b"".join(parts)  # a single part is not copied


def read_into(extent: Extent, buffer: memoryview) -> None:
    """Reads an image into a buffer of `extent.size` bytes.

    Raises:
        ValueError: The file has changed since it was listed.
        OSError: The file cannot be read.
    """
    _read(extent, lambda descriptor, done, offset: os.preadv(descriptor, [buffer[done:]], offset))


def _read(extent: Extent, read: Callable[[int, int, int], int]) -> None:
    """Opens the file, and calls `read` with descriptor, bytes read so far and offset until all bytes of the image are read."""
    descriptor = os.open(extent.path, os.O_RDONLY)
    try:
        done, begin = 0, max(extent.offset, 0)
        # The kernel may return less than requested: at 2 GiB, and after signals on some file systems.
        while done < extent.size and (count := read(descriptor, done, begin + done)):
            done += count
        status = os.fstat(descriptor)
    except OSError as error:  # an error of a read does not name the file
        raise type(error)(error.errno, error.strerror, extent.path) from error
    finally:
        os.close(descriptor)
    resized = extent.offset == WHOLE_FILE and status.st_size != extent.size
    if resized or done < extent.size or extent.modified not in (0, status.st_mtime_ns):
        raise ValueError(f"{extent.path}: the file has changed during the conversion; run the command again")
