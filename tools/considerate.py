"""What other programs take from the CPUs of a command, and how torch's threads wait for each other then."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from pipelines.openmp import use_threads
from tools.cli import SHORT_SPIN
from tools.throughput.turn import CLOCK_TICKS, cpu_seconds

# Judgments. Others disturb if they use so many cores and leave so small a part of all idle.
FEWEST_OTHERS, MOST_IDLE = 0.4, 0.1
GONE = 0.3  # others do not disturb any more; less than above, because threads that sleep leave others more
LOOK_SECONDS = 1.0


class Cores(NamedTuple):
    """Cores that were used on average."""

    run: float
    others: float
    idle: float

    @property
    def is_shared(self) -> bool:
        return self.others >= FEWEST_OTHERS and self.idle <= MOST_IDLE * sum(self)


class Clock:
    """Tells from the kernel's clocks who uses the cores of this process.

    Args:
        local_size: Processes of the run on this machine. If there are several, all that their parent has started are the run.
    """

    def __init__(self, local_size: int) -> None:
        self._pid = os.getpid() if local_size == 1 else os.getppid()
        self.lap()

    def lap(self) -> tuple[float, Cores]:
        """Returns the seconds since the last call, and the cores that were used meanwhile."""
        now = time.monotonic(), cpu_seconds(self._pid), *_busy_and_idle()
        before, self._last = getattr(self, "_last", now), now
        seconds, own, busy, idle = (new - old for new, old in zip(now, before, strict=True))
        return seconds, Cores(*((used / seconds if seconds else 0.0) for used in (own, busy - own, idle)))


@contextlib.contextmanager
def considerate_threads(device: torch.device, local_size: int = 1) -> Iterator[None]:
    """Context in which torch's threads on a CPU sleep instead of spinning while other programs want the cores.

    A thread that spins keeps a core from the thread that it waits for. But sleeping costs a third of the rate of small steps
    if nobody else is there (docs/performance.md). Settings of the user for OpenMP come first.
    """
    is_chosen = os.environ.get("GOMP_SPINCOUNT") == SHORT_SPIN and "OMP_WAIT_POLICY" not in os.environ
    if device.type != "cpu" or not is_chosen:
        yield
        return
    end = threading.Event()
    watch = threading.Thread(target=_watch, args=(Clock(local_size), end), name="watch other programs", daemon=True)
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
            _, cores = clock.lap()
            if not is_sleeping and cores.is_shared:
                sleeping.enter_context(_threads_sleep())
                is_sleeping = True
            elif is_sleeping and cores.others < GONE:
                sleeping.close()
                is_sleeping = False


@contextlib.contextmanager
def _threads_sleep() -> Iterator[None]:
    """Context in which OpenMP's threads spin for a moment only before they sleep.

    While a process has more OpenMP threads than CPUs, libgomp spins for at most 100 turns (GOMP_SPINCOUNT in its manual). So
    this starts as many as there are CPUs, which have nothing to do.
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
    number = len(os.sched_getaffinity(0))
    use_threads(number)
    torch.zeros(number << 16, dtype=torch.uint8).add_(1)  # enough for torch to use them all
    end.wait()


def _busy_and_idle() -> tuple[float, float]:
    """Returns the seconds that the cores of this process were busy and idle (man 5 proc_stat). Stolen time is busy."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    # user, nice, system, idle, iowait, irq, softirq, steal; guests' time follows, and is part of the user's
    times = [[int(ticks) for ticks in row[1:9]] for row in rows if row[0] in cores]
    idle = sum(row[3] + row[4] for row in times)
    return (sum(map(sum, times)) - idle) / CLOCK_TICKS, idle / CLOCK_TICKS
