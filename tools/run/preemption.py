"""Preemption: a signal asks the run to stop, and the run saves a checkpoint first."""

import logging
import signal
import time
from types import FrameType, TracebackType

log = logging.getLogger("train")

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again. A run that a signal killed exits with 128 + its number instead.
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Catches the signals that ask a process to end, and remembers the first one.

    A second Ctrl-C ends the process at once. If a scheduler signals all processes, its signal and torchrun's both arrive, so
    signals within a second count as one.

    Attributes:
        signal: The first signal, or `None`.
        is_obeyed: Set this when the run stops for the signal. Further signals are then ignored until the process has ended.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.is_obeyed = False
        self._caught = 0.0

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.is_obeyed:
            # torchrun signals the remaining processes once one has ended. While Python shuts down, handlers no longer
            # run, and a signal would kill the process and change its exit status.
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._caught = signal.Signals(number), time.monotonic()
            log.warning("%s: saving a checkpoint as soon as all processes can", self.signal.name)
        elif number == signal.SIGINT and time.monotonic() > self._caught + 1:
            raise KeyboardInterrupt
