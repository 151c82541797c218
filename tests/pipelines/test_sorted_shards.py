"""The warning about shards that are sorted by class and read in blocks."""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.config import DataConfig
from pipelines.shards.index import format_index, scan_tar
from pipelines.shards.shard_set import ShardSet, open_shards
from pipelines.shards.sorted_shards import order_warning
from tests.tools.test_verify import write_tar

Labels = NDArray[np.int64]
MOST_CLASSES = 3000


@pytest.fixture(scope="module")
def write_shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ShardSet]:
    """Returns a function that writes shards with given labels: links to one tar with a sample of each class, and indices."""
    folder = tmp_path_factory.mktemp("order")
    members = [(f"{i}.{end}", data) for i in range(MOST_CLASSES) for end, data in (("png", b"-"), ("cls", str(i).encode()))]
    tar = write_tar(folder / "all.tar", members, index=False)
    samples, numbers = scan_tar(tar), itertools.count()

    def write(labels: Labels | Sequence[int], per_shard: int) -> ShardSet:
        set_folder = folder / str(next(numbers))
        set_folder.mkdir()
        for number, start in enumerate(range(0, len(labels), per_shard)):
            os.link(tar, set_folder / f"all-{number:03d}.tar")
            listed = [samples[label] for label in labels[start : start + per_shard]]
            (set_folder / f"all-{number:03d}.idx").write_text(format_index(listed))
        return open_shards(str(set_folder), "train")

    return write


def warning_for(shards: ShardSet, block_shards: int, num_classes: int) -> str | None:
    return order_warning(shards, DataConfig(train="old/x-*.tar", order="blocks", block_shards=block_shards), num_classes)


def test_silent_for_random_orders(write_shards: Callable[..., ShardSet]) -> None:
    """With few and many classes, equal and very unequal frequencies, small sets and small windows."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        num_classes, num_samples = int(rng.choice([1, 2, 3, 10, 100, 1000])), int(rng.choice([60, 110, 300, 1000, 3000]))
        frequencies = rng.dirichlet(np.full(num_classes, rng.choice([0.05, 0.3, 1, 100])))
        shards = write_shards(rng.choice(num_classes, num_samples, p=frequencies), int(rng.choice([20, 100, 1000])))
        assert warning_for(shards, int(rng.choice([1, 2, 8])), num_classes) is None, seed


def test_silent_where_order_does_not_matter(write_shards: Callable[..., ShardSet]) -> None:
    sorted_labels = np.repeat(np.arange(10), 200)
    shards = write_shards(sorted_labels, 100)
    assert warning_for(shards, 2, 10) is not None
    for order in ("auto", "global"):
        assert order_warning(shards, DataConfig(train="old/x-*.tar", order=order, block_shards=2), 10) is None
    assert warning_for(shards, 20, 10) is None  # one block has the whole set
    assert warning_for(write_shards(np.arange(3000), 100), 1, 3000) is None  # each sample is its own class
    assert warning_for(write_shards(np.zeros(2000, np.int64), 100), 1, 1) is None
    assert warning_for(write_shards(sorted_labels.reshape(10, 200).T.ravel(), 100), 1, 10) is None  # 0 1 2 ... 0 1 2 ...


@pytest.mark.parametrize(
    ("num_classes", "num_samples", "per_shard"),
    [(2, 3000, 100), (10, 3000, 100), (100, 6000, 250), (1000, 6000, 500)],
)
def test_shards_sorted_by_class(
    write_shards: Callable[..., ShardSet], num_classes: int, num_samples: int, per_shard: int
) -> None:
    """The figures in the warning are correct."""
    shards = write_shards(np.sort(np.arange(num_samples) % num_classes), per_shard)
    text = warning_for(shards, 3, num_classes)
    assert text is not None
    assert "\n" not in text
    window = 3 * per_shard
    pattern = rf"a block of {window:,} samples, .* holds ([0-9.,]+) of ([0-9,]+) classes .* would give ([0-9.,]+);"
    figures = re.search(pattern, text)
    assert figures is not None
    held, of, at_random = (float(figure.replace(",", "")) for figure in figures.groups())
    # The tars are read in random order, so each may add classes of its own.
    assert 1 <= held <= min(num_classes, window / (num_samples / num_classes) + 2 * 4)
    assert of == num_classes
    assert at_random == pytest.approx(num_classes * (1 - (1 - 1 / num_classes) ** window), abs=0.06)
    assert "Use --data.order global, or raise --data.block-shards above 3, or shuffle" in text
    assert "`shards convert 'old/x-*.tar' NEW_FOLDER --name train`" in text


def test_shards_that_are_sorted_in_part(write_shards: Callable[..., ShardSet]) -> None:
    """Every block has all classes, but half of its samples share one class, which differs from block to block."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 600)
    labels = np.where(rng.random(6000) < 0.5, labels, rng.permutation(labels))
    text = warning_for(write_shards(labels, 600), 1, 10)
    assert text is not None
    assert "holds 10.0 of 10 classes on average, where random order would give 10.0" in text
    draws = float(text.split("its class mix is that of ")[1].split()[0])
    assert 3 < draws < 6  # rho is about 0.5 squared, so a block is worth about 4


def test_a_large_set_is_sampled(write_shards: Callable[..., ShardSet]) -> None:
    labels = np.arange(66_000) % 100
    text = warning_for(write_shards(np.sort(labels), 1000), 2, 100)
    assert text is not None
    assert "993 samples of a block of 2,000, among which training shuffles, holds" in text
    assert warning_for(write_shards(np.random.default_rng(0).permutation(labels), 1000), 2, 100) is None


def test_samples_without_a_label_are_left_to_the_reader(tmp_path: Path) -> None:
    members = [(f"{i}.{end}", data) for i in range(400) for end, data in (("png", b"-"), ("txt" if i % 9 else "cls", b"1"))]
    for number in range(4):
        write_tar(tmp_path / f"x-{number}.tar", members[number * 200 : (number + 1) * 200])
    assert warning_for(open_shards(str(tmp_path / "x-*.tar"), "train"), 1, 2) is None


def test_the_command_for_a_folder_names_the_split(write_shards: Callable[..., ShardSet], tmp_path: Path) -> None:
    """`convert` refuses a folder with several sets of shards."""
    shards = write_shards(np.repeat(np.arange(10), 200), 100)
    config = DataConfig(train=str(tmp_path), order="blocks", block_shards=1)
    assert f"shards convert '{tmp_path}/all-*.tar' NEW_FOLDER" in str(order_warning(shards, config, 10))
    config = DataConfig(train="old", order="blocks", block_shards=1, label_key="a.b", class_file="my names.txt")
    command = "`shards convert old NEW_FOLDER --name train --label-key a.b --class-file 'my names.txt'`, and the validation"
    assert command in str(order_warning(shards, config, 10))
