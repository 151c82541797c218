"""Whether shards that are read in blocks make good batches: samples are shuffled within a block only."""

import contextlib
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.shards.index import parse_line
from pipelines.shards.order import block_shards_of
from pipelines.shards.shard_set import ShardSet, naming_scheme, read_label

if TYPE_CHECKING:  # imported where they are used, see `build_loader`
    import numpy as np
    from numpy.typing import NDArray

    from pipelines.config import DataConfig

# What is looked at: so many labels, or what can be read in so many seconds where the storage is slow.
NUM_LABELS = 32_768
SECONDS = 2.0
LEAST_LABELS = 50  # of fewer nothing is said; those of a class that nearly all samples have do not count
LABELS_A_WINDOW = 32
# A window has to be worth at least so many samples drawn at random, so that the class counts of a batch of 64 vary no more than
# twice as much as by chance; and as many as there are classes, so that most of them stay in sight.
ENOUGH_DRAWS = 64
NUM_WINDOWS = 8  # at least, overlapping where they have to
NUM_PERMUTATIONS = 20
NUM_DEVIATIONS = 6.0


def order_warning(shards: ShardSet, data: "DataConfig", num_classes: int) -> str | None:
    """A warning where batches would be far from random ones, as with shards that are sorted by class; None where not.

    A batch comes from a block of shards, a window of the samples in reading order. The measure is the correlation of the
    classes within a window, `rho = (same - chance) / (1 - chance)`: `same` is the probability that two samples of a window are
    of one class, `chance` the same for any two samples. It is 0 for a random order whatever the classes and their frequencies
    are, and 1 where a window has one class only. The class counts of b samples from a window vary `1 + (b - 1) rho` times as
    much as those of b random samples, so that a window is worth `1 / rho` random draws.

    The tars are taken in a random order, as in training, and of each the same share of its samples, at random: 32,768 labels in
    all, or what can be read in two seconds. For 1.28 million samples in 1,280 tars that takes 0.7 s, and 1.5 s where there
    is something to warn of.

    Args:
        shards: Those of the training split.
        data: Names them, and the order.
        num_classes: Of the data set.

    Raises:
        ValueError: An index is damaged.
    """
    # With another order any sample may come next; and of remote shards each label would be a request.
    if data.order != "blocks" or shards.is_remote:
        return None
    block_shards = block_shards_of(data, shards)
    window = shards.num_samples * block_shards // len(shards.tars)
    if window >= shards.num_samples:
        return None
    found = _read_some(shards, window)
    size = round(window * found.share)
    if len(found.labels) <= size or not _is_bad(found.labels, size):
        return None
    held, by_chance = _distinct(found.labels, size)
    rho, chance = _correlation(found.labels, size)
    part = f"a block of {window:,} samples" if size == window else f"{size:,} samples of a block of {window:,}"
    likewise = ", and the validation shards with --name valid" if data.label_key else ""
    return (
        f"{data.train}: the shards are sorted by class, or partly. {part}, among which training shuffles, "
        f"holds {held:,.1f} of {num_classes:,} classes on average, where random order would give {by_chance:,.1f}; "
        f"its class mix is that of {1 / rho:,.1f} random samples, and {max(ENOUGH_DRAWS, 1 / chance):,.0f} are needed. "
        f"Either read with --data.order global; or with more than {block_shards:,} --data.block-shards; "
        f"or shuffle the whole set, once: `{_convert_command(shards, data)}`{likewise}"
    )


def _convert_command(shards: ShardSet, data: "DataConfig") -> str:
    """The command that shuffles these shards; it gives classes the same numbers."""
    source = data.train
    if os.path.isdir(source):  # which may hold other splits as well
        source = f"{source.rstrip('/')}/{naming_scheme(Path(shards.tars[0]).name)[0]}*.tar"
    options = {"--label-key": data.label_key, "--class-file": data.class_file}
    words = ["shards", "convert", source, "NEW_FOLDER", "--name", "train"]
    return shlex.join([*words, *(word for option, value in options.items() if value for word in (option, value))])


@dataclass(frozen=True)
class _Found:
    """Labels in reading order, int64 `(M,)`; what part of the samples they are."""

    labels: "NDArray[np.int64]"
    share: float


def _read_some(shards: ShardSet, window: int) -> _Found:
    """Labels of a random part of the samples, tar by tar, the tars in a random order.

    Samples that have no label are passed over: what becomes of them is for the reader to decide, and it meets all of them.
    """
    import numpy as np

    rng, stop = np.random.default_rng(0), time.monotonic() + SECONDS
    share = min(1.0, max(NUM_LABELS / shards.num_samples, LABELS_A_WINDOW / window))
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
                    return _Found(np.array(labels, np.int64), share)
    return _Found(np.array(labels, np.int64), share)


def _is_bad(labels: "NDArray[np.int64]", size: int) -> bool:
    """Whether windows of that many labels are worth too few random draws, and it is not by chance that they are."""
    import numpy as np

    rho, chance = _correlation(labels, size)
    if rho <= min(1 / ENOUGH_DRAWS, chance) or len(labels) * (1 - chance) < LEAST_LABELS:
        return False
    rng = np.random.default_rng(0)
    by_chance = [_correlation(rng.permutation(labels), size)[0] for _ in range(NUM_PERMUTATIONS)]
    return bool(rho > np.mean(by_chance) + NUM_DEVIATIONS * np.std(by_chance))


def _windows(labels: "NDArray[np.int64]", size: int) -> "NDArray[np.int64]":
    """Windows of that many labels, evenly spaced, `(W, size)`."""
    import numpy as np

    starts = np.linspace(0, len(labels) - size, max(NUM_WINDOWS, len(labels) // size)).astype(np.int64)
    return labels[starts[:, None] + np.arange(size)]


def _correlation(labels: "NDArray[np.int64]", size: int) -> tuple[float, float]:
    """`rho` for windows of that many labels, and `chance`; see `order_warning`."""
    import numpy as np

    windows = _windows(labels, size)
    # A number for each class in each window, so that one sort counts them all.
    cells = windows + np.arange(len(windows))[:, None] * (int(labels.max()) + 1)
    same = _share_of_pairs(np.unique(cells, return_counts=True)[1], len(windows) * size * (size - 1))
    chance = _share_of_pairs(np.unique(labels, return_counts=True)[1], len(labels) * (len(labels) - 1))
    return (same - chance) / (1 - chance) if chance < 1 else 0.0, chance


def _share_of_pairs(counts: "NDArray[np.int64]", num_pairs: int) -> float:
    return float((counts * (counts - 1)).sum() / num_pairs)


def _distinct(labels: "NDArray[np.int64]", size: int) -> tuple[float, float]:
    """How many classes a window has on average, and how many so many random draws would have."""
    import numpy as np

    windows = _windows(labels, size)
    frequencies = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(np.mean([len(np.unique(window)) for window in windows])), float((1 - (1 - frequencies) ** size).sum())
