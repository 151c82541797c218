"""Ends the process if the loader waits too long for a read or a decoder: a dead file server blocks a read forever."""

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pipelines.bad_samples.silence import end_silence
from pipelines.printable import printable

INTERRUPTED_SECONDS = 5.0  # after Ctrl-C, until a blocked read is abandoned with its process
NAMES_SECONDS = 5.0  # for the names of the samples: the server that blocks the read may hold the index files too


@dataclass(eq=False)
class _Wait:
    """A wait in progress, its limit, and the exit status. `describe` says what it is about, and may itself read files."""

    what: str
    began: float  # seconds since the epoch
    describe: Callable[[], str]
    seconds: float
    status: int


class Watchdog:
    """Watches the waits of one loader in one background thread. A blocked call in C cannot be ended, but its process can.

    Args:
        seconds: Longest wait.
        option: Flag that sets it, for messages. Empty if there is none.
    """

    def __init__(self, seconds: float, option: str = "") -> None:
        self.seconds, self.option = seconds, option
        self.wait: _Wait | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def waiting(self, what: str, describe: Callable[[], str]) -> Iterator[None]:
        """Watches what happens in this context. A context within another one restarts the time of the outer one.

        Args:
            what: What is awaited, as the subject of a sentence.
            describe: Returns the samples that it is about.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=_watch, args=(weakref.ref(self), self._closed), name="watchdog", daemon=True)
            self._thread.start()
        limit = (min(self.seconds, INTERRUPTED_SECONDS), 130) if _is_interrupted() else (self.seconds, 1)
        outer, self.wait = self.wait, _Wait(what, time.time(), describe, *limit)
        try:
            yield
        finally:
            self.wait = outer and replace(outer, began=time.time())

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()


def _is_interrupted() -> bool:
    """Returns whether the caller cleans up after Ctrl-C. What blocked before it may block the end of the process too."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _watch(watchdog: "weakref.ref[Watchdog]", closed: threading.Event) -> None:
    """Looks several times per wait whether it is still the same. Ends with its watchdog."""
    seen, waited, before, interval = None, 0.0, time.monotonic(), 0.0
    while not closed.wait(interval) and (dog := watchdog()) is not None:
        now = time.monotonic()
        # A process that was stopped, or a machine that slept, did not wait.
        waited = waited + min(now - before, 2 * interval) if dog.wait is seen else 0.0
        seen, before = dog.wait, now
        interval = min(1.0, (seen or dog).seconds / 20)
        if seen is not None and waited >= seen.seconds:
            _end(seen, dog)
        del dog


def _end(wait: _Wait, dog: Watchdog) -> None:
    """Reports the wait in one line and ends the process, without running anything that could be blocked as well."""
    if wait.status == 130:
        line = f"interrupted; {wait.what} does not end"
    else:
        samples = _within(NAMES_SECONDS, wait.describe) or "its samples cannot be named, as their index files are blocked too"
        began = time.strftime("%H:%M:%S", time.localtime(wait.began))
        after = f"{dog.seconds:g} s ({dog.option})" if dog.option else f"{dog.seconds:g} s"
        line = f"error: {wait.what} began at {began} and has not ended after {after}; {samples}"
    end_silence()
    with contextlib.suppress(OSError):  # the terminal has gone
        os.write(2, (printable(line) + "\n").encode(errors="backslashreplace"))  # not print: its lock may be held
    os._exit(wait.status)


def _within(seconds: float, describe: Callable[[], str]) -> str:
    """Returns the description, or an empty text if it takes too long or fails."""
    found = [""]

    def run() -> None:
        with contextlib.suppress(Exception):  # the report must not depend on it
            found[0] = describe()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]
