"""What other programs take from the CPUs of a command, and how torch's threads wait for each other then."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from pipelines.machine import busy_and_idle, cpu_seconds, num_cpus
from pipelines.openmp import use_threads
from tools.cli import SHORT_SPIN

# Judgments. Others disturb if they use so many cores, or such a part of all, and leave so small a part idle.
FEWEST_OTHERS, SMALLEST_PART, MOST_IDLE = 0.4, 0.05, 0.1
GONE = 0.75  # of that: they do not disturb any more. It is less, because threads that sleep leave others more.
LOOK_SECONDS = 1.0


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


@contextlib.contextmanager
def considerate_threads(device: torch.device, num_processes: int = 1) -> Iterator[None]:
    """Context in which torch's threads on a CPU sleep instead of spinning while other programs want the cores.

    A thread that spins keeps a core from the thread that it waits for. But sleeping costs a third of the rate of small steps
    if nobody else is there (docs/performance.md). Settings of the user for OpenMP come first. Nothing is done in runs of
    several processes, which would take each other for others, nor under a CPU quota, of which /proc knows nothing.

    Args:
        device: Device that the command computes on.
        num_processes: Processes of the run.
    """
    is_chosen = os.environ.get("GOMP_SPINCOUNT") == SHORT_SPIN and "OMP_WAIT_POLICY" not in os.environ
    is_limited = num_cpus() < len(os.sched_getaffinity(0))
    if device.type != "cpu" or num_processes > 1 or is_limited or not is_chosen:
        yield
        return
    end = threading.Event()
    watch = threading.Thread(target=_watch, args=(Clock(), end), name="watch other programs", daemon=True)
    watch.start()
    try:
        yield
    finally:
        end.set()
        watch.join()


def _watch(clock: Clock, end: threading.Event) -> None:
    """Lets threads sleep while others use the cores."""
    with contextlib.ExitStack() as sleeping:
        is_sleeping = False
        while not end.wait(LOOK_SECONDS):
            cores = Cores.used(*clock.lap())
            if not is_sleeping and cores.is_shared:
                sleeping.enter_context(_threads_sleep())
                is_sleeping = True
            elif is_sleeping and cores.disturbance < GONE:
                sleeping.close()
                is_sleeping = False


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
    # libgomp does not count this thread, so to have one more than CPUs takes two more.
    number = max(2, len(os.sched_getaffinity(0)) - torch.get_num_threads() + 2)
    use_threads(number)
    torch.zeros(number << 16, dtype=torch.uint8).add_(1)  # enough for torch to use them all
    end.wait()
