"""What other programs take from the CPUs of a command, and how many threads torch uses then, and how they wait."""

import contextlib
import logging
import os
import statistics
import threading
import time
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch

from pipelines.machine import busy_and_idle, cpu_seconds, num_cpus
from pipelines.openmp import use_threads
from tools.cli import SHORT_SPIN

log = logging.getLogger("train")

# Judgments. Others disturb if they use so many cores, or such a part of all, and leave so small a part idle.
FEWEST_OTHERS, SMALLEST_PART, MOST_IDLE = 0.4, 0.05, 0.1
GONE = 0.75  # of that: they do not disturb any more. It is less, because threads that sleep leave others more.
LOOK_SECONDS = 1.0
# Judgments. A number of threads is tried for so many seconds and steps. The better one is kept for so many times as long as the
# trials took, so they cost a small part of the time.
TRIAL_SECONDS, TRIAL_STEPS, TRIALS_APART = 2.0, 3, 10


class Cores(NamedTuple):
    """Cores that were used on average."""

    run: float
    others: float
    idle: float

    @classmethod
    def used(cls, seconds: float, own: float, busy: float, idle: float) -> "Cores":
        """Returns the cores from what `Clock.lap` measured."""
        return cls(own / seconds, (busy - own) / seconds, idle / seconds)

    @property
    def disturbance(self) -> float:
        """What others use, relative to what disturbs."""
        return self.others / max(FEWEST_OTHERS, SMALLEST_PART * sum(self))

    @property
    def is_shared(self) -> bool:
        return self.disturbance >= 1 and self.idle <= MOST_IDLE * sum(self)


class Clock:
    """Tells from the kernel's clocks how the CPUs of this process are used."""

    def __init__(self) -> None:
        self._last = self._now()

    def lap(self) -> tuple[float, float, float, float]:
        """Returns the seconds since the last call, and CPU seconds: of this process and its descendants, of all, and idle."""
        before, self._last = self._last, self._now()
        seconds, own, busy, idle = (new - old for new, old in zip(self._last, before, strict=True))
        return seconds, own, busy, idle

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        return time.monotonic(), cpu_seconds(), *busy_and_idle()


class Threads:
    """How many threads torch uses in the thread that made this object: those set then, or fewer if that is faster.

    Beside other programs, more threads get a larger share of the cores, but all wait for the one that lacks a core. What counts
    more depends on the cores, the others and the size of a step, so both are tried by turns.

    Args:
        is_fixed: Whether the number has to stay.
    """

    def __init__(self, *, is_fixed: bool) -> None:
        self.free: float | None = None  # cores that others leave; None if there are no others
        self.is_trying = False
        self._most = self._best = self._number = torch.get_num_threads()
        self._is_fixed = is_fixed or self._most == 1
        self._is_said = False
        self._last: float | None = None
        self._numbers: Generator[int, float, None] | None = None

    def adapt(self) -> None:
        """Sets the number for the next step. Only the thread that made this object calls it, before each step."""
        before, self._last = self._last, time.monotonic()
        if self.free is None or self._is_fixed:
            self.restore()
            return
        if self._numbers is None:
            self._numbers = self._tried_by_turns()
            self._number = next(self._numbers)
        elif before is not None:
            self._number = self._numbers.send(self._last - before)
        torch.set_num_threads(self._number)

    def settle(self) -> None:
        """Sets the better number for work of another kind, which is not compared."""
        self._last = None
        if self.free is None:
            self.restore()
        elif self._numbers is not None:
            torch.set_num_threads(self._best)

    def restore(self) -> None:
        """Sets the first number again."""
        if self._numbers is not None:
            self._numbers, self.is_trying, self._best = None, False, self._most
            torch.set_num_threads(self._most)

    def _tried_by_turns(self) -> Generator[int, float, None]:
        """Yields the number for each step, and is sent the seconds that the step took."""
        while True:
            self.is_trying = True
            seconds_of_most, cost = yield from _trial(self._most)
            fewer = max(1, min(self._most - 1, int(self.free or 0)))  # beside all threads, others may get less than they would
            seconds_of_fewer, cost_of_fewer = yield from _trial(fewer)
            self._best = fewer if seconds_of_fewer < seconds_of_most else self._most
            self.is_trying = False
            if self._best < self._most and not self._is_said:
                self._is_said = True
                log.info(
                    "beside other programs, torch is faster with %d of its %d threads; --torch-threads %d would keep all",
                    *(fewer, self._most, self._most),
                )
            end = time.monotonic() + TRIALS_APART * (cost + cost_of_fewer)
            while time.monotonic() < end:
                yield self._best


