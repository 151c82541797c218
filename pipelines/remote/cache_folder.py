"""A folder of copies that processes share: who may write which, what may be deleted, and how many bytes there are at most.

`NAME.OBJECT-VERSION.SIZE.tar` is a copy, whole; with `.part` behind it, what has come so far, locked by whoever writes it. A
`.lease` lists the objects that a process reads, and is locked as long as it does. Files appear, are renamed and are deleted
under the lock of `.lock` only. The locks are flocks: they fall with their process, however it ends.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath

from pipelines.remote.object_store import RemoteFile

_NAME = re.compile(r".*\.(?P<key>[0-9a-f]{16})-[0-9a-f]{8}\.(?P<size>\d+)\.tar(?P<part>\.part)?")


class Busy(Exception):  # noqa: N818  (nothing went wrong)
    """Someone else writes it just now."""


class Full(Exception):  # noqa: N818
    """There is no room just now."""


@dataclass(frozen=True)
class _Entry:
    """A copy or a part of one; `size` is that of the whole copy."""

    path: Path
    key: str
    size: int
    is_part: bool
    used: float


class CacheFolder:
    """See the module.

    Args:
        path: Made where it is not there.
        max_bytes: Of all copies, parts being counted as if they were whole.

    Raises:
        ValueError: The folder cannot be written to.
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
                f"{path}: cannot be written to ({error.strerror}); name another folder with --data.cache-dir"
            ) from error

    @contextlib.contextmanager
    def lease(self, shards: Iterable[tuple[str, int]]) -> Iterator[None]:
        """Keeps copies from being deleted by any process, also those that are to come; URLs and sizes.

        Raises:
            ValueError: They do not fit.
            Full: They would, but for what others read just now; says so.
        """
        wanted = {object_key(url): size for url, size in shards}
        with self._locked():
            others = self._leased()
            needed = sum({**others, **wanted}.values())
            if needed > self._max_bytes:
                by_others = needed - sum(wanted.values())
                raise (Full if needed - by_others <= self._max_bytes else ValueError)(self._too_small(needed, by_others))
            path = self._path / f"{uuid.uuid4().hex}.lease"
            file = _open_locked(path)
            assert file, path
            file.write("".join(f"{key} {size}\n" for key, size in wanted.items()).encode())
            self._own_leases.add(path)
        try:
            yield
        finally:
            with self._locked():
                path.unlink()
                self._own_leases.remove(path)
                _close_locked(file)

    def find(self, file: RemoteFile) -> Path | None:
        """The copy of an object, if it is whole; it counts as used now."""
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
        """What there is of an object's copy, to be filled by the caller alone.

        Args:
            file: The object.
            leased: Whether the caller has a lease on it: then anything without one gives way.
            keep: Keys of objects that do not give way to one without a lease, and last to one with.

        Raises:
            Busy: Someone else is at it, or has just ended.
            Full: There is no room yet.
            ValueError: There is no room, and there will be none.
        """
        with self._locked():
            part_path = self._part_path(file)
            self._delete_useless(file)
            if self._copy_path(file).exists():
                raise Busy
            if not part_path.exists():
                self._make_room(file.size, leased, keep)
            part = _open_locked(part_path)
            if part is None:
                raise Busy
        try:
            yield part
        finally:
            _close_locked(part)

    def publish(self, file: RemoteFile) -> Path:
        """Makes the part, which the caller has filled, the copy."""
        with self._locked():
            return self._part_path(file).rename(self._copy_path(file))

    def discard(self, file: RemoteFile) -> None:
        """Deletes the part that the caller was to fill."""
        with self._locked():
            self._part_path(file).unlink()

    def _copy_path(self, file: RemoteFile) -> Path:
        version = hashlib.sha256(file.version.encode()).hexdigest()[:8]
        return self._path / f"{PurePosixPath(file.url).stem}.{object_key(file.url)}-{version}.{file.size}.tar"

    def _part_path(self, file: RemoteFile) -> Path:
        copy = self._copy_path(file)
        return copy.with_name(f"{copy.name}.part")

    def _delete_useless(self, file: RemoteFile) -> None:
        """Deletes the object's copy if someone has damaged it, and those of its other versions that no one else reads."""
        copy, key = self._copy_path(file), object_key(file.url)
        if copy.exists() and copy.stat().st_size != file.size:
            copy.unlink()
        if key not in self._leased(of_others=True):
            for entry in self._entries():
                if entry.key == key and entry.path not in (copy, self._part_path(file)):
                    self._delete(entry)

    def _make_room(self, size: int, leased: bool, keep: set[str]) -> None:
        """Deletes what was not used for longest, as far as need be; raises as `begin` where more would have to go than may."""
        entries, leases = self._entries(), self._leased()
        # What someone has a lease on and has not begun to copy will need its room.
        promised = sum(size for key, size in leases.items() if key not in {entry.key for entry in entries})
        excess = sum(entry.size for entry in entries) + size + (0 if leased else promised) - self._max_bytes
        being_written = False
        for entry in sorted(entries, key=lambda entry: (entry.key in keep, entry.used)):
            if excess <= 0:
                break
            if entry.key in leases or (entry.key in keep and not leased):
                continue
            if self._delete(entry):
                excess -= entry.size
            else:
                being_written = True
        if excess <= 0:
            return
        if leased and not being_written:
            raise ValueError(self._too_small(self._max_bytes + excess, 0))
        raise Full

    def _delete(self, entry: _Entry) -> bool:
        if entry.is_part:
            file = _open_locked(entry.path)
            if file is None:
                return False
            _close_locked(file)
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
        """Size by key of all that processes have a lease on; leases of those that have ended are deleted."""
        leased: dict[str, int] = {}
        for path in self._path.glob("*.lease"):
            if of_others and path in self._own_leases:
                continue
            file = _open_locked(path)
            if file:
                _close_locked(file)
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
            f"allows {_gigabytes(self._max_bytes)}; raise it, or take smaller blocks (--data.order blocks, --data.block-shards)"
        )


def object_key(url: str) -> str:
    """What stands for an object in names of files."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _open_locked(path: Path) -> FileIO | None:
    """The file, made if need be, locked until `_close_locked`; None where another has it locked."""
    file = open(path, "a+b", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _close_locked(file: FileIO) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would not do: a process that was forked has it open too
    file.close()


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
