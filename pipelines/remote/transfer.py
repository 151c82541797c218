"""Copies an object to a local file with range requests, resumes earlier attempts, and verifies the checksum."""

import base64
import hashlib
import importlib
import logging
import os
import re
import threading
from collections.abc import Callable
from io import FileIO
from typing import Any

from pipelines.remote.object_store import RemoteFile, read_range, stat, stat_once
from pipelines.remote.retrying import Interruption, retrying

CHUNK_BYTES = 8_000_000  # the most that a failed request loses
ATTEMPTS = 3  # copies to make before giving up, if the checksum does not match

log = logging.getLogger(__name__)


class Changed(Interruption):
    """The object was replaced."""


class Transfer:
    """Copies one object.

    Args:
        file: Object to copy.
        stop: Ends the copy early; what has arrived stays in the file.
        on_fault: Receives each transient error.

    Attributes:
        num_bytes: Bytes copied so far.
    """

    def __init__(self, file: RemoteFile, stop: threading.Event, on_fault: Callable[[BaseException], None]) -> None:
        self.num_bytes = 0
        self._file, self._stop, self._on_fault = file, stop, on_fault

    def run(self, part: FileIO) -> None:
        """Completes a file that is open for reading and appending.

        Raises:
            Changed: The object was replaced, so the content of the file is useless.
            OSError: The store fails for long or denies access, or the content repeatedly mismatches its checksum.
            FileNotFoundError: The object is gone.
            Stopped: `stop` was set.
        """
        digests: list[bytes] = []
        expected = b""
        while len(digests) < ATTEMPTS:
            digest, expected = self._fill(part)
            self._check_unchanged(stat(self._file.url, stop=self._stop, on_fault=self._on_fault))
            if digest == expected:
                return
            if digest in digests and not (self._file.md5 or self._file.crc32c):
                # The ETag of an object that is encrypted with a customer's key looks like an MD5, but is not.
                log.warning("%s: two copies agree but do not match the ETag, which therefore is not an MD5", self._file)
                return
            digests.append(digest)
            part.truncate(0)
        raise OSError(
            f"{self._file}: the checksums of {ATTEMPTS} copies, {', '.join(digest.hex() for digest in digests)}, differ from "
            f"{expected.hex()}, which the store states; the network may be corrupting data"
        )

    def _fill(self, part: FileIO) -> tuple[bytes, bytes]:
        """Reads the missing part of the file; returns the digest of the whole content, and the expected one."""
        file = self._file
        digest, expected = _checksum(file)
        if part.seek(0, os.SEEK_END) > file.size:
            part.truncate(0)
        part.seek(0)
        while expected and (chunk := part.read(CHUNK_BYTES)):
            digest.update(chunk)
            os.utime(part.fileno())  # shows life to those who wait for this copy
        self.num_bytes = part.seek(0, os.SEEK_END)
        while self.num_bytes < file.size:
            data = self._read(part, self.num_bytes, min(self.num_bytes + CHUNK_BYTES, file.size))
            if expected:  # a digest takes as long as the copy itself
                digest.update(data)
            rest = memoryview(data)
            while rest:
                rest = rest[part.write(rest) :]
            self.num_bytes += len(data)
        return digest.digest() if expected else b"", expected

    def _read(self, part: FileIO, start: int, end: int) -> bytes:
        attempts = 0

        def on_fault(error: BaseException) -> None:
            os.utime(part.fileno())  # as above
            self._on_fault(error)

        def ask() -> bytes:
            nonlocal attempts
            attempts += 1
            if attempts > 1:  # an object that has become shorter would fail forever
                self._check_unchanged(stat_once(self._file.url, self._stop))
            return read_range(self._file.url, start, end, self._stop)

        return retrying(self._file.url, ask, stop=self._stop, on_fault=on_fault)

    def _check_unchanged(self, now: RemoteFile) -> None:
        if (now.version, now.size) != (self._file.version, self._file.size):
            raise Changed(self._file.url)


def _checksum(file: RemoteFile) -> tuple[Any, bytes]:
    """Returns a hash object and the digest it should give; an empty digest if the store states no checksum."""
    if file.md5:
        return hashlib.md5(usedforsecurity=False), bytes.fromhex(file.md5)
    if file.crc32c:
        return importlib.import_module("google_crc32c").Checksum(), base64.b64decode(file.crc32c)
    is_md5 = re.fullmatch("[0-9a-f]{32}", file.etag) is not None  # after an upload in parts, the ETag ends with their number
    return hashlib.md5(usedforsecurity=False), bytes.fromhex(file.etag) if is_md5 else b""
