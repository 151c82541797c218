"""`shards demo`: draws the embedded image set and converts it."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipelines.machine import num_cpus
from tools.shards.convert import Summary, check_locations, convert
from tools.shards.drawing import FIGURES, draw_jpeg
from tools.shards.parallel import run
from tools.shards.plan import Options
from tools.shards.storage import open_storage

CHUNK = 250  # images per task


def make_demo(dst: str | Path, train_samples: int, valid_samples: int, seed: int, overwrite: bool) -> Iterator[Summary]:
    """Draws and converts the splits "train" and "valid", and yields a summary after each.

    The same arguments give the same images, regardless of the number of CPU cores.
    """
    options = Options(seed=seed)
    splits = {"train": train_samples, "valid": valid_samples}
    for split, num_samples in splits.items():
        if num_samples < len(FIGURES):
            raise ValueError(f"--{split}-samples {num_samples}: at least one for each of the {len(FIGURES)} classes is needed")
    check_locations(".", str(dst))
    open_storage(str(dst))  # before the drawing, which takes a while
    with tempfile.TemporaryDirectory(prefix="googlenet-dali-") as images:
        for number, (split, num_samples) in enumerate(splits.items()):
            folder = Path(images) / split
            _draw(folder, num_samples, (seed, number))
            yield convert(folder, dst, replace(options, name=split), overwrite=overwrite)


def _draw(folder: Path, num_samples: int, seed: tuple[int, int]) -> None:
    figures = sorted(FIGURES)
    for figure in figures:
        (folder / figure).mkdir(parents=True)
    paths = [folder / figures[i % len(figures)] / f"{i:06d}.jpg" for i in range(num_samples)]
    seeds = [(*seed, i) for i in range(num_samples)]
    tasks = [
        tuple(zip(paths[first : first + CHUNK], seeds[first : first + CHUNK], strict=True))
        for first in range(0, num_samples, CHUNK)
    ]
    with (
        contextlib.closing(run(_draw_files, tasks, min(num_cpus(), len(tasks)))) as drawn,
        tqdm(desc=f"drawing {folder.name}", total=num_samples, unit="img", disable=None) as progress,
    ):
        for number in drawn:
            progress.update(number)


def _draw_files(task: tuple[tuple[Path, tuple[int, ...]], ...]) -> int:
    """Draws the files of some paths, each from its seed, and returns their number."""
    for path, seed in task:
        path.write_bytes(draw_jpeg(path.parent.name, np.random.default_rng(seed)))
    return len(task)
