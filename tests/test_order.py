"""The order of training samples: what is said of badly ordered shards, and that well ordered ones give random batches."""

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines import DataConfig, ShardSet, build_loader, open_shards
from pipelines.index import format_index, scan_tar
from pipelines.order import order_warning
from tests.test_verify import write_tar
from tools.shards.convert import convert
from tools.shards.plan import Options

Labels = NDArray[np.int64]
MOST_CLASSES = 3000


@pytest.fixture(scope="module")
def write_shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ShardSet]:
    """Writes shards of given labels. They are links to one tar with a sample of each class, which their indices list."""
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


def warning_for(shards: ShardSet, buffer: int, num_classes: int, batch_size: int = 64) -> str | None:
    return order_warning(shards, DataConfig(train="old/x-*.tar", shuffle_buffer=buffer), batch_size, num_classes)


def test_silent_for_random_orders(write_shards: Callable[..., ShardSet]) -> None:
    """Few and many classes, even and very uneven ones, small sets, small windows."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        num_classes, num_samples = int(rng.choice([1, 2, 3, 10, 100, 1000])), int(rng.choice([60, 110, 300, 1000, 3000]))
        frequencies = rng.dirichlet(np.full(num_classes, rng.choice([0.05, 0.3, 1, 100])))
        shards = write_shards(rng.choice(num_classes, num_samples, p=frequencies), int(rng.choice([20, 100, 1000])))
        buffer, batch_size = int(rng.choice([1, 8, 64, 256])), int(rng.choice([2, 16, 64]))
        assert warning_for(shards, buffer, num_classes, batch_size) is None, seed


def test_silent_where_order_does_not_matter(write_shards: Callable[..., ShardSet]) -> None:
    sorted_labels = np.repeat(np.arange(10), 200)
    assert warning_for(write_shards(sorted_labels, 100), 1936, 10) is None  # the set fits into the buffer with a batch
    assert warning_for(write_shards(np.arange(3000), 100), 64, 3000) is None  # each sample is a class of its own
    assert warning_for(write_shards(np.zeros(2000, np.int64), 100), 64, 1) is None
    assert warning_for(write_shards(sorted_labels.reshape(10, 200).T.ravel(), 100), 64, 10) is None  # 0 1 2 ... 0 1 2 ...


@pytest.mark.parametrize(
    ("num_classes", "num_samples", "per_shard"),
    [(2, 3000, 100), (10, 3000, 100), (10, 3000, 3000), (100, 6000, 250), (1000, 6000, 500)],
)
def test_shards_sorted_by_class(
    write_shards: Callable[..., ShardSet], num_classes: int, num_samples: int, per_shard: int
) -> None:
    """The figures are right, and the shuffle buffer that is named ends the warning."""
    shards = write_shards(np.sort(np.arange(num_samples) % num_classes), per_shard)
    text = warning_for(shards, 256, num_classes)
    assert text is not None
    assert "\n" not in text
    figures = re.search(r"a window of 320 samples, .* holds ([0-9.]+) of ([0-9,]+) classes .* would give ([0-9.]+);", text)
    assert figures is not None
    held, of, at_random = (float(figure.replace(",", "")) for figure in figures.groups())
    # The tars are read in a random order, so that each may begin with a class of its own.
    num_pieces = 320 / per_shard + 2
    assert 1 <= held <= min(num_classes, 320 / (num_samples / num_classes) + 2 * num_pieces)
    assert of == num_classes
    assert at_random == pytest.approx(num_classes * (1 - (1 - 1 / num_classes) ** 320), abs=0.06)
    assert "`shards convert 'old/x-*.tar' NEW_FOLDER --name train`" in text
    enough = int(text.split("--data.shuffle-buffer ")[1].split(",")[0])
    assert 256 < enough <= num_samples
    assert warning_for(shards, enough, num_classes) is None


def test_shards_that_are_sorted_in_part(write_shards: Callable[..., ShardSet]) -> None:
    """All classes are in every window; half of its samples are of one, each time another."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 600)
    labels = np.where(rng.random(6000) < 0.5, labels, rng.permutation(labels))
    text = warning_for(write_shards(labels, 600), 256, 10)
    assert text is not None
    assert "holds 10.0 of 10 classes on average, where random order would give 10.0" in text
    draws = float(text.split("its class mix is that of ")[1].split()[0])
    assert 3 < draws < 6  # rho is about 0.5 squared, so that a window is worth some 4


def test_a_large_set_is_sampled(write_shards: Callable[..., ShardSet]) -> None:
    labels = np.arange(66_000) % 100
    text = warning_for(write_shards(np.sort(labels), 1000), 2048, 100)
    assert text is not None
    assert "1,049 samples of a window of 2,112, among which training shuffles, holds" in text
    assert warning_for(write_shards(np.random.default_rng(0).permutation(labels), 1000), 2048, 100) is None


def test_samples_without_a_label_are_left_to_the_reader(tmp_path: Path) -> None:
    members = [(f"{i}.{end}", data) for i in range(400) for end, data in (("png", b"-"), ("txt" if i % 9 else "cls", b"1"))]
    write_tar(tmp_path / "x.tar", members)
    assert warning_for(open_shards(str(tmp_path / "x.tar"), "train"), 16, 2, 4) is None


