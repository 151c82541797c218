"""The output of a run: its settings, its metrics, and TensorBoard's files."""

import errno
import io
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from model.distributed import World
from model.evaluation import Evaluation
from pipelines.files import replace_text
from tools.run.tensorboard_images import batch_picture, captions, confusion_picture, mistake_captions

log = logging.getLogger("train")

METRICS = "metrics.jsonl"


class RunFolder:
    """Writes config.json, metrics.jsonl, and TensorBoard's files. Only rank 0 writes.

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
        for name, value in metrics.items():
            if name not in ("split", "epoch", "step") and value is not None:
                self._to_tensorboard("add_scalar", f"{metrics['split']}/{name}", value, step)

    def write_batch(self, images: Tensor, target: Tensor, classes: tuple[str, ...] | None) -> None:
        """Writes an image of a training batch `(N, 3, H, W)`, normalized, with its targets."""
        if self._is_main:
            picture = batch_picture(images, captions(target, classes))
            self._to_tensorboard("add_image", "train/batch", picture, 0, dataformats="HWC")

    def write_evaluation(self, evaluation: Evaluation, classes: tuple[str, ...] | None, step: int) -> None:
        """Writes images of the worst mistakes on the validation split and of the confusion matrix."""
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

    def write_results(self, scores: dict[str, float]) -> None:
        """Writes the settings with the final scores for TensorBoard's hyperparameter table."""
        if self._is_main:
            settings = {
                name: value if isinstance(value, int | float | bool) else str(value) for name, value in flat(self.settings)
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

    def __exit__(self, *error: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._to_tensorboard("close")


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns the settings as pairs; those of a part are named `part.name`."""
    pairs = []
    for name, value in settings.items():
        pairs += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return pairs
