"""Tells from the kernel's clocks how many of the machine's cores other programs take from a run."""

import logging
import os
import socket
import time
from pathlib import Path

from model.distributed import World
from tools.throughput.turn import CLOCK_TICKS, cpu_seconds

log = logging.getLogger("train")

# Judgments: in shorter epochs nobody minds, and others disturb if they use so many cores and leave so little idle.
FEWEST_SECONDS, FEWEST_OTHERS, MOST_IDLE = 20.0, 0.25, 0.1


class Sharing:
    """Says once if other programs use the cores of this run. All ranks call its methods together.

    Args:
        world: This process and the others, whose work on the same machine is that of the run.
    """

    def __init__(self, world: World) -> None:
        self._world, self._is_said = world, False
        self._start()

    def _start(self) -> None:
        self._started, self._own, (self._busy, self._idle) = time.monotonic(), cpu_seconds(), _clocks()

    def epoch(self) -> None:
        """Warns of other programs if they took cores since the last call, and begins anew."""
        seconds, (busy, idle) = time.monotonic() - self._started, _clocks()
        mine = (socket.gethostname(), cpu_seconds() - self._own)
        own = sum(of_rank for host, of_rank in self._world.gather(mine) if host == mine[0])
        others, idle = (busy - self._busy - own) / seconds, (idle - self._idle) / seconds
        if seconds >= FEWEST_SECONDS and not self._is_said and others >= FEWEST_OTHERS and idle <= MOST_IDLE:
            num_cores = len(os.sched_getaffinity(0))
            log.warning(
                "other programs used %.1f of the %d CPUs during this epoch, and this run %.1f; without the others, "
                "work on the CPU would be about %.1f times as fast",
                *(others, num_cores, own / seconds, num_cores / max(num_cores - others, 0.01)),
            )
            self._is_said = True
        self._start()


def _clocks() -> tuple[float, float]:
    """Returns the seconds that the cores of this process were busy and idle (man 5 proc_stat). Stolen time is busy."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    # user, nice, system, idle, iowait, irq, softirq, steal; guests' time follows, and is part of the user's
    times = [[int(ticks) for ticks in row[1:9]] for row in rows if row[0] in cores]
    idle = sum(row[3] + row[4] for row in times)
    return (sum(map(sum, times)) - idle) / CLOCK_TICKS, idle / CLOCK_TICKS
