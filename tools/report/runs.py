"""What runs have left in their folders, as numbers: config.json and metrics.jsonl."""

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "valid"]
Floats = NDArray[np.float64]
# They name the run's folder, and say nothing about what happened in it.
NAMING_SETTINGS = ("run_dir", "resume")


# What is drawn or listed; lines may hold other things too.
METRICS: dict[Split, tuple[str, ...]] = {
    "train": (
        *("loss", "main_loss", "aux2_loss", "aux1_loss", "lr", "gradient_norm", "scale", "skipped_steps"),
        *("images_per_second", "data_wait_percent", "gpu_memory_gigabytes", "bad_samples"),
    ),
    "valid": ("top1", "top5", "ema_top1", "ema_top5", "loss"),
}


@dataclass(frozen=True)
class Series:
    """A metric of a run, where it was a finite number: three arrays of `(N,)`."""

    steps: Floats
    epochs: NDArray[np.int64]
    values: Floats


@dataclass(frozen=True)
class Run:
    """One run, as far as it has come."""

    path: Path
    name: str
    settings: dict[str, str]  # "data.crop.scale" -> "[0.5, 1.0]"
    series: dict[tuple[Split, str], Series]  # all METRICS, empty ones as well
    newest: dict[Split, dict[str, Any]]  # lines; empty where there is none yet
    written: float  # the newest line, seconds since 1970

    def last(self, split: Split, name: str) -> float | None:
        """The newest line's value of a metric; None where it has none, or none that is a finite number."""
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
        """How many it is to have."""
        return self.settings.get("epochs", "?")

    @property
    def is_finished(self) -> bool:
        return str(self.newest["valid"].get("epoch")) == self.epochs


class EmptyRunError(ValueError):
    """A run has only just begun."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of these folders, each once, in the order given; those that have only just begun are named and passed over.

    Raises:
        ValueError: A folder is not that of a run, or one of its files cannot be understood; says where.
    """
    by_place: dict[str, Path] = {}
    for path in paths:
        by_place.setdefault(os.path.realpath(path), path)
    folders = list(by_place.values())
    runs, empty = list[Run](), list[EmptyRunError]()
    for path, name in zip(folders, _names(folders), strict=True):
        try:
            runs.append(_read_run(path, name))
        except EmptyRunError as error:
            empty.append(error)
    if not runs:
        raise empty[0]
    for begun in empty:
        print(f"passed over: {begun}", file=sys.stderr)
    return runs


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings in which the runs are not all alike."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({run.settings.get(name) for run in runs}) > 1]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart; bytes that are no text become question marks."""
    paths = [Path(os.path.realpath(folder)) for folder in folders]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]).encode(errors="replace").decode() for path in paths]


def _read_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder; name the folder of a run, as in runs/20260101-120000-1234")
    for file in ("metrics.jsonl", "config.json"):
        if not (path / file).is_file():
            raise ValueError(f"{path}: there is no {file} in it; name the folder of a run, which has one")
    metrics = path / "metrics.jsonl"
    written, lines = metrics.stat().st_mtime, _read_lines(metrics)
    if not lines:
        raise EmptyRunError(f"{metrics}: the run has not written a line yet; it does after its first --log-every steps")
    by_split: dict[Split, list[dict[str, Any]]] = {"train": [], "valid": []}
    step = 0
    for line in lines:
        step = line.setdefault("step", step)  # older runs have none in valid lines, which end an epoch
        by_split[line["split"]].append(line)
    return Run(
        path=path,
        name=name,
        settings=_read_settings(path / "config.json"),
        series={(split, name): _series(by_split[split], name) for split, names in METRICS.items() for name in names},
        newest={split: of_split[-1] if of_split else {} for split, of_split in by_split.items()},
        written=written,
    )


def _series(lines: Sequence[dict[str, Any]], name: str) -> Series:
    lines = [line for line in lines if _is_finite(line.get(name))]
    return Series(
        np.array([line["step"] for line in lines], np.float64),
        np.array([line["epoch"] for line in lines], np.int64),
        np.array([line[name] for line in lines], np.float64),
    )


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; without the last one where that is being written just now."""
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if not text.endswith(b"\n"):
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if problem := _problem(line):
            raise ValueError(f"{path}, line {number}: {problem}; lines are as the README lists them")
        lines.append(line)
    return lines


def _problem(line: Any) -> str:
    """What is wrong with a line of metrics.jsonl, or nothing."""
    if not isinstance(line, dict) or line.get("split") not in ("train", "valid"):
        return 'not an object with "split", "train" or "valid"'
    split: Split = line["split"]
    for name in ("epoch", "step"):
        if not isinstance(line.get(name, 0 if (split, name) == ("valid", "step") else None), int):
            return f'no whole number "{name}"'
    wrong = [name for name in METRICS[split] if not isinstance(line.get(name), (int, float, type(None)))]
    return f'"{wrong[0]}" is not a number' if wrong else ""


def _read_settings(path: Path) -> dict[str, str]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not an object of settings")
    settings = _flat(config)
    return {name: value for name, value in settings.items() if name not in NAMING_SETTINGS}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings under their names on the command line, as texts."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat
