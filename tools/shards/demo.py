"""`shards demo`: the embedded image set, drawn and converted."""

import concurrent.futures
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tools.shards.convert import Summary, convert
from tools.shards.drawing import FIGURES, draw_jpeg
from tools.shards.plan import Options


def make_demo(
    destination: Path, *, train_samples: int, valid_samples: int, seed: int, overwrite: bool = False
) -> Iterator[Summary]:
    """Draws the splits "train" and "valid" and converts them; yields a summary after each.

    The same arguments give the same images, whatever the number of CPU cores.
    """
    for split, num_samples in (("train", train_samples), ("valid", valid_samples)):
        if num_samples < len(FIGURES):
            raise ValueError(f"--{split}-samples {num_samples}: at least one for each of the {len(FIGURES)} classes is needed")
    with tempfile.TemporaryDirectory(prefix="googlenet-dali-") as images:
        for number, (split, num_samples) in enumerate((("train", train_samples), ("valid", valid_samples))):
            folder = Path(images) / split
            _draw(folder, num_samples, (seed, number))
            yield convert(folder, destination, Options(name=split, seed=seed), overwrite=overwrite)


def _draw(folder: Path, num_samples: int, seed: tuple[int, int]) -> None:
    figures = sorted(FIGURES)
    for figure in figures:
        (folder / figure).mkdir(parents=True)
    paths = [folder / figures[i % len(figures)] / f"{i:06d}.jpg" for i in range(num_samples)]
    seeds = [(*seed, i) for i in range(num_samples)]
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        drawn = pool.map(_draw_file, paths, seeds, chunksize=50)
        for _ in tqdm(drawn, f"drawing {folder.name}", num_samples, unit="img", disable=None):
            pass


def _draw_file(path: Path, seed: tuple[int, ...]) -> None:
    path.write_bytes(draw_jpeg(path.parent.name, np.random.default_rng(seed)))
