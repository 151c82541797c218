"""What a run leaves on the disk: its settings, its metrics, TensorBoard's files, its saved states."""

import dataclasses
import errno
import io
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from model.checkpoint import load_checkpoint
from model.distributed import World
from model.evaluation import Evaluation
from model.job import Job
from pipelines.files import replace_text
from pipelines.loader import Loader, state_for_others
from pipelines.meter import Meter, Rates
from tools.run.checkpoints import Checkpoints, newest_checkpoint
from tools.run.config import Config
from tools.run.tensorboard_images import batch_picture, captions, confusion_picture, mistake_captions

log = logging.getLogger("train")

METRICS = "metrics.jsonl"


class RunFolder:
    """config.json, metrics.jsonl, TensorBoard's files, and the saved states; rank 0 writes, the others take part in saving.

    Metrics that cannot be written are a warning, a state that cannot be written ends the run.

    Attributes:
        is_resumed: Whether there is a saved state to go on from.

    Args:
        path: The folder, the same for all ranks.
        config: The run's settings.
        world: This process and the others.

    Raises:
        ValueError: The folder holds a run, and it is not to be gone on with, or was begun with other settings.
    """

    def __init__(self, path: Path, config: Config, world: World) -> None:
        self.path, self._world = path, world
        self._config = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        self._resume = config.resume == "auto"
        self._is_warned = False
        self._metrics: io.FileIO | None = None
        self._tensorboard: SummaryWriter | None = None
        if not self._resume and (path / METRICS).exists():
            raise ValueError(
                f"--run-dir {path} holds a run already; go on with it (--resume auto), name another folder, or remove it"
            )
        newest = world.from_main(newest_checkpoint(path) if self._resume and world.is_main else None)
        self._saved = load_checkpoint(newest) if newest else None
        self.is_resumed = self._saved is not None
        if self._saved is not None:
            if "ranks" not in self._saved:
                raise ValueError(f"{newest} is of another version, from which this one cannot go on; take another --run-dir")
            check_same_run(self._saved["config"], self._config)
        self._checkpoints = Checkpoints(path, config.checkpoint.keep)
        self._every_seconds = 60 * config.checkpoint.every_minutes if config.checkpoint.every_minutes else float("inf")
        self._saved_at = self._begun_at = time.monotonic()

    def begin(self, job: Job, loader: Loader, meter: Meter) -> None:
        """Opens the files; if the run is being resumed, brings everything to where it last saved its state."""
        saved, self._saved = self._saved, None
        if saved is not None:
            ranks = saved["ranks"]
            if len(ranks) == job.world.size:
                own = ranks[job.world.rank]
            else:  # the random numbers of rank 0 for all would give all ranks the same dropout
                own = {**ranks[0], "rng": job.rank_state()["rng"]}
                own["loader"] = state_for_others([rank["loader"] for rank in ranks])
            loader.load_state_dict(own["loader"])
            job.load_state_dict(saved, own)
            meter.total = Rates(**own["rates"])
            log.info("resuming %s after step %d", self.path, job.step)
        if not job.world.is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.path / "config.json", json.dumps(self._config, indent=2) + "\n")
        self._metrics = open(self.path / METRICS, "ab", buffering=0)  # noqa: SIM115  (closed by `close`)
        # What a killed run wrote after it last saved its state will be written again.
        self._metrics.truncate(min(saved["metrics_bytes"] if saved else 0, self._metrics.tell()))
        self._metrics.seek(0, os.SEEK_END)  # `tell` would go on from what was there before
        self._tensorboard = SummaryWriter(str(self.path), purge_step=job.step + 1 if self._resume else None)
        self._job_seconds = job.seconds

    def write(self, metrics: dict[str, Any], step: int) -> None:
        """One line of metrics.jsonl, and its numbers as scalars `SPLIT/NAME` for TensorBoard."""
        if self._metrics is None:
            return
        # JSON has neither NaN nor infinity: the loss of a network that has failed is null.
        failed = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        metrics = metrics | dict.fromkeys(failed)
        end, line = self._metrics.tell(), json.dumps(metrics, allow_nan=False).encode() + b"\n"
        try:
            if self._metrics.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._metrics.truncate(end)
            self._metrics.seek(end)
            self._warn(error)
        for name, value in metrics.items():
            if name not in ("split", "epoch", "step") and value is not None:
                self._to_tensorboard("add_scalar", f"{metrics['split']}/{name}", value, step)

    def write_batch(self, images: Tensor, target: Tensor, classes: tuple[str, ...] | None) -> None:
        """A picture of a training batch, `(N, 3, H, W)` normalized, as the network sees it, with what it is to say."""
        if self._world.is_main:
            picture = batch_picture(images, captions(target, classes))
            self._to_tensorboard("add_image", "train/batch", picture, 0, dataformats="HWC")

    def write_evaluation(self, evaluation: Evaluation, classes: tuple[str, ...] | None, step: int) -> None:
        """Pictures of the worst mistakes on the validation split, and of which classes are taken for which."""
        if not self._world.is_main:
            return
        mistakes = evaluation.mistakes
        if mistakes is not None:
            texts = mistake_captions(mistakes.targets, mistakes.predictions, mistakes.probabilities, classes)
            picture = batch_picture(mistakes.images, texts)
            self._to_tensorboard("add_image", "valid/worst_mistakes", picture, step, dataformats="HWC")
        if evaluation.confusion is not None:
            picture = confusion_picture(evaluation.confusion, classes)
            self._to_tensorboard("add_image", "valid/confusion", picture, step, dataformats="HWC")

    def write_results(self, scores: dict[str, float]) -> None:
        """The settings with what they led to, for TensorBoard's table of hyperparameters."""
        if self._world.is_main:
            settings = {
                name: value if isinstance(value, int | float | bool) else str(value) for name, value in flat(self._config)
            }
            results = {f"result/{name}": value for name, value in scores.items()}
            self._to_tensorboard("add_hparams", settings, results, run_name=".")

    def _to_tensorboard(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._tensorboard is None:
            return
        try:
            getattr(self._tensorboard, method)(*arguments, **options)
        except OSError as error:
            self._warn(error)
            self._tensorboard = None  # its thread is dead from then on

    def _warn(self, error: OSError) -> None:
        if not self._is_warned:
            log.warning("metrics cannot be written to %s (%s); training goes on, and they are missing there", self.path, error)
            self._is_warned = True

    def is_time_to_save(self) -> bool:
        """Whether `--checkpoint.every-minutes` have passed since the last save; asked by rank 0 for all."""
        return self._world.is_main and time.monotonic() - self._saved_at >= self._every_seconds

    def save(self, job: Job, loader: Loader, meter: Meter, best: float | None = None) -> None:
        """Saves the state, which is written while training goes on; all ranks call it together.

        Args:
            job: At a step's end.
            loader: Of the training split.
            meter: Its rates.
            best: At the end of an epoch its score, which makes the state the best where that is the best so far.

        Raises:
            OSError: The state before could not be written.
        """
        is_best = best is not None and (best > job.best or job.epoch == 1)
        job.best = max(job.best, best or 0.0)
        ranks = job.world.gather({**job.rank_state(), "loader": loader.state_dict(), "rates": dataclasses.asdict(meter.total)})
        self._saved_at = time.monotonic()
        if self._metrics is None:
            return
        job.seconds = self._job_seconds + self._saved_at - self._begun_at
        try:
            os.fsync(self._metrics.fileno())
        except OSError as error:  # file systems over a network may notice only here that they are full
            self._warn(error)
        state = {**job.state_dict(), "ranks": ranks, "metrics_bytes": self._metrics.tell(), "config": self._config}
        self._checkpoints.save(state, job.step, is_best=is_best)

    def finish(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: It could not be.
        """
        self._checkpoints.wait()

    def close(self) -> None:
        """Closes the files."""
        self._checkpoints.close()
        if self._metrics is not None:
            self._metrics.close()
        self._to_tensorboard("close")


# Settings that may change when a run is resumed: they change neither the global batches nor the arithmetic, or not knowingly.
FREE_SETTINGS = (
    *("run_dir", "resume", "recipe", "checkpoint", "log_every", "device", "torch_threads", "profile", "max_nonfinite_steps"),
    *("data.train", "data.valid"),  # they may have been moved; the loader compares what they hold
    *("batch_size", "accumulate_steps"),  # other numbers of ranks may make the same steps; the job compares images a step
    *("init_from", "init_from_partial"),  # what came of it is in the state
    *(f"data.{name}" for name in ("threads", "prefetch", "hw_decoder_load", "tuned")),
    *(f"data.{name}" for name in ("index_dir", "cache_dir", "cache_gigabytes")),
    *(f"data.{name}" for name in ("on_error", "max_bad_fraction", "quarantine")),
)


def check_same_run(saved: dict[str, Any], config: dict[str, Any]) -> None:
    """Compares the settings of a run with those with which it is to go on.

    Raises:
        ValueError: One has changed on which the result depends.
    """
    before = dict(flat(saved))
    for name, value in flat(config):
        if any(name == free or name.startswith(f"{free}.") for free in FREE_SETTINGS):
            continue
        if name not in before or before[name] == value:  # a version of this program that lacked a setting had its default
            continue
        flag = f"--{name}".replace("_", "-")
        raise ValueError(f"--resume auto: the run was begun with {flag} {before[name]}, and now it is {value}")


def flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The settings of a config, those of its parts by `part.name`."""
    pairs = []
    for name, value in config.items():
        pairs += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return pairs