def test_the_command_for_a_folder_names_the_split(write_shards: Callable[..., ShardSet], tmp_path: Path) -> None:
    """Since `convert` refuses a folder with several sets of shards."""
    shards = write_shards(np.repeat(np.arange(10), 200), 100)
    config = DataConfig(train=str(tmp_path), shuffle_buffer=64)
    assert f"shards convert '{tmp_path}/all-*.tar' NEW_FOLDER" in str(order_warning(shards, config, 64, 10))
    config = DataConfig(train="old", shuffle_buffer=64, label_key="a.b", class_file="my names.txt")
    command = "`shards convert old NEW_FOLDER --name train --label-key a.b --class-file 'my names.txt'`, and the validation"
    assert command in str(order_warning(shards, config, 64, 10))


# Training batches of shards that the converter has written. Each sample is a class of its own, by which it can be told.
NUM_SAMPLES, NUM_SHARDS, BATCH_SIZE, BUFFER, NUM_CLASSES = 3000, 100, 50, 256, 10


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    data = (folder / "image.png").read_bytes()
    for i in range(NUM_SAMPLES):
        (folder / "images" / f"{i:04d}").mkdir()
        (folder / "images" / f"{i:04d}" / "x.png").write_bytes(data)
    options = Options(name="train", shard_samples=NUM_SAMPLES // NUM_SHARDS)
    convert(folder / "images", folder / "shards", options, num_workers=1)
    return folder / "shards"


def epochs(location: Path, count: int, seed: int = 0) -> Iterator[Labels]:
    """The numbers of the samples in each batch of each epoch, `(batches, BATCH_SIZE)`."""
    config, cpu = DataConfig(train=str(location), shuffle_buffer=BUFFER), torch.device("cpu")
    with build_loader(
        config, "train", batch_size=BATCH_SIZE, image_size=8, device=cpu, num_threads=1, num_classes=NUM_SAMPLES, seed=seed
    ) as loader:
        for _ in range(count):
            yield torch.stack([batch["target"] for batch in loader]).numpy()


def chi_square(classes: Labels) -> tuple[float, int]:
    """How far the class counts of batches, `(batches, BATCH_SIZE)`, are from those of a random order; degrees of freedom."""
    counts = np.stack([np.bincount(batch, minlength=NUM_CLASSES) for batch in classes])
    expected = counts.sum(0) * counts.sum(1, keepdims=True) / counts.sum()
    return float(((counts - expected) ** 2 / expected).sum()), (len(counts) - 1) * (NUM_CLASSES - 1)


def chi_square_limit(degrees: int, deviations: float = 5.0) -> float:
    """What chance exceeds as seldom as a normal variable exceeds `deviations` times its own: once in 3.5 million for 5.

    By Wilson and Hilferty the cube root of chi-square over its degrees of freedom d is nearly normal, with the mean
    1 - 2/(9 d) and the variance 2/(9 d). Cells expect 5 samples, and both margins of the table are fixed, by the batch size and
    by the number of samples of a class: the mean of the sum is then d N/(N - 1), and its variance is a little below 2 d.
    """
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + deviations * math.sqrt(spread)) ** 3


def test_the_class_mix_of_batches_is_that_of_random_draws(converted: Path) -> None:
    for order in epochs(converted, 3):
        assert sorted(order.ravel()) == list(range(NUM_SAMPLES))
        statistic, degrees = chi_square(order % NUM_CLASSES)
        assert statistic < chi_square_limit(degrees)


def same_batch_twice(first: Labels, second: Labels) -> float:
    """Of the pairs of samples in one batch in the first epoch: how many are in one batch in the second, relative to chance."""
    batch_of = np.empty(NUM_SAMPLES, np.int64)
    batch_of[second.ravel()] = np.arange(second.size) // BATCH_SIZE
    again = batch_of[first]
    num_pairs = (again[:, :, None] == again[:, None, :]).sum() - first.size  # each twice, as in what it is divided by
    return float(num_pairs / (first.size * (BATCH_SIZE - 1) * (BATCH_SIZE - 1) / (NUM_SAMPLES - 1)))


def test_neighbours_differ_from_epoch_to_epoch(converted: Path) -> None:
    """Chance alone would give 1; that samples of a tar stay together adds a little.

    A simulation of this buffer gives 1.2 where the order of the tars is drawn anew each epoch, and 3.3 where it stays.
    """
    for first, second in itertools.pairwise(epochs(converted, 4)):
        assert 0.9 < same_batch_twice(first, second) < 1.6


def test_both_measures_tell_bad_order(converted: Path, tmp_path: Path) -> None:
    """The same samples in a single tar, sorted by class."""
    [tar, *_] = open_shards(str(converted), "train").tars
    image = next(component for component in scan_tar(tar)[0] if component.extension == "png")
    data = Path(tar).read_bytes()[image.offset : image.offset + image.size]
    members = [
        (f"{i}.{end}", content) for i in range(NUM_SAMPLES) for end, content in (("png", data), ("cls", str(i).encode()))
    ]
    write_tar(tmp_path / "x.tar", members)
    first, second = epochs(tmp_path / "x.tar", 2)
    statistic, degrees = chi_square(first * NUM_CLASSES // NUM_SAMPLES)
    assert statistic > 5 * chi_square_limit(degrees)
    assert same_batch_twice(first, second) > 2.5
