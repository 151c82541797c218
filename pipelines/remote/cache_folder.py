"""A folder of copies that processes share: who may write and delete which file, within a limit of bytes.

`NAME.OBJECT-VERSION.SIZE.tar` is a complete copy. The suffix `.part` marks a partial one, which its writer locks. A file
`HOST.PROCESS.ID.lease` lists the objects that a process reads, and stays locked while it does. Files are created, renamed and
deleted only under the lock of `.lock`. The locks are flocks, so they end with their process, however it ends.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import socket
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath

from pipelines.files import close_locked, open_locked
from pipelines.remote.object_store import RemoteFile

_NAME = re.compile(r".*\.(?P<key>[0-9a-f]{16})-[0-9a-f]{8}\.(?P<size>\d+)\.tar(?P<part>\.part)?")


class Busy(Exception):  # noqa: N818  (not an error)
    """Another process or thread is writing this copy, or has just finished."""

    def __init__(self, copy: Path) -> None:
        stat = copy.stat()
        self.copy, self.activity = copy, (stat.st_size, stat.st_mtime_ns)


class Full(Exception):  # noqa: N818  (not an error)
    """There is no room at the moment."""


@dataclass(frozen=True)
class _Entry:
    """A copy, complete or partial; `size` is the size of the complete copy."""

    path: Path
    key: str
    size: int
    is_part: bool
    used: float


class CacheFolder:
    """The folder; see the module's docstring.

    Args:
        path: Path of the folder; created if missing.
        max_bytes: Limit for all copies. A partial copy counts as if it were complete.

    Raises:
        ValueError: The folder is not writable.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._own_leases: set[Path] = set()
        try:
            path.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be written to ({error.strerror}); name another folder with --data.cache-dir (in evaluate "
                "--cache-dir)"
            ) from error

    @contextlib.contextmanager
    def lease(self, shards: Iterable[tuple[str, int]]) -> Iterator[None]:
        """Protects present and future copies of shards, given by URL and size, from deletion by any process.

        Raises:
            ValueError: The shards do not fit.
            Full: The shards do not fit beside those that other processes read at the moment.
        """
        wanted = {object_key(url): size for url, size in shards}
        with self._locked():
            others = self._leased()
            needed = sum({**others, **wanted}.values())
            if needed > self._max_bytes:
                by_others = needed - sum(wanted.values())
                raise (Full if needed - by_others <= self._max_bytes else ValueError)(self._too_small(needed, by_others))
            path = self._path / f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}.lease"
            file = open_locked(path)
            assert file, path
            file.write("".join(f"{key} {size}\n" for key, size in wanted.items()).encode())
            self._own_leases.add(path)
        try:
            yield
        finally:
            with self._locked():
                path.unlink()
                self._own_leases.remove(path)
                close_locked(file)

    def show_life(self) -> None:
        """Marks the own leases as in use now. Others that wait for their room see that it is not held by a blocked process."""
        for path in list(self._own_leases):
            with contextlib.suppress(FileNotFoundError):  # just released
                os.utime(path)

    def activity(self) -> frozenset[tuple[str, int, int]]:
        """Returns a value that changes with each step of a copy, and with each lease that is taken, used or released."""
        found = set()
        for file in os.scandir(self._path):
            with contextlib.suppress(FileNotFoundError):  # just deleted
                if file.name.endswith((".lease", ".tar", ".part")):
                    found.add((file.name, file.stat().st_size, file.stat().st_mtime_ns))
        return frozenset(found)

    def holders(self) -> str:
        """Names the other processes that read copies now."""
        names = [path.name.rsplit(".", 3) for path in self._path.glob("*.lease") if path not in self._own_leases]
        found = sorted({f"process {name[1]} on {name[0]}" for name in names if len(name) == 4})
        return " and ".join(found) or "other processes"

    def find(self, file: RemoteFile) -> Path | None:
        """Returns the copy of an object if it is complete, and marks it as used now."""
        path = self._copy_path(file)
        try:
            if path.stat().st_size != file.size:
                return None
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    @contextlib.contextmanager
    def begin(self, file: RemoteFile, *, leased: bool, keep: set[str]) -> Iterator[FileIO]:
        """Opens the partial copy of an object, which the caller alone may fill.

        Args:
            file: The object.
            leased: Whether the caller has a lease on it. Then any copy without a lease may be deleted.
            keep: Keys of objects to delete last if `leased`, and otherwise not at all.

        Raises:
            Busy: Another process or thread is writing the copy, or has just finished; or if `leased`, a copy in whose place it
                would fit.
            Full: There is no room yet.
            ValueError: There is no room, and waiting does not help.
        """
        with self._locked():
            part_path = self._part_path(file)
            self._delete_useless(file)
            if self._copy_path(file).exists():
                raise Busy(self._copy_path(file))
            if not part_path.exists():
                self._make_room(file.size, leased, keep)
            part = open_locked(part_path)
            if part is None:
                raise Busy(part_path)
        try:
            yield part
        finally:
            close_locked(part)

    def publish(self, file: RemoteFile) -> Path:
        """Turns the partial copy, which the caller has filled, into the copy."""
        with self._locked():
            return self._part_path(file).rename(self._copy_path(file))

    def discard(self, file: RemoteFile) -> None:
        """Deletes the partial copy that the caller has opened."""
        with self._locked():
            self._part_path(file).unlink()

    def _copy_path(self, file: RemoteFile) -> Path:
        version = hashlib.sha256(file.version.encode()).hexdigest()[:8]
        return self._path / f"{PurePosixPath(file.url).stem}.{object_key(file.url)}-{version}.{file.size}.tar"

    def _part_path(self, file: RemoteFile) -> Path:
        copy = self._copy_path(file)
        return copy.with_name(f"{copy.name}.part")

    def _delete_useless(self, file: RemoteFile) -> None:
        """Deletes the object's copy if it is damaged, and copies of other versions that no other process reads."""
        copy, key = self._copy_path(file), object_key(file.url)
        if copy.exists() and copy.stat().st_size != file.size:
            copy.unlink()
        if key not in self._leased(of_others=True):
            for entry in self._entries():
                if entry.key == key and entry.path not in (copy, self._part_path(file)):
                    self._delete(entry)

    def _make_room(self, size: int, leased: bool, keep: set[str]) -> None:
        """Deletes the least recently used copies, as far as necessary. Raises like `begin` if that is not enough."""
        entries, leases = self._entries(), self._leased()
        # Leased objects that are not being copied yet will need their room.
        promised = sum(size for key, size in leases.items() if key not in {entry.key for entry in entries})
        excess = sum(entry.size for entry in entries) + size + (0 if leased else promised) - self._max_bytes
        being_written: Path | None = None
        for entry in sorted(entries, key=lambda entry: (entry.key in keep, entry.used)):
            if excess <= 0:
                break
            if entry.key in leases or (entry.key in keep and not leased):
                continue
            if self._delete(entry):
                excess -= entry.size
            else:
                being_written = entry.path
        if excess <= 0:
            return
        if not leased:
            raise Full
        if being_written:
            raise Busy(being_written)
        raise ValueError(self._too_small(self._max_bytes + excess, 0))

    def _delete(self, entry: _Entry) -> bool:
        """Deletes a copy, unless it is being written; returns whether it did."""
        if entry.is_part:
            file = open_locked(entry.path)
            if file is None:
                return False
            close_locked(file)
        entry.path.unlink()
        return True

    def _entries(self) -> list[_Entry]:
        found = []
        for file in os.scandir(self._path):
            match = _NAME.fullmatch(file.name)
            if match:
                size, used = int(match["size"]), file.stat().st_mtime
                found.append(_Entry(Path(file.path), match["key"], size, match["part"] is not None, used))
        return found

    def _leased(self, of_others: bool = False) -> dict[str, int]:
        """Returns the sizes of all leased objects by key. Deletes the leases of processes that have ended."""
        leased: dict[str, int] = {}
        for path in self._path.glob("*.lease"):
            if of_others and path in self._own_leases:
                continue
            file = open_locked(path)
            if file:
                close_locked(file)
                path.unlink()
                continue
            for line in path.read_text().splitlines():
                key, size = line.split()
                leased[key] = int(size)
        return leased

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._path / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    def _too_small(self, needed: int, by_others: int) -> str:
        others = f", {_gigabytes(by_others)} of them for other loaders," if by_others else ""
        return (
            f"{self._path}: the shards that are read at once take {_gigabytes(needed)}{others} and --data.cache-gigabytes "
            f"(in evaluate --cache-gigabytes) allows {_gigabytes(self._max_bytes)}; raise it, or train with smaller blocks "
            "(--data.order blocks, --data.block-shards)"
        )


def writer_of(part: Path) -> str:
    """Names the process that writes a partial copy, as far as this machine shows it."""
    with contextlib.suppress(OSError):  # the copy is complete, or there is no /proc
        stat = part.stat()
        file = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
        locks = re.findall(rf" FLOCK .* (\d+) {file} 0 EOF", Path("/proc/locks").read_text())
        if locks:
            return "another loader of this process" if int(locks[0]) == os.getpid() else f"process {locks[0]}"
    return "another process"


def object_key(url: str) -> str:
    """Returns the part of file names that identifies an object."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
