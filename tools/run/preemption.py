"""Leaving when asked to: a signal is noted, and the run saves its state at the end of the step."""

import logging
import signal
import time
from types import FrameType, TracebackType

log = logging.getLogger("train")

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again. Told apart from a run that a signal killed (128 + its number).
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Left(Exception):  # noqa: N818  (not an error)
    """The run has saved its state and ends before its time."""


class Leave:
    """While it is entered, the signals that ask a process to end are noted in `signal` in place of ending it.

    A second Ctrl-C ends it at once, for whoever does not want to wait. Where a scheduler signals all processes, its signal and
    that of torchrun both arrive, so those within a second count as one.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._noted = 0.0

    def __enter__(self) -> "Leave":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is Left:
            # The process is about to end with its own code, and torchrun signals those that are not first. A handler in Python
            # would be gone before the last threads are.
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._noted = signal.Signals(number), time.monotonic()
            log.warning("%s: saving the run's state as soon as all processes can", self.signal.name)
        elif number == signal.SIGINT and time.monotonic() > self._noted + 1:
            raise KeyboardInterrupt
