"""Writes files atomically, locks files, and locates the user's cache folder."""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: writes a temporary file beside it, flushes it to disk and renames it.

    The temporary file is named after the content. So what a killed process leaves is gone once the same file is written again,
    and several processes may write the same content at once, without locks: each writes the same bytes to the same places.

    Raises:
        OSError: The file cannot be written; the error names it.
    """
    temporary = path.with_name(f".{path.name}.{hashlib.sha256(content).hexdigest()[:8]}.tmp")
    is_renamed = False
    try:
        while not is_renamed:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):  # another process has renamed it meanwhile, so write again
                temporary.replace(path)
                is_renamed = True
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_writable(folder: Path, way_out: str) -> None:
    """Creates a folder, if needed.

    Raises:
        ValueError: It is not writable. The message ends with `way_out`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = "not a folder" if isinstance(error, FileExistsError) else f"cannot be written to ({error.strerror})"
        raise ValueError(f"{folder}: {problem}; {way_out}") from error


def user_cache(kind: str, name: str) -> Path:
    """Returns the path of a file in the user's cache folder, after creating the folder.

    Raises:
        ValueError: The folder cannot be created.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "googlenet-dali" / kind
    with cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@contextlib.contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turns an `OSError` of a write to the user's cache folder into a `ValueError` that names the variable that moves it."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{folder}: the user's cache folder cannot be written to ({error.strerror}); set XDG_CACHE_HOME to another folder, "
            "or let `shards index` write index files, so that none has to be kept there"
        ) from error


def open_locked(path: Path) -> FileIO | None:
    """Opens a file, created if missing, and locks it until `close_locked`; returns `None` if another owner has the lock.

    The lock is a flock, so it ends with its process. The file is opened for writing: NFS needs that for an exclusive lock.

    Raises:
        OSError: The file cannot be written, or its file system has no locks.
    """
    file = open(path, "a+b", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            return None
        raise
    return file


def close_locked(file: FileIO) -> None:
    """Unlocks and closes a file of `open_locked`."""
    fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a forked process keeps the file open
    file.close()
