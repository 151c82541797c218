"""The output of a run: its settings, its metrics, TensorBoard's files, and what the trackers get."""

import errno
import io
import json
import logging
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from model.distributed import World
from model.evaluation import MOST_CONFUSED_CLASSES, Evaluation
from pipelines.files import replace_text
from pipelines.printable import printable
from pipelines.shards.labels import class_names
from tools.run.tensorboard_images import batch_picture, captions, confusion_picture, mistake_captions
from tools.run.trackers.build import start_trackers

log = logging.getLogger("train")

METRICS = "metrics.jsonl"
OF_CLASSES = ("classes", "class_weights")  # lists in config.json, too long for a table of settings
RECALL_EDGES = [5.0 * i for i in range(21)]  # percent, of the histogram


class RunFolder:
    """Writes config.json, metrics.jsonl, and TensorBoard's files, and fills the queues of the trackers. Only rank 0 does.

    If metrics cannot be written, a warning says so, and training continues.

    Args:
        path: The folder, which all ranks share.
        settings: The settings of the run as JSON values.
        world: This process and the others.
        resumed: The checkpoint that is resumed, if any. Metrics that a killed run wrote after it are removed.
    """

    def __init__(self, path: Path, settings: dict[str, Any], world: World, *, resumed: dict[str, Any] | None) -> None:
        self.path, self.settings, self._is_main = path, settings, world.is_main
        self._is_warned = False
        self._metrics: io.FileIO | None = None
        self._tensorboard: SummaryWriter | None = None
        if not world.is_main:
            return
        path.mkdir(parents=True, exist_ok=True)
        replace_text(path / "config.json", json.dumps(settings, indent=2) + "\n")
        self._metrics = open(path / METRICS, "ab", buffering=0)  # noqa: SIM115  (`close` closes it)
        self._metrics.truncate(min(resumed["metrics_bytes"] if resumed else 0, self._metrics.tell()))
        self._metrics.seek(0, os.SEEK_END)  # `tell` would still return the old end
        # TensorBoard drops later events, which a killed run wrote after its last checkpoint, or before its first one.
        self._tensorboard = SummaryWriter(str(path), purge_step=1 + (resumed["step"] if resumed else 0))
        names = settings.get("log", [])
        self._trackers = start_trackers(names, path, {key: value for key, value in flat(settings) if key not in OF_CLASSES})

    def write(self, metrics: dict[str, Any], step: int) -> None:
        """Writes a line of metrics.jsonl, and its numbers as TensorBoard scalars `SPLIT/NAME`."""
        if self._metrics is None:
            return
        # JSON has neither NaN nor infinity. The loss of a diverged network becomes null.
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
        values = {name: value for name, value in metrics.items() if name not in ("split", "epoch", "step")}
        scalars = {f"{metrics['split']}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        for name, value in scalars.items():
            self._to_tensorboard("add_scalar", name, value, step)
        self._trackers.log(scalars, step)

    def write_batch(self, images: Tensor, target: Tensor, classes: tuple[str, ...] | None) -> None:
        """Writes an image of a training batch `(N, 3, H, W)`, normalized, with its targets."""
        if self._is_main:
            picture = batch_picture(images, captions(target, classes))
            self._to_tensorboard("add_image", "train/batch", picture, 0, dataformats="HWC")

    def write_evaluation(self, evaluation: Evaluation, classes: tuple[str, ...] | None, step: int) -> None:
        """Writes what the validation split shows: the recall of each class, the worst mistakes, and the confusion matrix."""
        if not self._is_main:
            return
        mistakes = evaluation.mistakes
        if mistakes is not None:
            texts = mistake_captions(mistakes.targets, mistakes.predictions, mistakes.probabilities, classes)
            picture = batch_picture(mistakes.images, texts)
            self._to_tensorboard("add_image", "valid/worst_mistakes", picture, step, dataformats="HWC")
        if evaluation.confusion is not None:
            picture = confusion_picture(evaluation.confusion, classes)
            self._to_tensorboard("add_image", "valid/confusion", picture, step, dataformats="HWC")
        for prefix in ("", "ema_"):
            self._write_recall(f"{prefix}recall", evaluation.recall(f"{prefix}top1"), classes, step)

    def _write_recall(self, tag: str, recall: list[float | None], classes: tuple[str, ...] | None, step: int) -> None:
        """Writes the recall of each class: scalars, or a histogram if there are too many classes for them."""
        if len(recall) > MOST_CONFUSED_CLASSES:
            values = np.array([value for value in recall if value is not None])
            self._to_tensorboard("add_histogram", f"valid/{tag}", values, step, bins=RECALL_EDGES)
            return
        for name, value in zip(class_names(classes, len(recall)), recall, strict=True):
            if value is not None:
                self._to_tensorboard("add_scalar", f"{tag}/{printable(name)}", value, step)

    def write_results(self, scores: dict[str, float]) -> None:
        """Writes the settings with the final scores for TensorBoard's hyperparameter table."""
        if self._is_main:
            settings = {
                name: value if isinstance(value, int | float | bool) else str(value)
                for name, value in flat(self.settings)
                if name not in OF_CLASSES
            }
            results = {f"result/{name}": value for name, value in scores.items()}
            self._to_tensorboard("add_hparams", settings, results, run_name=".")
            self._trackers.set_results(results)

    def _to_tensorboard(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._tensorboard is None:
            return
        try:
            getattr(self._tensorboard, method)(*arguments, **options)
        except OSError as error:
            self._warn(error)
            self._tensorboard = None  # its thread has died

    def _warn(self, error: OSError) -> None:
        if not self._is_warned:
            log.warning("metrics cannot be written to %s (%s); training continues without them", self.path, error)
            self._is_warned = True

    def flush(self) -> int:
        """Flushes metrics.jsonl to the disk and returns its length in bytes, on rank 0."""
        assert self._metrics is not None
        try:
            os.fsync(self._metrics.fileno())
        except OSError as error:  # network file systems may notice only here that they are full
            self._warn(error)
        return self._metrics.tell()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._to_tensorboard("close")
        if self._is_main:
            self._trackers.finish(is_failed=kind is not None and issubclass(kind, Exception))


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns the settings as pairs; those of a part are named `part.name`."""
    pairs = []
    for name, value in settings.items():
        pairs += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return pairs
