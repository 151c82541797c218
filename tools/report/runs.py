"""Reads the config.json and metrics.jsonl of run folders."""

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.json_file import as_object, get, read_json, read_json_lines
from pipelines.printable import printable
from pipelines.shards.labels import class_names

Split = Literal["train", "valid"]
Floats = NDArray[np.float64]
# In config.json, and no settings to compare: where the run is stored, and lists that may be long.
OTHER_ENTRIES = ("run_dir", "resume", "classes", "class_weights")
NUMBER_OR_NONE = (int, float, type(None))
# The metrics to plot or list; lines may hold others.
METRICS: dict[Split, tuple[str, ...]] = {
    "train": (
        *("loss", "main_loss", "aux2_loss", "aux1_loss", "lr", "gradient_norm", "scale", "skipped_steps"),
        *("images_per_second", "data_wait_percent", "gpu_memory_gigabytes", "bad_samples"),
    ),
    "valid": ("top1", "top5", "ema_top1", "ema_top5", "mean_recall", "ema_mean_recall", "loss"),
}


@dataclass(frozen=True)
class Series:
    """The finite values of a metric in a run: three arrays of shape `(N,)`."""

    steps: Floats
    epochs: NDArray[np.int64]
    values: Floats


class Recall(NamedTuple):
    """The recall of the averaged weights in a validation, in percent by the name of the class, if the class has samples."""

    epoch: int
    of_classes: dict[str, float]


@dataclass(frozen=True)
class Run:
    """A run, up to its last complete line."""

    path: Path
    name: str
    settings: dict[str, str]  # "data.crop.scale" -> "[0.5, 1.0]"
    series: dict[tuple[Split, str], Series]  # all METRICS; without values, the arrays are empty
    newest: dict[Split, dict[str, Any]]  # the last line of each split; empty if there is none
    recall: tuple[Recall, Recall] | None  # of the last and of the best validation, if they are known
    written: float  # when metrics.jsonl was last written, in seconds since 1970

    def last(self, split: Split, name: str) -> float | None:
        """Returns a metric of the newest line, or None if it is missing or not finite."""
        value: float | None = self.newest[split].get(name)
        return value if _is_finite(value) else None

    @property
    def epoch(self) -> int:
        return max(line["epoch"] for line in self.newest.values() if line)

    @property
    def step(self) -> int:
        return max(line["step"] for line in self.newest.values() if line)

    @property
    def epochs(self) -> str:
        """The planned number of epochs."""
        return self.settings.get("epochs", "?")

    @property
    def is_finished(self) -> bool:
        return str(self.newest["valid"].get("epoch")) == self.epochs


class EmptyRunError(ValueError):
    """A run has not written a line yet."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads run folders in the order given, each once. Runs without a line yet are reported on standard error and skipped.

    Raises:
        ValueError: A folder is not a run, a file is malformed (the message gives the line), or all runs are empty.
    """
    folders: dict[str, Path] = {}
    for path in paths:
        folders.setdefault(os.path.realpath(path), path)
    runs, empty = list[Run](), list[EmptyRunError]()
    for path, name in zip(folders.values(), _names(folders), strict=True):
        try:
            runs.append(_read_run(path, name))
        except EmptyRunError as error:
            empty.append(error)
    if not runs:
        raise empty[0]
    for skipped in empty:
        print(printable(f"skipped: {skipped}"), file=sys.stderr)
    return runs


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names the settings whose values differ between runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({run.settings.get(name) for run in runs}) > 1]


def _names(paths: Iterable[str]) -> list[str]:
    """Shortens paths to distinct suffixes. Bytes that are not text become question marks."""
    parts = [Path(path).parts for path in paths]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(parts):
        depth += 1
    return ["/".join(each[-depth:]).encode(errors="replace").decode() for each in parts]


def _read_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder; name a run folder, for example runs/20260101-120000-1234")
    metrics, config = path / "metrics.jsonl", path / "config.json"
    for file in (metrics, config):
        if not file.is_file():
            raise ValueError(f"{path}: there is no {file.name} in it; name a run folder, which has one")
    written, lines, settings = metrics.stat().st_mtime, _read_lines(metrics), as_object(read_json(config), str(config))
    if not lines:
        raise EmptyRunError(f"{metrics}: the run has not written a line yet; it does so after its first --log-every steps")
    by_split: dict[Split, list[dict[str, Any]]] = {"train": [], "valid": []}
    step = 0
    for line in lines:
        step = line.setdefault("step", step)  # older runs give no step in valid lines, which end an epoch
        by_split[line["split"]].append(line)
    return Run(
        path=path,
        name=name,
        settings=_flat_settings(settings, config),
        series={(split, name): _series(by_split[split], name) for split, names in METRICS.items() for name in names},
        newest={split: split_lines[-1] if split_lines else {} for split, split_lines in by_split.items()},
        recall=_read_recall(by_split["valid"], get(settings, "classes", "a list of texts", str(config), default=None)),
        written=written,
    )


def _series(lines: Sequence[dict[str, Any]], name: str) -> Series:
    lines = [line for line in lines if _is_finite(line.get(name))]
    return Series(
        np.array([line["step"] for line in lines], np.float64),
        np.array([line["epoch"] for line in lines], np.int64),
        np.array([line[name] for line in lines], np.float64),
    )


def _read_recall(lines: Sequence[dict[str, Any]], classes: list[str] | None) -> tuple[Recall, Recall] | None:
    """Returns the recall of the classes in the last validation and in that of best.pt (the highest top-1, raw or EMA)."""
    lines = [line for line in lines if line.get("ema_recall")]
    if not lines:
        return None
    best = max(lines, key=lambda line: max(line.get("top1") or 0, line.get("ema_top1") or 0))
    return _recall(lines[-1], classes), _recall(best, classes)


def _recall(line: dict[str, Any], classes: list[str] | None) -> Recall:
    values = line["ema_recall"]
    named = zip(class_names(classes, len(values)), values, strict=True)
    return Recall(line["epoch"], {name: value for name, value in named if _is_finite(value)})


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl, without an incomplete last line that is still being written."""
    lines = []
    for place, line in read_json_lines(path, finite=False):  # a diverged run of an earlier version has such numbers
        if problem := _problem(line):
            raise ValueError(f"{place}: {problem}; docs/training.md describes the format")
        lines.append(line)
    return lines


def _problem(line: Any) -> str:
    """Describes what is wrong with a line of metrics.jsonl; empty if nothing is."""
    if not isinstance(line, dict) or line.get("split") not in ("train", "valid"):
        return 'an object is needed with "split": "train" or "split": "valid"'
    split: Split = line["split"]
    for name in ("epoch", "step"):
        number = line.get(name, 0 if (split, name) == ("valid", "step") else None)
        if type(number) is not int or not 0 <= number < 2**53:  # true is an int, too
            return f'"{name}" has to be a whole number from 0'
    wrong = [name for name in METRICS[split] if type(line.get(name)) not in NUMBER_OR_NONE]
    if wrong:
        return f'"{wrong[0]}" is not a number'
    recall = line.get("ema_recall", [])
    is_right = isinstance(recall, list) and all(type(value) in NUMBER_OR_NONE for value in recall)
    return "" if is_right else '"ema_recall" is not a list of numbers'


def _flat_settings(config: dict[str, Any], path: Path) -> dict[str, str]:
    settings = {name: value for name, value in config.items() if name not in OTHER_ENTRIES}
    try:
        return _flatten(settings)
    except RecursionError:
        raise ValueError(f"{path}: not usable JSON (lists or objects are nested too deeply)") from None


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Maps nested settings to text, keyed by their names on the command line."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat
