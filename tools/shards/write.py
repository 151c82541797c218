"""Writes the tar of a shard."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pipelines.shards.index import Component, Sample

# Photographs are read into one buffer and written about ten at a time. A buffer that fits into the processor's cache is faster
# than larger buffers and than copies in the kernel (copy_file_range, sendfile).
BUFFER_BYTES = 1 << 20
_MEMBER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)  # a member without name, size, owner and time
_CHECKSUM = int(_MEMBER[148:154], 8)
MAX_MEMBER_BYTES = 8**11 - 1  # limit of the size field of the header


def member_header(name: str, size: int) -> bytes:
    """Returns the USTAR header block of a file, in a tenth of the time that `tarfile` takes.

    Args:
        name: Name in ASCII, of at most 100 characters.
        size: Size in bytes, at most `MAX_MEMBER_BYTES`.
    """
    name_field, size_field = name.encode("ascii"), b"%011o" % size
    assert len(name_field) <= 100
    assert size <= MAX_MEMBER_BYTES
    checksum = _CHECKSUM + sum(name_field) + sum(size_field) - 11 * ord("0")
    head = name_field.ljust(100, b"\0") + _MEMBER[100:124] + size_field
    return head + _MEMBER[135:148] + b"%06o" % checksum + _MEMBER[154:]


class ShardWriter:
    """Writes a tar of samples. The same samples give the same bytes: headers are one block, without owner and time.

    webdataset's `TarWriter` ignores the requested format, and adds a kilobyte of PAX headers to each member.

    Attributes:
        samples: The written samples, for the index.
        num_bytes: Size of the tar so far.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by `__exit__`)
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._used = 0
        self.samples: list[Sample] = []
        self.num_bytes = 0

    def add(self, key: str, extension: str, size: int, read: Callable[[memoryview], None], label: bytes) -> None:
        """Appends a sample of two members, `key.extension` and `key.cls`.

        Args:
            key: Key of the sample.
            extension: Extension of the image.
            size: Size of the image, in bytes.
            read: Fills a buffer of `size` bytes with the image. If it raises, nothing is added.
            label: Content of `key.cls`.
        """
        if self._used + member_bytes(size) + member_bytes(len(label)) > len(self._buffer):
            self._flush(member_bytes(size) + member_bytes(len(label)))
        begin = self._used + tarfile.BLOCKSIZE
        read(self._buffer[begin : begin + size])
        image = self._finish_member(f"{key}.{extension}", extension, size)
        begin = self._used + tarfile.BLOCKSIZE
        self._buffer[begin : begin + len(label)] = label
        self.samples.append([image, self._finish_member(f"{key}.cls", "cls", len(label))])

    def _finish_member(self, name: str, extension: str, size: int) -> Component:
        """Adds the header and the padding to data that lies one block after the used part of the buffer."""
        begin = self._used + tarfile.BLOCKSIZE
        end = self._used + member_bytes(size)
        self._buffer[self._used : begin] = member_header(name, size)
        self._buffer[begin + size : end] = bytes(end - begin - size)
        component = Component(extension, self.num_bytes + tarfile.BLOCKSIZE, size, name)
        self.num_bytes += end - self._used
        self._used = end
        return component

    def _flush(self, room: int = 0) -> None:
        """Writes the used part of the buffer, and ensures that the buffer has `room` bytes."""
        written = 0
        while written < self._used:
            written += self._file.write(self._buffer[written : self._used]) or 0
        self._used = 0
        if room > len(self._buffer):
            self._buffer = memoryview(bytearray(room))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self._flush()
            end = self.num_bytes + 2 * tarfile.BLOCKSIZE
            end += -end % tarfile.RECORDSIZE
            self._file.truncate(end)  # the end mark is zeros, which truncation adds
            self.num_bytes = end
        self._file.close()


def member_bytes(size: int) -> int:
    """Returns the bytes that a member of `size` bytes takes in a tar, with its header."""
    return tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE
