"""When a run saves a checkpoint and when it stops, on all ranks alike."""

import dataclasses
import logging
import time

from model.job import Job
from pipelines.loader import Loader
from pipelines.meter import Meter
from tools.run.checkpoints import Checkpoints
from tools.run.config import CheckpointConfig
from tools.run.preemption import AGREE_EVERY, Preemption
from tools.run.run_folder import RunFolder

log = logging.getLogger("train")

SAVE, STOP = 1, 2


class Saver:
    """Saves checkpoints between steps. All ranks call its methods together.

    Attributes:
        must_stop: Whether the run stops after the next checkpoint, because a signal has asked for it.

    Args:
        config: When to save.
        job: The state to save.
        loader: The training loader, whose position is saved.
        meter: Its rates.
        folder: The folder of the run.
        preemption: Knows whether a signal has arrived.
        started: Value of `time.monotonic` when this process started or resumed the run.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        job: Job,
        loader: Loader,
        meter: Meter,
        folder: RunFolder,
        preemption: Preemption,
        started: float,
    ) -> None:
        self._config, self._job, self._loader, self._meter = config, job, loader, meter
        self._folder, self._preemption = folder, preemption
        self._checkpoints = Checkpoints(folder.path, config.keep)
        if job.world.is_main:
            self._checkpoints.tidy()
        self._started, self._saved_at, self._seconds_before = started, time.monotonic(), job.seconds
        self.must_stop = False

    def due(self) -> bool:
        """Returns whether to save after this step; sets `must_stop` if a signal has arrived at any rank."""
        job, minutes = self._job, self._config.every_minutes
        wish = 0
        if job.world.size == 1 or job.step % AGREE_EVERY == 0:
            is_time = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
            wish = job.world.max(STOP if self._preemption.signal else SAVE if is_time and job.world.is_main else 0)
        self.must_stop = wish == STOP
        return wish > 0 or (self._config.every_steps is not None and job.step % self._config.every_steps == 0)

    def save(self, best: float | None = None) -> None:
        """Saves a checkpoint. Another thread writes it while training continues.

        Args:
            best: The score at the end of an epoch. The checkpoint becomes best.pt if the score is higher than all earlier ones.

        Raises:
            OSError: The previous checkpoint could not be written.
        """
        job = self._job
        is_best = best is not None and (best > job.best or job.epoch == 1)
        job.best = max(job.best, best or 0.0)
        own = {**job.rank_state(), "loader": self._loader.state_dict(), "rates": dataclasses.asdict(self._meter.total)}
        ranks = job.world.gather(own)
        self._saved_at = time.monotonic()
        if not job.world.is_main:
            return
        job.seconds = self._seconds_before + self._saved_at - self._started
        state = {**job.state_dict(), "ranks": ranks, "metrics_bytes": self._folder.flush(), "config": self._folder.settings}
        self._checkpoints.save(state, job.step, is_best=is_best)

    @property
    def is_signalled(self) -> bool:
        """Whether a signal has arrived at this rank."""
        return self._preemption.signal is not None

    def agree_to_stop(self, is_work_left: bool) -> None:
        """Sets `must_stop` if work is left and a signal has arrived at any rank."""
        self.must_stop = is_work_left and bool(self._job.world.max(int(self.is_signalled)))

    def finish(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: A checkpoint could not be written.
        """
        self._checkpoints.wait()
        if not self.must_stop:
            return
        self._job.world.barrier()  # torchrun ends all ranks once one has ended
        self._preemption.is_obeyed = True
        name = self._preemption.signal.name if self._preemption.signal else "a signal at another process"
        path = self._folder.path
        log.info("%s: the checkpoint is saved; continue with the same command and --run-dir %s --resume auto", name, path)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self._checkpoints.close()
