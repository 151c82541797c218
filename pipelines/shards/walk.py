"""Walks through the members of a tar. It trusts no header: a damaged one may announce any size."""

import io
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Self, cast

from pipelines.printable import printable
from pipelines.shards.compression import compressed, compression_in

MOST_HEADER_BYTES = 1 << 20  # of a long name or of extended attributes; real ones have some kilobytes
FOLDER = "a folder"  # an `Entry.other`
SHOWN = 100  # characters of a member's name in messages


class Entry(NamedTuple):
    """A member of a tar.

    Attributes:
        name: Name of the member. Bytes that are not UTF-8 are written as escapes, which keeps different names different.
        offset: Offset of its data in the file, in bytes; for a hard link, of the data of its target.
        size: Size of the data, in bytes.
        other: What a member is that has no bytes of its own, such as "a symbolic link to x.jpg"; empty for a file.
    """

    name: str
    offset: int
    size: int
    other: str


def walk(file: BinaryIO, place: str, end: int | None = None) -> Iterator[Entry]:
    """Yields the members of the tar that begins at the file's position, in order; seeks over their data.

    Hard links are yielded as the file that they stand for. Nothing is written, and no member's name is opened as a file.

    Args:
        file: The file with the tar.
        place: Name of the tar in messages.
        end: Offset in the file at which the tar ends; by default the end of the file.

    Raises:
        ValueError: This is not a tar, or it is compressed, damaged or cut short. Members before the damage are yielded first.
    """
    begin = file.tell()
    if end is None:
        end = file.seek(0, io.SEEK_END)
        file.seek(begin)
    if kind := compression_in(file.read(8)):
        raise ValueError(compressed(place, kind))
    bounded = _Bounded(file, end)
    files: dict[str, tuple[int, int]] | None = None  # collected only for a tar with hard links
    # tarfile lets the others escape from damaged headers.
    try:
        for member in _members(bounded, begin):
            offset, size, other = member.offset_data, member.size, _other(member)
            if member.islnk():
                files = _files_before(member, bounded, begin) if files is None else files
                target = files.get(member.linkname.removeprefix("./"))
                if target:
                    offset, size = target
                else:
                    other = f"a hard link to {_shown(member.linkname)}, which is not in front of it in the tar"
            if files is not None and not other:
                files[member.name.removeprefix("./")] = offset, size
            yield Entry(member.name, offset, size, other)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(f"{place}: not a readable tar ({_one_line(error)})") from error
    except RecursionError as error:
        raise ValueError(f"{place}: not a readable tar (too many headers for one member)") from error
    _check_end_mark(bounded, place)


class _Bounded:
    """The part of a file that a tar fills, as tarfile may see it: for reads of headers, and within the tar.

    Attributes:
        next: Offset of the header after the last member.
    """

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file, self.end, self.next = file, end, 0

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int) -> int:
        if not 0 <= offset <= self.end:
            raise ValueError("unexpected end of data")
        return self._file.seek(offset)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MOST_HEADER_BYTES:
            raise ValueError("a header announces a name or attributes of an impossible size")
        return self._file.read(max(0, min(size, self.end - self._file.tell())))


class _Header(tarfile.TarInfo):
    """A header whose size is not negative: tarfile would go backwards."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise ValueError("a header announces a negative size")
        return header


def _members(bounded: _Bounded, begin: int) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar whose data lies within it."""
    bounded.seek(begin)
    last = begin - 1
    # The error handler turns names that are not UTF-8 into printable text, and keeps different names different.
    with tarfile.open(
        fileobj=cast(BinaryIO, bounded), mode="r:", tarinfo=_Header, encoding="utf-8", errors="backslashreplace"
    ) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all, a kilobyte each
            stored = member.isreg() and not member.issparse()
            if member.size < 0 or tar.offset <= last or (stored and member.offset_data + member.size > bounded.end):
                raise ValueError(f"the header of {_shown(member.name)} announces a size that the file does not have")
            last = tar.offset
            yield member
        bounded.next = tar.offset


def _files_before(link: tarfile.TarInfo, bounded: _Bounded, begin: int) -> dict[str, tuple[int, int]]:
    """Returns offset and size of the files in front of a tar's first hard link, by name."""
    files: dict[str, tuple[int, int]] = {}
    for member in _members(bounded, begin):
        if member.offset >= link.offset:
            break
        if not _other(member):
            files[member.name.removeprefix("./")] = member.offset_data, member.size
    return files


def _other(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "a sparse file, whose bytes do not lie in one piece"
    if member.isreg() or member.islnk():
        return ""
    if member.issym():
        return f"a symbolic link to {_shown(member.linkname)}"
    kinds = {tarfile.DIRTYPE: FOLDER, tarfile.FIFOTYPE: "a FIFO", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device"}
    return kinds.get(member.type, "neither a file nor a link")


def _check_end_mark(bounded: _Bounded, place: str) -> None:
    """Raises `ValueError` unless a tar ends with a block of zeros. `tarfile` accepts tars cut short between two members."""
    end = min(bounded.next, bounded.end)
    bounded.seek(end)
    block = bounded.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError(f"{place}: cut short; there is no end mark after its last complete member, at byte {end:,}")
    if any(block):
        raise ValueError(f"{place}: damaged; at byte {end:,} there is neither a member nor an end mark")


def _shown(name: str) -> str:
    return printable(name[:SHOWN])


def _one_line(error: BaseException) -> str:
    return printable(str(error)[: 2 * SHOWN])
