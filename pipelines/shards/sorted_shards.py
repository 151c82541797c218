"""Checks whether blocks of shards make good batches, because samples are shuffled within a block only."""

import contextlib
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.find_tars import naming_scheme
from pipelines.shards.index import parse_line
from pipelines.shards.order import block_shards_of
from pipelines.shards.shard_set import ShardSet, read_label

if TYPE_CHECKING:
    from pipelines.config import DataConfig

Labels = NDArray[np.int64]

# The check reads this many labels, or as many as slow storage delivers in this time.
NUM_LABELS = 32_768
SECONDS = 2.0
LEAST_LABELS = 50  # outside the dominant class; with fewer there is no warning
LABELS_PER_WINDOW = 32
# A window must be worth this many random samples, so that the class counts of a batch of 64 vary at most twice as much as by
# chance. It must also be worth as many as there are classes, so that a batch shows most of them.
ENOUGH_DRAWS = 64
NUM_WINDOWS = 8  # at least; they overlap if necessary
NUM_PERMUTATIONS = 20
NUM_DEVIATIONS = 6.0


def order_warning(shards: ShardSet, data: "DataConfig", num_classes: int) -> str | None:
    """Returns a warning if batches would be far from random ones, as with shards that are sorted by class.

    A batch comes from a block of shards, which is a window of the samples in reading order. The measure is the intraclass
    correlation of the windows, `rho = (same - chance) / (1 - chance)`, where `same` and `chance` are the probabilities that two
    samples of one window, and any two samples, share a class. `rho` is 0 for a random order and 1 if each window has a single
    class. The class counts of b samples from a window vary `1 + (b - 1) rho` times as much as those of b random samples, so a
    window is worth `1 / rho` random samples. For 1.28 million samples in 1,280 tars this takes 0.7 s, with a warning 1.5 s.

    Raises:
        ValueError: An index is damaged.
    """
    # In another order any sample may come next. The labels of remote shards would take a request each.
    if data.order != "blocks" or shards.is_remote:
        return None
    block_shards = block_shards_of(data, shards)
    window = shards.num_samples * block_shards // len(shards.tars)
    if window >= shards.num_samples:
        return None
    labels, share = _read_some(shards, window)
    size = round(window * share)
    if len(labels) <= size or not _is_bad(labels, size):
        return None
    held, by_chance = _distinct(labels, size)
    rho, chance = _correlation(labels, size)
    part = f"a block of {window:,} samples" if size == window else f"{size:,} samples of a block of {window:,}"
    likewise = ", and the validation shards with --name valid" if data.label_key else ""
    return (
        f"{data.train}: the shards are sorted by class, at least in part: {part}, among which training shuffles, "
        f"holds {held:,.1f} of {num_classes:,} classes on average, where random order would give {by_chance:,.1f}; "
        f"its class mix is that of {1 / rho:,.1f} random samples, and {max(ENOUGH_DRAWS, 1 / chance):,.0f} are needed. "
        f"Use --data.order global, or raise --data.block-shards above {block_shards:,}, "
        f"or shuffle the whole set once: `{_convert_command(shards, data)}`{likewise}"
    )


def _convert_command(shards: ShardSet, data: "DataConfig") -> str:
    """Returns the command that shuffles these shards and keeps their class numbers."""
    source = data.train
    if os.path.isdir(source):  # it may hold other splits as well
        source = f"{source.rstrip('/')}/{naming_scheme(Path(shards.tars[0]).name)[0]}*.tar"
    options = {"--image-key": data.image_key, "--label-key": data.label_key, "--class-file": data.class_file}
    words = ["shards", "convert", source, "NEW_FOLDER", "--name", "train"]
    return shlex.join([*words, *(word for option, value in options.items() if value for word in (option, value))])


def _read_some(shards: ShardSet, window: int) -> tuple[Labels, float]:
    """Reads a random fraction of the labels of each tar, with the tars in random order. Returns the labels and the fraction.

    Samples without a valid label are skipped here, because the reader finds and reports all of them.
    """
    rng, stop = np.random.default_rng(0), time.monotonic() + SECONDS
    share = min(1.0, max(NUM_LABELS / shards.num_samples, LABELS_PER_WINDOW / window))
    labels: list[int] = []
    for number in rng.permutation(len(shards.tars)).tolist():
        tar, index = shards.tars[number], shards.indices[number]
        with open(index, errors="replace") as file:
            lines = file.read().rstrip("\n").split("\n")[1:]
        with open(tar, "rb") as file_of_samples:
            for i in np.flatnonzero(rng.random(len(lines)) < share).tolist():
                sample = list(parse_line(index, lines[i]))
                with contextlib.suppress(ValueError):
                    labels.append(read_label(file_of_samples, sample, tar, shards.label_reader))
                if len(labels) == 2 * NUM_LABELS or time.monotonic() > stop:
                    return np.array(labels, np.int64), share
    return np.array(labels, np.int64), share


def _is_bad(labels: Labels, size: int) -> bool:
    """Returns whether windows of `size` labels are worth too few random samples, and not only by chance."""
    rho, chance = _correlation(labels, size)
    if rho <= min(1 / ENOUGH_DRAWS, chance) or len(labels) * (1 - chance) < LEAST_LABELS:
        return False
    rng = np.random.default_rng(0)
    by_chance = [_correlation(rng.permutation(labels), size)[0] for _ in range(NUM_PERMUTATIONS)]
    return bool(rho > np.mean(by_chance) + NUM_DEVIATIONS * np.std(by_chance))


def _windows(labels: Labels, size: int) -> Labels:
    """Returns evenly spaced windows of `size` labels, `(W, size)`."""
    starts = np.linspace(0, len(labels) - size, max(NUM_WINDOWS, len(labels) // size)).astype(np.int64)
    return labels[starts[:, None] + np.arange(size)]


def _correlation(labels: Labels, size: int) -> tuple[float, float]:
    """Returns `rho` for windows of `size` labels, and `chance`; see `order_warning`."""
    windows = _windows(labels, size)
    # Numbering the classes of each window separately lets one sort count them all.
    cells = windows + np.arange(len(windows))[:, None] * (int(labels.max()) + 1)
    same = _share_of_pairs(np.unique(cells, return_counts=True)[1], len(windows) * size * (size - 1))
    chance = _share_of_pairs(np.unique(labels, return_counts=True)[1], len(labels) * (len(labels) - 1))
    return (same - chance) / (1 - chance) if chance < 1 else 0.0, chance


def _share_of_pairs(counts: Labels, num_pairs: int) -> float:
    return float((counts * (counts - 1)).sum() / num_pairs)


def _distinct(labels: Labels, size: int) -> tuple[float, float]:
    """Returns the mean number of classes per window, and its expectation for `size` random samples."""
    windows = _windows(labels, size)
    frequencies = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(np.mean([len(np.unique(window)) for window in windows])), float((1 - (1 - frequencies) ** size).sum())
