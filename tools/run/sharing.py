"""Says in the log what other programs take from the CPUs of a run."""

import logging
import os
import socket

from model.distributed import World
from tools.considerate import Clock, Cores

log = logging.getLogger("train")

FEWEST_SECONDS = 20.0  # a judgment: in shorter epochs nobody minds


class Sharing:
    """Says once if other programs use the cores of this run. All ranks call its methods together.

    Args:
        world: This process and the others, whose work on the same machine is that of the run.
    """

    def __init__(self, world: World) -> None:
        self._world, self._clock, self._is_said = world, Clock(), False

    def epoch(self) -> None:
        """Warns of other programs if they took cores since the last call, and begins anew."""
        seconds, own, busy, idle = self._clock.lap()
        host = socket.gethostname()
        run = sum(of_rank for name, of_rank in self._world.gather((host, own)) if name == host)
        cores = Cores.used(seconds, run, busy, idle)
        if seconds >= FEWEST_SECONDS and not self._is_said and cores.is_shared:
            num_cores = len(os.sched_getaffinity(0))
            log.warning(
                "other programs used %.1f of the %d CPUs during this epoch, and this run %.1f; without the others, "
                "work on the CPU would be about %.1f times as fast",
                *(cores.others, num_cores, cores.run, num_cores / max(num_cores - cores.others, 0.01)),
            )
            self._is_said = True
