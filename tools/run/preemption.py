"""Preemption: a signal asks the run to stop, and the run saves a checkpoint first."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from types import FrameType, TracebackType

log = logging.getLogger("train")

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again. A run that a signal killed exits with 128 + its number instead.
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Steps between two agreements of the ranks on saving or stopping. Each is a round trip between the hosts.
AGREE_EVERY = 10
JOIN_SECONDS = 5.0  # the thread may hang in a log line, if nobody reads the terminal or the pipe
INTERRUPTED = "interrupted; earlier checkpoints, if any, are intact, and --resume auto continues from the newest"


class Preemption:
    """Catches the signals that ask a process to end, and remembers the first one.

    Ctrl-C after that ends the process at once. If a scheduler signals all processes, its signal and torchrun's both arrive, so
    signals within a second count as one.

    Python runs a handler only after the C function that the main thread is in, and a convolution may take a minute. Therefore
    a thread answers: the interpreter writes each signal to a pipe as it arrives (`signal.set_wakeup_fd`).

    Attributes:
        signal: The first signal, or `None`.
        is_obeyed: Set this when the run stops for the signal. Further signals are then ignored until the process has ended.

    Args:
        num_processes: Number of processes that train together.
    """

    def __init__(self, num_processes: int) -> None:
        self.signal: signal.Signals | None = None
        self.is_obeyed = False
        end = "the end of the current step or validation batch"
        if num_processes > 1:
            end = f"all {num_processes} processes, which agree every {AGREE_EVERY} steps and after each validation"
        self._answer_text = f"the run waits for {end}, then saves a checkpoint and ends"

    def __enter__(self) -> "Preemption":
        arrivals, self._arrived = os.pipe()
        os.set_blocking(self._arrived, False)
        self._answerer = threading.Thread(target=self._answer, args=(arrivals,), name="signals", daemon=True)
        self._answerer.start()
        self._before_wakeup = signal.set_wakeup_fd(self._arrived, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        # torchrun signals the remaining processes once one has ended. While Python shuts down, handlers no longer run, and a
        # signal would kill the process and change its exit status.
        ignored = dict.fromkeys(SIGNALS, signal.SIG_IGN) if self.is_obeyed else {}
        for number, handler in (self._before | ignored).items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_wakeup)
        os.close(self._arrived)
        self._answerer.join(JOIN_SECONDS)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)

    def _answer(self, arrivals: int) -> None:
        """Answers the signals, whose numbers come as bytes from a pipe, until the pipe is closed."""
        heard: float | None = None
        with open(arrivals, "rb", buffering=0) as pipe:
            while arrived := pipe.read(1):
                [number] = arrived
                if number not in SIGNALS:
                    continue
                if heard is None:
                    heard = time.monotonic()
                    self._remember(number, None)
                    again = "a second Ctrl-C" if number == signal.SIGINT else "Ctrl-C"
                    text = "%s: %s; %s ends it at once, without a checkpoint"
                    log.warning(text, signal.Signals(number).name, self._answer_text, again)
                elif number == signal.SIGINT and time.monotonic() > heard + 1 and not self.is_obeyed:
                    end_at_once()


def end_at_once() -> None:
    """Ends this process and its children, whatever the main thread does."""
    for child in multiprocessing.active_children():  # the workers of a loader
        child.kill()
    with contextlib.suppress(OSError):  # the terminal has gone
        os.write(2, f"{INTERRUPTED}\n".encode())  # not print: another thread may hold the lock of stderr
    os._exit(130)