def _trial(number: int) -> Generator[int, float, tuple[float, float]]:
    """Yields a number of threads for some steps, and returns the seconds of a step and of all."""
    yield number  # the first step prepares kernels for this number
    trial = [(yield number)]
    while sum(trial) < TRIAL_SECONDS or len(trial) < TRIAL_STEPS:
        trial.append((yield number))
    return statistics.median(trial), sum(trial)


@contextlib.contextmanager
def considerate_threads(device: torch.device, num_processes: int = 1, *, is_fixed: bool = True) -> Iterator[Threads]:
    """Context in which torch is considerate of other programs that want the cores.

    Its threads on a CPU sleep instead of spinning then: a thread that spins keeps a core from the thread that it waits for. But
    small steps are a third slower if threads sleep while nobody else is there. It also has fewer threads if that is faster
    (docs/performance.md). Settings of the user for OpenMP come first. Nothing is done in runs of several processes, which would
    take each other for others, nor under a CPU quota, of which /proc knows nothing.

    Args:
        device: Device that the command computes on.
        num_processes: Processes of the run.
        is_fixed: Whether the number of threads has to stay, because results depend on it in their last bits.

    Yields:
        What sets the number of threads between two steps.
    """
    is_chosen = os.environ.get("GOMP_SPINCOUNT") == SHORT_SPIN and "OMP_WAIT_POLICY" not in os.environ
    is_limited = num_cpus() < len(os.sched_getaffinity(0))
    threads = Threads(is_fixed=is_fixed)
    if device.type != "cpu" or num_processes > 1 or is_limited or not is_chosen:
        yield threads
        return
    end = threading.Event()
    watch = threading.Thread(target=_watch, args=(Clock(), threads, end), name="watch other programs", daemon=True)
    watch.start()
    try:
        yield threads
    finally:
        end.set()
        watch.join()
        threads.restore()


def _watch(clock: Clock, threads: Threads, end: threading.Event) -> None:
    """Looks for others that use the cores."""
    is_sleeping = False
    with contextlib.ExitStack() as sleeping:
        try:
            while not end.wait(LOOK_SECONDS):
                cores = Cores.used(*clock.lap())
                if not is_sleeping and cores.is_shared:
                    sleeping.enter_context(_threads_sleep())
                    is_sleeping = True
                elif is_sleeping and cores.disturbance < GONE:
                    sleeping.close()
                    is_sleeping = False
                threads.free = sum(cores) - cores.others if is_sleeping else None
        finally:
            threads.free = None


@contextlib.contextmanager
def _threads_sleep() -> Iterator[None]:
    """Context in which OpenMP's threads spin for a moment only before they sleep.

    While a process has more OpenMP threads than CPUs, libgomp spins for at most 100 turns (GOMP_SPINCOUNT in its manual). So
    this starts the threads that are missing, which have nothing to do.
    """
    end = threading.Event()
    idle = threading.Thread(target=_hold_threads, args=(end,), name="hold threads of OpenMP", daemon=True)
    idle.start()
    try:
        yield
    finally:
        end.set()
        idle.join()


def _hold_threads(end: threading.Event) -> None:
    number = len(os.sched_getaffinity(0)) + 2  # libgomp does not count this thread, so they are one more than the CPUs
    use_threads(number)
    torch.zeros(number << 16, dtype=torch.uint8).add_(1)  # enough for torch to use them all
    end.wait()
