"""Data sets of any number of shards and samples that take hardly any room: many names for a few tars.

Each shard is a pair of symbolic links, to one of a few tars and to an index that lists the tar's samples again and again. To
whoever reads them they are shards like any others.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipelines.shards.index import Sample, write_index
from pipelines.shards.shard_set import INFO_FILE
from tools.shards.drawing import FIGURES, draw_jpeg
from tools.shards.write import ShardWriter

NUM_TARS, IMAGES_A_TAR = 4, 32
CLASSES = sorted(FIGURES)

Encode = Callable[[str, np.random.Generator], bytes]


def small(figure: str, rng: np.random.Generator) -> bytes:
    """A JPEG of some 3 KB, so that decoding costs little beside all else."""
    return draw_jpeg(figure, rng)


def photograph(figure: str, rng: np.random.Generator) -> bytes:
    """A JPEG as ImageNet has them on average: 500 x 375 pixels, some 110 KB."""
    return draw_jpeg(figure, rng, size=(500, 375), noise=33, quality=96)


class LinkedShards:
    """Makes data sets out of a few tars.

    Args:
        folder: For the tars and the data sets; made.
        encode: Draws the images.
    """

    def __init__(self, folder: Path, encode: Encode) -> None:
        self._folder = folder
        folder.mkdir()
        self._samples = [self._write_tar(number, encode) for number in range(NUM_TARS)]

    def make(self, num_shards: int, num_samples: int) -> Path:
        """The folder of a data set, made where it is not there: a training split of so many samples, parted evenly."""
        name = f"{num_shards}-{num_samples}"
        folder = self._folder / name
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
            for row in range(IMAGES_A_TAR):
                label = row % len(CLASSES)
                _add(writer, f"{number}_{row:04d}", encode(CLASSES[label], rng), b"%d" % label)
        return writer.samples


def _add(writer: ShardWriter, key: str, image: bytes, label: bytes) -> None:
    def fill(room: memoryview) -> None:
        room[:] = image

    writer.add(key, "jpg", len(image), fill, label)
