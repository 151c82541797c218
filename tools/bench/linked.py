"""Data sets of any number of shards and samples that take little space: many names for a few tars.

Each shard is a pair of symbolic links, to one of a few tars and to an index that lists the samples of the tar over and over.
Readers see no difference from other shards.
"""

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.shards.find_tars import INFO_FILE
from pipelines.shards.index import Sample, write_index
from tools.shards.drawing import FIGURES, draw_jpeg
from tools.shards.write import ShardWriter

NUM_TARS, IMAGES_PER_TAR = 4, 32
CLASSES = sorted(FIGURES)

Encode = Callable[[str, np.random.Generator], bytes]


def small(figure: str, rng: np.random.Generator) -> bytes:
    """Draws a JPEG of about 3 KB, so that decoding costs little compared with everything else."""
    return draw_jpeg(figure, rng)


def photograph(figure: str, rng: np.random.Generator) -> bytes:
    """Draws a JPEG like an average one of ImageNet: 500 x 375 pixels, about 110 KB."""
    return draw_jpeg(figure, rng, size=(500, 375), noise=33, quality=96)


class LinkedShards:
    """Makes data sets in a new folder from a few tars, whose images `encode` draws."""

    def __init__(self, folder: Path, encode: Encode) -> None:
        self._folder = folder
        folder.mkdir()
        self._samples = [self._write_tar(number, encode) for number in range(NUM_TARS)]

    def make(self, num_shards: int, num_samples: int) -> Path:
        """Returns the folder of a data set, and makes it if necessary: a training split, divided evenly into shards."""
        folder = self._folder / f"{num_shards}-{num_samples}"
        if folder.exists():
            return folder
        folder.mkdir()
        least, rest = divmod(num_samples, num_shards)
        lengths = [least + (number < rest) for number in range(num_shards)]
        for real, length in itertools.product(range(NUM_TARS), set(lengths)):
            write_index(folder / f"{real}-{length}", list(itertools.islice(itertools.cycle(self._samples[real]), length)))
        tars = [f"train-{number:06d}.tar" for number in range(num_shards)]
        for number, (tar, length) in enumerate(zip(tars, lengths, strict=True)):
            real = number % NUM_TARS
            (folder / tar).symlink_to(self._folder / f"{real}.tar")
            (folder / tar).with_suffix(".idx").symlink_to(folder / f"{real}-{length}")
        split = {"name": "train", "num_samples": num_samples, "filenames": tars, "shard_lengths": lengths}
        (folder / INFO_FILE).write_text(json.dumps({"splits": {"train": split}, "classes": CLASSES}))
        return folder

    def _write_tar(self, number: int, encode: Encode) -> list[Sample]:
        rng = np.random.default_rng(number)
        with ShardWriter(self._folder / f"{number}.tar") as writer:
            for row in range(IMAGES_PER_TAR):
                label = row % len(CLASSES)
                image = encode(CLASSES[label], rng)
                fill: Any = io.BytesIO(image).readinto
                writer.add(f"{number}_{row:04d}", "jpg", len(image), fill, b"%d" % label)
        return writer.samples
