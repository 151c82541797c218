"""Watches a process over a long time: memory, threads and open files, as a file, a plot and a verdict."""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# How much each may grow over the whole time, warm-up excluded. An hour of a leak of a kilobyte per step is far beyond it.
MOST_GROWTH = {"megabytes": 64.0, "threads": 1.0, "files": 3.0}
WARM_UP = 0.25  # of the time: caches fill, and the allocator finds its size


class Sample(NamedTuple):
    """What a process and its children have at one time, in seconds since the start."""

    seconds: float
    megabytes: float
    threads: int
    files: int


def sample(pid: int, started: float) -> Sample:
    """Measures a process and its children.

    Raises:
        OSError: The process has ended.
    """
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    kilobytes = threads = files = 0
    for one in (pid, *children):
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
            kilobytes += int(fields.get("VmRSS", "0 kB").split()[0])
            threads += int(fields["Threads"])
            files += len(os.listdir(f"/proc/{one}/fd"))
        except OSError:
            if one == pid:
                raise
    return Sample(time.monotonic() - started, kilobytes / 1000, threads, files)


def growth(samples: list[Sample]) -> dict[str, float]:
    """Returns how much each quantity grew after the warm-up, by the Theil-Sen slope, which single peaks do not change."""
    kept = np.array(samples, np.float64)
    kept = kept[kept[:, 0] >= WARM_UP * kept[-1, 0]]
    duration = float(kept[-1, 0] - kept[0, 0])
    return {name: _slope(kept[:, 0], kept[:, 1 + i]) * duration for i, name in enumerate(MOST_GROWTH)}


def _slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The median of the slopes between all pairs of points (Sen, JASA 63, 1968), of at most a thousand points."""
    step = -(-len(x) // 1000)
    x, y = x[::step], y[::step]
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def save(samples: list[Sample], folder: Path, name: str) -> None:
    """Writes the samples as JSON lines and, if matplotlib is installed, as a plot."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(one._asdict()) + "\n" for one in samples))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure((8, 6), layout="constrained")
    axes = figure.subplots(len(MOST_GROWTH), sharex=True)
    minutes = [one.seconds / 60 for one in samples]
    for axis, title in zip(axes, MOST_GROWTH, strict=True):
        axis.plot(minutes, [getattr(one, title) for one in samples], linewidth=1)
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("minutes")
    axes[0].set_title(name)
    figure.savefig(folder / f"{name}.png", dpi=120)
