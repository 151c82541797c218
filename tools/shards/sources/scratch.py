"""Files unpacked from a source into the folder of --scratch, which outlives runs and may serve several at once."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from pipelines.files import make_writable


def open_scratch(folder: Path) -> None:
    """Creates the folder, if needed; raises ValueError if it is not writable."""
    make_writable(folder, "name another folder with --scratch")


def unpacked_path(scratch: Path, file: Path, *options: object) -> Path:
    """Returns a path, without an ending, that is unique to a file, its state, and the options that decide what is unpacked."""
    status = file.stat()
    identity = " ".join(map(str, (file.resolve(), status.st_size, status.st_mtime_ns, *options)))
    return scratch / f"{file.stem}-{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def write_unpacked(target: Path, parts: Callable[[], Iterable[bytes]]) -> None:
    """Writes a file that appears whole or not at all, and is on the disk then.

    The name of the temporary file follows from `target`, and so do the bytes. So the next run overwrites what a killed process
    left, and several processes may write at once, without locks: each writes the same bytes to the same places.

    Args:
        target: The file, named by `unpacked_path`.
        parts: Returns the content.

    Raises:
        OSError: The file cannot be written; the error names it, if it has no other name.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    is_there = False
    try:
        while not is_there:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb") as file:
                file.writelines(parts())
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            try:
                temporary.replace(target)
                is_there = True
            except FileNotFoundError:  # another process has renamed it meanwhile, or has deleted it after an error
                is_there = target.exists()
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise type(error)(error.errno, error.strerror, error.filename or str(target)) from error
        raise
