"""One object into one local file: by range requests, resumed where an earlier attempt ended, checked at the end."""

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

from pipelines.remote.object_store import Interruption, RemoteFile, read_range, retrying, stat, stat_once

CHUNK_BYTES = 8_000_000  # what a fault costs at most
ATTEMPTS = 3  # at content that fits its checksum

log = logging.getLogger(__name__)


class Changed(Interruption):
    """The object is not the one any more that it was."""


class Transfer:
    """Copies one object; `num_bytes` of it are here.

    Args:
        file: What to copy.
        stop: Ends it early; what has come stays in the file.
        on_fault: Is told of each fault after which it is tried again.
    """

    def __init__(self, file: RemoteFile, stop: threading.Event, on_fault: Callable[[BaseException], None]) -> None:
        self.num_bytes = 0
        self._file, self._stop, self._on_fault = file, stop, on_fault

    def run(self, part: FileIO) -> None:
        """Fills a file, opened for reading and appending, going on from what it holds.

        Raises:
            Changed: The object was replaced; what the file holds is of no use.
            OSError: The store fails for long, or denies access; or the content does not fit its checksum, time and again.
            FileNotFoundError: The object has gone.
            Stopped: By `stop`.
        """
        digests: list[bytes] = []
        expected = b""
        while len(digests) < ATTEMPTS:
            digest, expected = self._fill(part)
            self._check_unchanged(stat(self._file.url, stop=self._stop, on_fault=self._on_fault))
            if digest == expected:
                return
            if digest in digests and not (self._file.md5 or self._file.crc32c):
                # Encrypted with a key of its own, an object has an ETag that looks like an MD5 and is none.
                log.warning("%s: two copies are the same and do not fit its ETag, which then is no MD5", self._file)
                return
            digests.append(digest)
            part.truncate(0)
        raise OSError(
            f"{self._file}: the checksums of {ATTEMPTS} copies, {', '.join(digest.hex() for digest in digests)}, are not the "
            f"{expected.hex()} that the store gives; is the network damaging data?"
        )

    def _fill(self, part: FileIO) -> tuple[bytes, bytes]:
        """Reads what the file lacks; gives the digest of all of it and the one it should have."""
        file = self._file
        digest, expected = _checksum(file)
        if part.seek(0, os.SEEK_END) > file.size:
            part.truncate(0)
        part.seek(0)
        while expected and (chunk := part.read(CHUNK_BYTES)):
            digest.update(chunk)
        self.num_bytes = part.seek(0, os.SEEK_END)
        while self.num_bytes < file.size:
            data = self._read(self.num_bytes, min(self.num_bytes + CHUNK_BYTES, file.size))
            if expected:  # otherwise there is nothing to compare it with, and it would take as long as the copy
                digest.update(data)
            rest = memoryview(data)
            while rest:
                rest = rest[part.write(rest) :]
            self.num_bytes += len(data)
        return digest.digest() if expected else b"", expected

    def _read(self, start: int, end: int) -> bytes:
        faults = 0

        def ask() -> bytes:
            nonlocal faults
            faults += 1
            if faults > 1:  # an object that has become shorter would look like a fault for ever
                self._check_unchanged(stat_once(self._file.url, self._stop))
            return read_range(self._file.url, start, end, self._stop)

        return retrying(self._file.url, ask, stop=self._stop, on_fault=self._on_fault)

    def _check_unchanged(self, now: RemoteFile) -> None:
        if (now.version, now.size) != (self._file.version, self._file.size):
            raise Changed(self._file.url)


def _checksum(file: RemoteFile) -> tuple[Any, bytes]:
    """Something to feed the content to, and what its `digest` should be; nothing where the store gives no checksum."""
    if file.md5:
        return hashlib.md5(usedforsecurity=False), bytes.fromhex(file.md5)
    if file.crc32c:
        return importlib.import_module("google_crc32c").Checksum(), base64.b64decode(file.crc32c)
    is_md5 = re.fullmatch("[0-9a-f]{32}", file.etag) is not None  # that of an upload in parts ends with their number
    return hashlib.md5(usedforsecurity=False), bytes.fromhex(file.etag) if is_md5 else b""
