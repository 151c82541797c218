"""Ends this process, or its whole group, with SIGKILL just before it changes the file system for the N-th time.

`arm` is for processes that a test starts itself. Their children, which are spawned or started by torchrun, arm themselves
through `startup/sitecustomize.py`, which Python imports if its folder is on PYTHONPATH.
"""

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

VARIABLE = "FAULTS_KILL_SWITCH"
WRITES = os.O_WRONLY | os.O_RDWR
# Events of Python's audit hooks that announce a change, and how many of their first arguments are paths.
CHANGES = {"os.rename": 2, "os.link": 2, "os.symlink": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1}


def arm(folder: str, at: int, log: str) -> None:
    """Counts the changes below a folder from now on, and kills this process's group before number `at`.

    Args:
        folder: Other changes do not count.
        at: Number of the change, from 1; 0 kills nothing.
        log: File to which each change is appended, so that a first run tells how many there are; may be empty.
    """
    lock, count = threading.Lock(), 0

    def change(name: str, *paths: object) -> None:
        nonlocal count
        with lock:
            count += 1
            if log:
                descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.write(descriptor, f"{name} {' '.join(map(str, paths))}\n".encode())
                os.close(descriptor)
            if count == at:
                os.killpg(0, signal.SIGKILL)

    def is_below(path: object) -> bool:
        return (
            isinstance(path, str | bytes | os.PathLike)
            and path != log
            and os.path.abspath(os.fsdecode(path)).startswith(folder)
        )

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITES and is_below(path):
                change(event, path)
        elif event in CHANGES:
            paths = arguments[: CHANGES[event]]
            if any(map(is_below, paths)):
                change(event, *paths)

    sys.addaudithook(hook)
    _before("fsync", lambda descriptor: change("fsync", descriptor))


def _before(name: str, call: Callable[[int], None]) -> None:
    """Calls something before each call of a function of `os` that has no audit event."""
    real = getattr(os, name)

    def wrapped(descriptor: int) -> None:
        call(descriptor)
        real(descriptor)

    setattr(os, name, wrapped)


def end_at_size(num_bytes: int) -> None:
    """Lets this process, and those that it starts, die by a signal when a file would grow beyond a number of bytes.

    So it dies in the middle of a write. Python ignores this signal unless it is told otherwise.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def environment(folder: str, at: int, log: str) -> dict[str, str]:
    """Returns the variables with which the processes that a command starts arm themselves."""
    startup = os.path.join(os.path.dirname(__file__), "startup")
    path = [startup, os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), VARIABLE: f"{folder}\n{at}\n{log}"}


def arm_from_environment() -> None:
    if value := os.environ.get(VARIABLE):
        folder, at, log = value.split("\n")
        arm(folder, int(at), log)
