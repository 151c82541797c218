"""Where shards go: a local folder, or a bucket reached through fsspec. Files appear whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipelines.remote.object_store import is_url, storage_errors

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


class Storage(Protocol):
    """A folder that files are written to; names are relative to it and may have one folder of their own."""

    def new_file(self, name: str, durable: bool = False) -> contextlib.AbstractContextManager[Path]:
        """A local path to write; what is there when the block ends without an error appears as `name`.

        `durable` waits until it is on the disk. Shards do without, as with tar and cp: that takes as long again as writing
        them, and what a power cut takes is found by its size when the command is run again.
        """

    def read(self, name: str) -> str | None:
        """The text of a file, or None where there is no such file."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file of the folder, by name without the folder."""

    def delete(self, name: str) -> None:
        """Deletes a file, if it is there."""

    def delete_folder(self, name: str) -> None:
        """Deletes a folder with all that is in it, if it is there."""

    def free_bytes(self) -> int | None:
        """What it can still take, or None where nobody knows."""

    def lock(self, folder: str = "", wait: bool = False) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from a folder, which is made if need be.

        Raises:
            ValueError: Another process is at work there, and this one is not to wait.
        """


def open_storage(location: str) -> Storage:
    """The folder that a path or a URL (`s3://`, `gs://`, whatever fsspec knows) names; made where it is not there.

    Raises:
        ValueError: It cannot be written to, or a package is missing; says which.
    """
    if not is_url(location):
        return LocalStorage.open(Path(location))
    return RemoteStorage.open(location)


def write_text(storage: Storage, name: str, text: str, durable: bool = False) -> None:
    """Writes a text file; see `Storage.new_file`."""
    with storage.new_file(name, durable) as path:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class LocalStorage:
    """A folder of the file system."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> "LocalStorage":
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ValueError(f"{path}: cannot be written to ({error.strerror}); name another folder") from error
        return cls(path)

    def __str__(self) -> str:
        return str(self.path)

    @contextlib.contextmanager
    def new_file(self, name: str, durable: bool = False) -> Iterator[Path]:
        path = self.path / name
        if path.parent != self.path:  # that one is there, or this is a machine that does not see it
            path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield temporary
            if durable:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:  # an error of a write, as on a full disk, does not say where
            raise type(error)(error.errno, error.strerror, error.filename or str(path)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, name: str) -> str | None:
        try:
            return (self.path / name).read_bytes().decode("utf-8", "backslashreplace")
        except FileNotFoundError:
            return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        if not (self.path / folder).is_dir():
            return {}
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.path / folder) if entry.is_file()}

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def delete_folder(self, name: str) -> None:
        if (self.path / name).exists():
            shutil.rmtree(self.path / name)

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self.path).free

    @contextlib.contextmanager
    def lock(self, folder: str = "", wait: bool = False) -> Iterator[None]:
        path = self.path / folder
        path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))  # falls with the process, however it ends
            if not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:  # deleted by its holder just now
                raise BlockingIOError
        except BlockingIOError as error:
            os.close(descriptor)
            raise ValueError(f"{path}: another process is at work there; wait for it or end it") from error
        try:
            yield
        finally:
            if folder:
                with contextlib.suppress(OSError):  # not empty: there is something to go on with
                    path.rmdir()
            os.close(descriptor)


@dataclass(frozen=True)
class RemoteStorage:
    """A prefix in an object store. A file is written locally, then uploaded whole."""

    url: str

    @classmethod
    def open(cls, url: str) -> "RemoteStorage":
        storage = cls(url.rstrip("/"))
        try:
            storage.sizes()
            write_text(storage, ".writable", "")
            storage.delete(".writable")
        except (OSError, ValueError) as error:
            raise ValueError(f"{url}: cannot be written to ({str(error).removeprefix(f'{url}: ')})") from error
        return storage

    def __str__(self) -> str:
        return self.url

    def _open(self, name: str) -> "tuple[AbstractFileSystem, str]":
        from fsspec.core import url_to_fs

        # Listings are cached by default, and other machines write here too.
        return url_to_fs(f"{self.url}/{name}".rstrip("/"), use_listings_cache=False)

    @contextlib.contextmanager
    def new_file(self, name: str, durable: bool = False) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="googlenet-dali-") as folder:
            local = Path(folder) / "file"
            yield local
            with storage_errors(self.url):
                files, path = self._open(name)
                files.put_file(str(local), path)

    def read(self, name: str) -> str | None:
        try:
            with storage_errors(self.url):
                files, path = self._open(name)
                return files.cat_file(path).decode("utf-8", "backslashreplace")
        except FileNotFoundError:
            return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        try:
            with storage_errors(self.url):
                files, path = self._open(folder)
                entries = files.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        return {os.path.basename(entry["name"]): entry["size"] for entry in entries if entry["type"] == "file"}

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), storage_errors(self.url):
            files, path = self._open(name)
            files.rm_file(path)

    def delete_folder(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), storage_errors(self.url):
            files, path = self._open(name)
            files.rm(path, recursive=True)

    def free_bytes(self) -> int | None:
        return None

    @contextlib.contextmanager
    def lock(self, folder: str = "", wait: bool = False) -> Iterator[None]:
        yield  # an object store has no locks; two writers of one plan write the same bytes
