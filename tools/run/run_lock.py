"""Keeps a second run out of a run folder."""

import contextlib
import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from model.distributed import World
from pipelines.files import close_locked, make_writable, open_locked

log = logging.getLogger("train")

FILE_NAME = ".lock"
# A scheduler may restart a job while its old process still writes a checkpoint. torchrun gives that as long before it kills it.
WAIT_SECONDS = 30.0
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # NFS without lockd, Lustre without -o flock, some FUSE


@contextlib.contextmanager
def sole_run(path: Path, world: World, *, waits: bool) -> Iterator[None]:
    """Keeps other runs out of a run folder, which is created; a folder that is still empty in the end is removed.

    All ranks call this. Rank 0 holds a lock, which ends with its process, however that ends.

    Args:
        path: The folder, which all ranks share.
        world: This process and the others.
        waits: Whether to wait `WAIT_SECONDS` for another run to end.

    Raises:
        ValueError: The folder cannot be written to, or another run is at work in it. Then only rank 0 raises it; the other
            ranks exit with the same status.
    """
    missing = [folder for folder in (path, *path.parents) if not os.path.exists(folder)] if world.is_main else []
    lock, holder = _lock(path, waits) if world.is_main else (None, "")
    if world.from_main(holder):
        if not world.is_main:
            sys.exit(2)
        raise ValueError(f"--run-dir {path}: another run ({holder}) writes there; wait for it, end it, or name another folder")
    try:
        yield
    finally:
        if lock is not None:
            (path / FILE_NAME).unlink(missing_ok=True)
            close_locked(lock)
        with contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


def _lock(path: Path, waits: bool) -> tuple[FileIO | None, str]:
    """Locks a run folder. Returns the lock, and a description of the process that has it instead, or ""."""
    make_writable(path, "name another folder with --run-dir")
    deadline: float | None = None
    while True:
        try:
            lock = _try_to_lock(path / FILE_NAME)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s: the file system has no locks (%s); make sure that no other run writes there", path, error.strerror)
            return None, ""
        if lock is not None:
            return lock, ""
        holder = _read(path / FILE_NAME)
        if deadline is None:
            deadline = time.monotonic() + (WAIT_SECONDS if waits else 0)
            if waits:
                log.info("%s: another run (%s) writes there; waiting up to %.0f s for its end", path, holder, WAIT_SECONDS)
        if time.monotonic() >= deadline:
            return None, holder
        time.sleep(0.2)


def _try_to_lock(path: Path) -> FileIO | None:
    while lock := open_locked(path):
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return lock
        close_locked(lock)  # its holder has just removed it
    return None


def _read(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text() or "it has just started"
    return "it has just ended"
