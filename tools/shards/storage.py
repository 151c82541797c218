"""The destination of shards: a local folder, or a bucket through fsspec. Files appear whole or not at all."""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipelines.files import make_writable
from pipelines.remote.object_store import filesystem, is_url
from pipelines.remote.retrying import retrying

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

READ_ONLY = ("data", "gist", "git", "github", "http", "https", "libarchive", "tar", "zip")  # kinds of URLs of fsspec

T = TypeVar("T")


@dataclass(frozen=True)
class LocalStorage:
    """A local folder. File names are relative to it, with at most one folder of their own."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @contextlib.contextmanager
    def new_file(self, name: str, durable: bool = False) -> Iterator[Path]:
        """Yields a local path to write to. The file appears as `name` if the block ends without an error.

        `durable` waits until the file is on the disk. Shards do without it, like tar and cp: flushing takes as long again as
        writing, and the next run finds files that a power failure truncated by their size.
        """
        path = self.path / name
        if path.parent != self.path:  # `self.path` itself exists, or else this machine has no access to it
            path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield temporary
            if durable:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:  # an error of a write, for example on a full disk, does not name the file
            raise type(error)(error.errno, error.strerror, error.filename or str(path)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        """Returns the content of a file, or None if it does not exist."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Returns the size in bytes of each file in a folder, by name without the folder."""
        if not (self.path / folder).is_dir():
            return {}
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.path / folder) if entry.is_file()}

    def delete(self, name: str) -> None:
        """Deletes a file if it exists."""
        (self.path / name).unlink(missing_ok=True)

    def delete_folder(self, name: str) -> None:
        """Deletes a folder and its contents if it exists."""
        if (self.path / name).exists():
            shutil.rmtree(self.path / name)

    def free_bytes(self) -> int | None:
        """Returns the free space, or None if it is unknown."""
        return shutil.disk_usage(self.path).free

    @contextlib.contextmanager
    def lock(self, folder: str = "", wait: bool = False) -> Iterator[None]:
        """Keeps other processes out of a folder, which is created if needed.

        Raises:
            ValueError: Another process holds the lock, and `wait` is false.
        """
        path = self.path / folder
        path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))  # released when the process ends
            if not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:  # its holder has just deleted it
                raise BlockingIOError
        except BlockingIOError as error:
            os.close(descriptor)
            raise ValueError(f"{path}: another process is at work there; wait for it or end it") from error
        try:
            yield
        finally:
            if folder:
                with contextlib.suppress(OSError):  # not empty: the next run continues from its contents
                    path.rmdir()
            os.close(descriptor)


@dataclass(frozen=True)
class RemoteStorage:
    """A prefix in an object store, with the methods of `LocalStorage`. Files are written locally, then uploaded whole."""

    url: str

    def __str__(self) -> str:
        return self.url

    def _call(self, name: str, method: Callable[["AbstractFileSystem", str], T]) -> T:
        """Calls a method of the file system with the path of a file in it, and repeats it after transient errors."""
        url = f"{self.url}/{name}".rstrip("/")

        def call() -> T:
            files = filesystem(url)
            return method(files, files._strip_protocol(url))

        return retrying(url, call)

    @contextlib.contextmanager
    def new_file(self, name: str, durable: bool = False) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="googlenet-dali-") as folder:
            local = Path(folder) / "file"
            yield local
            self._call(name, lambda files, path: files.put_file(str(local), path))

    def read(self, name: str) -> bytes | None:
        try:
            return self._call(name, lambda files, path: bytes(files.cat_file(path)))
        except FileNotFoundError:
            return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        try:
            entries = self._call(folder, lambda files, path: files.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        return {os.path.basename(entry["name"]): entry["size"] for entry in entries if entry["type"] == "file"}

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call(name, lambda files, path: files.rm_file(path))

    def delete_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call(name, lambda files, path: files.rm(path, recursive=True))

    def free_bytes(self) -> int | None:
        return None

    @contextlib.contextmanager
    def lock(self, folder: str = "", wait: bool = False) -> Iterator[None]:
        yield  # an object store has no locks; two writers of one plan write the same bytes


Storage = LocalStorage | RemoteStorage


def open_storage(location: str) -> Storage:
    """Opens the folder of a path or a URL (`s3://`, `gs://`, or any other that fsspec writes), and creates it if needed.

    Raises:
        ValueError: It is not writable, or a package is missing.
    """
    if is_url(location):
        _require_writable_kind(location)
        remote = RemoteStorage(location.rstrip("/"))
        try:
            remote.sizes()
            write_text(remote, ".writable", "")
            remote.delete(".writable")
        except (OSError, ValueError) as error:
            raise ValueError(f"{location}: cannot be written to ({str(error).removeprefix(f'{location}: ')})") from error
        return remote
    path = Path(location)
    make_writable(path, "name another folder")
    return LocalStorage(path)


def _require_writable_kind(url: str) -> None:
    """Raises a `ValueError` for a URL that only names what can be read: a request to it would be repeated for minutes."""
    from fsspec import available_protocols

    kind = url.partition("://")[0]
    if kind in READ_ONLY or kind not in available_protocols():
        raise ValueError(
            f"{url}: shards cannot be written there; name a local folder, or a URL that begins with s3:// or gs://"
        )


def write_text(storage: Storage, name: str, text: str, durable: bool = False) -> None:
    """Writes a text file. See `LocalStorage.new_file`."""
    with storage.new_file(name, durable) as path:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")


def clear_temporary(storage: Storage, names: str, folder: str = "") -> None:
    """Deletes the unfinished files of runs that failed or were killed, if their name matches a regular expression."""
    for file in storage.sizes(folder):
        if re.fullmatch(rf"\.({names})\.[0-9a-f]{{8}}\.tmp", file):
            storage.delete(f"{folder}/{file}" if folder else file)
