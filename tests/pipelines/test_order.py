"""Orders of training samples are exact, random, independent of the world size, and cheap."""

import itertools
import math
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import Loader
from pipelines.shards.deal import Deal
from pipelines.shards.extents import Members, read_table
from pipelines.shards.index import format_index, scan_tar
from pipelines.shards.members import IMAGE_EXTENSIONS
from pipelines.shards.order import BalancedOrder, BlockOrder, GlobalOrder, InOrder, Order, permute, random_key
from pipelines.shards.shard_set import open_shards
from tests.helpers.loader_contract import saved, take
from tests.tools.test_verify import write_tar
from tools.shards.convert import convert
from tools.shards.plan import Options

Labels = NDArray[np.int64]
LENGTHS = [7, 1, 30, 13, 13, 2, 41, 9, 1, 1, 60]
CPU = torch.device("cpu")


def chi_square_limit(degrees: int, deviations: float = 5.0) -> float:
    """Returns the bound that a chi-square variable exceeds as rarely as a normal one exceeds `deviations` standard deviations.

    For 5 deviations that is once in 3.5 million. By Wilson and Hilferty (1931) the cube root of chi-square over its degrees of
    freedom d is nearly normal, with mean 1 - 2/(9 d) and variance 2/(9 d). In the tables of batches and classes, cells expect 5
    samples, and batch sizes and class sizes fix both margins. The mean of the sum is then d N/(N - 1), and its variance is
    slightly below 2 d.
    """
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + deviations * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17, 64, 61, 1000, 4097])
def test_permutations_are_exact_and_depend_on_the_key(length: int) -> None:
    indices = np.arange(length)
    found = [permute(indices, length, random_key(key)) for key in range(20)]
    assert all(sorted(order) == list(range(length)) for order in found)
    assert length < 17 or len({tuple(order) for order in found}) == 20
    for some in (indices[:3], indices[length // 2 :], indices[::-2]):  # an index maps to the same value alone and among others
        assert np.array_equal(permute(some, length, random_key(7)), found[7][some])


@pytest.mark.parametrize("length", [2, 3, 5, 8, 13, 40])
def test_permutations_are_random(length: int) -> None:
    """Each index reaches each place equally often, and each pair of neighbours each pair of places."""
    count = 400 * length
    found = np.stack([permute(np.arange(length), length, random_key(3, key)) for key in range(count)])
    places = np.stack([np.bincount(found[:, place], minlength=length) for place in range(length)])
    statistic = float(((places - count / length) ** 2 / (count / length)).sum())
    assert statistic < chi_square_limit((length - 1) ** 2)
    pairs = np.bincount(found[:, 0] * length + found[:, 1], minlength=length * length).reshape(length, length)
    assert not pairs.diagonal().any()
    expected = count / (length * (length - 1))
    statistic = float(((pairs[~np.eye(length, dtype=bool)] - expected) ** 2 / expected).sum())
    assert length == 2 or statistic < chi_square_limit(length * (length - 1) - 1)


def test_many_permutations_in_one_call() -> None:
    lengths = np.array([1, 2, 5, 100, 100])
    keys = random_key(5, np.arange(5))
    indices = np.array([0, 1, 3, 77, 77])
    alone = [permute(indices[i : i + 1], lengths[i], keys[i : i + 1])[0] for i in range(5)]
    assert permute(indices, lengths, keys).tolist() == alone


ORDERS: list[Order] = [
    GlobalOrder(sum(LENGTHS), 3),
    BlockOrder(LENGTHS, 1, 3),
    BlockOrder(LENGTHS, 4, 3),
    BlockOrder(LENGTHS, 100, 3),
    InOrder(LENGTHS, 4),
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_each_sample_once(order: Order) -> None:
    """Any pieces cover each sample once. The order changes with the epoch, except in validation."""
    whole = [order.samples(epoch, 0, order.num_places) for epoch in range(3)]
    for epoch, samples in enumerate(whole):
        assert sorted(samples) == list(range(sum(LENGTHS)))
        for size in (1, 7, 64):
            edges = [*range(0, order.num_places, size), order.num_places]
            pieces = [order.samples(epoch, first, last) for first, last in itertools.pairwise(edges)]
            assert sorted(np.concatenate(pieces)) == list(range(sum(LENGTHS)))
    is_random = not isinstance(order, InOrder)
    one_by_one = [[int(order.samples(epoch, place, place + 1)[0]) for place in range(order.num_places)] for epoch in range(2)]
    assert (one_by_one[0] != one_by_one[1]) == is_random


def test_blocks_come_one_after_the_other() -> None:
    order = BlockOrder(LENGTHS, 4, 0)
    shard_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    seen = []
    for epoch in range(5):
        samples = np.array([order.samples(epoch, place, place + 1)[0] for place in range(order.num_places)])
        blocks = order.blocks(epoch, samples)
        assert np.array_equal(blocks, np.sort(blocks))
        shards = [frozenset(shard_of[samples[blocks == block]]) for block in range(3)]
        assert [len(of_block) for of_block in shards] == [4, 4, 3]
        assert sum(LENGTHS[shard] for of_block in shards for shard in of_block) == sum(LENGTHS)
        seen.append(shards)
        # Within a block the samples of all its shards are mixed.
        first = shard_of[samples[blocks == 0]]
        assert (np.diff(first) != 0).mean() > 0.2 or len(first) < 20
    assert len(set(map(tuple, seen))) == 5


def test_ranks_read_few_shards_of_a_block() -> None:
    """Ranks divide a global batch by shard, and its samples do not depend on the world size."""
    order = BlockOrder([100] * 64, 16, 0)
    alone = Deal(order, True, 128, 0, 1)
    ranks = [Deal(order, True, 16, rank, 8) for rank in range(8)]
    for batch in range(alone.num_batches()):
        together = np.concatenate([rank.plan(1, batch).samples for rank in ranks])
        assert np.array_equal(together, alone.plan(1, batch).samples)
    for rank in ranks:  # in 1,536 of the first block's 1,600 samples
        shards = {int(sample) // 100 for batch in range(12) for sample in rank.plan(1, batch).samples}
        assert len(shards) <= 6  # two, apart from chance; without the sorting all 16


@pytest.mark.parametrize("order", [GlobalOrder(600, 1, 3), BlockOrder([60] * 10, 3, 1, 3)], ids=str)
def test_repeats(order: Order) -> None:
    assert order.num_places == 600
    samples = np.concatenate([order.samples(0, first, first + 30) for first in range(0, 600, 30)])
    assert set(Counter(samples.tolist()).values()) == {3}
    assert np.array_equal(samples[::3], samples[1::3])
    assert np.array_equal(samples[::3], samples[2::3])
    other = set(order.samples(1, 0, 600).tolist())
    assert 0 < len(other & set(samples.tolist())) < 200


def test_balanced_classes() -> None:
    """Classes, and samples within a class, are exactly balanced in each epoch. Samples without a label are never drawn."""
    labels = np.repeat(np.array([0, 1, 3, -1], np.int32), [5, 700, 95, 20])
    np.random.default_rng(0).shuffle(labels)
    order = BalancedOrder(labels, 0)
    assert order.num_places == 820
    seen = np.zeros(820, np.int64)
    for epoch in range(4):
        samples = order.samples(epoch, 0, 820)
        assert sorted(Counter(labels[samples].tolist()).values()) == [273, 273, 274]
        counts = np.bincount(samples, minlength=820)
        for label in (0, 1, 3):
            of_class = counts[labels == label]
            assert of_class.max() - of_class.min() <= 1
        seen += counts
        # The order is mixed: a tenth of the epoch has similar class counts.
        assert min(np.bincount(labels[samples[:82]])[[0, 1, 3]]) > 12
    assert not seen[labels < 0].any()
    assert seen[labels == 1].max() - seen[labels == 1].min() <= 4


def test_fourteen_million_samples_cost_nothing() -> None:
    tracemalloc.start()
    for order in (GlobalOrder(14_000_000, 0), BlockOrder([1400] * 10_000, 12, 0)):
        deal = Deal(order, True, 256, 3, 8)
        assert len(set(deal.plan(5, 4000).samples.tolist())) == 256
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


# Training batches of shards that the converter has written. Each sample is its own class, which identifies it.
NUM_SAMPLES, NUM_SHARDS, BATCH_SIZE, NUM_CLASSES = 3000, 100, 50, 10
KINDS: list[dict[str, Any]] = [{"order": "global"}, {"order": "blocks", "block_shards": 10}]


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


def make(location: Path, **options: Any) -> Loader:
    data = {name: options.pop(name) for name in ("order", "block_shards", "sampler", "repeat_augment") if name in options}
    config = DataConfig(train=str(location), **data)
    settings: dict[str, Any] = {"batch_size": BATCH_SIZE, "image_size": 8, "num_threads": 1, "num_classes": NUM_SAMPLES}
    return build_loader(config, LoaderSpec(split="train", device=CPU, **{**settings, **options}))


def epochs(location: Path, count: int, **options: Any) -> Iterator[Labels]:
    """Yields the sample numbers of each epoch, `(batches, BATCH_SIZE)`."""
    with make(location, **options) as loader:
        for _ in range(count):
            yield torch.stack([batch["target"] for batch in loader]).numpy()


def chi_square(classes: Labels) -> tuple[float, int]:
    """Returns the chi-square statistic of the class counts of batches, `(batches, BATCH_SIZE)`, and its degrees of freedom."""
    counts = np.stack([np.bincount(batch, minlength=NUM_CLASSES) for batch in classes])
    expected = counts.sum(0) * counts.sum(1, keepdims=True) / counts.sum()
    return float(((counts - expected) ** 2 / expected).sum()), (len(counts) - 1) * (NUM_CLASSES - 1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_batches_have_the_class_mix_of_random_draws(converted: Path, kind: dict[str, Any]) -> None:
    for order in epochs(converted, 3, **kind):
        assert sorted(order.ravel()) == list(range(NUM_SAMPLES))
        statistic, degrees = chi_square(order % NUM_CLASSES)
        assert statistic < chi_square_limit(degrees)


def same_batch_twice(first: Labels, second: Labels) -> float:
    """Returns how many pairs that share a batch in the first epoch share one in the second, relative to chance."""
    batch_of = np.empty(NUM_SAMPLES, np.int64)
    batch_of[second.ravel()] = np.arange(second.size) // BATCH_SIZE
    again = batch_of[first]
    num_pairs = (again[:, :, None] == again[:, None, :]).sum() - first.size  # counts each pair twice, like the divisor
    return float(num_pairs / (first.size * (BATCH_SIZE - 1) * (BATCH_SIZE - 1) / (NUM_SAMPLES - 1)))


def test_neighbours_differ_from_epoch_to_epoch(converted: Path) -> None:
    """Chance alone would give 1. In blocks of 10 of 100 shards it is 1.8: a tenth of a batch's pairs share a shard, and so
    they are in one block again.
    """
    limits = {"global": (0.9, 1.1), "blocks": (1.3, 2.4)}
    for kind in KINDS:
        low, high = limits[kind["order"]]
        for first, second in itertools.pairwise(epochs(converted, 4, **kind)):
            assert low < same_batch_twice(first, second) < high, kind


def test_both_measures_detect_bad_order(converted: Path, tmp_path: Path) -> None:
    """The samples are sorted by class, one class per shard, and read in blocks of one shard."""
    [tar, *_] = open_shards(str(converted), "train").tars
    image = next(component for component in scan_tar(tar)[0] if component.extension == "png")
    data = Path(tar).read_bytes()[image.offset : image.offset + image.size]
    per_shard = NUM_SAMPLES // NUM_CLASSES
    for number in range(NUM_CLASSES):
        rows = range(number * per_shard, (number + 1) * per_shard)
        members = [(f"{i}.{end}", content) for i in rows for end, content in (("png", data), ("cls", str(i).encode()))]
        write_tar(tmp_path / f"x-{number}.tar", members)
    first, second = epochs(tmp_path / "x-*.tar", 2, order="blocks", block_shards=1)
    statistic, degrees = chi_square(first // per_shard)
    assert statistic > 5 * chi_square_limit(degrees)
    assert same_batch_twice(first, second) > 2.5


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("batch_sizes", [(30, 20, 60), (25, 20, 50)], ids=["one global batch size", "several"])
def test_resuming_with_other_world_sizes(converted: Path, kind: dict[str, Any], batch_sizes: tuple[int, int, int]) -> None:
    """2, 3 and 1 ranks share an epoch, and each sample comes once."""
    seen, state = list[int](), None
    with make(converted, batch_size=60, **kind) as loader:
        undisturbed = [set(batch["target"].tolist()) for batch in loader]
    together = []
    for world_size, batch_size, count in zip((2, 3, 1), batch_sizes, (12, 8, 1000), strict=True):
        of_ranks = []
        for rank in range(world_size):
            with make(converted, batch_size=batch_size, rank=rank, world_size=world_size, **kind) as loader:
                if state is not None:
                    loader.load_state_dict(state)
                given = list(itertools.islice(iter(loader.next, None), count))
                of_ranks.append([batch["target"].tolist() for batch in given])
                following = saved(loader.state_dict())
        state = following
        together += [set().union(*parts) for parts in zip(*of_ranks, strict=True)]
        seen += [target for batches in of_ranks for batch in batches for target in batch]
    assert len(set(seen)) == len(seen)
    assert len(seen) >= NUM_SAMPLES - max(batch_sizes)
    assert (state["epoch"], state["place"]) == (1, 0)
    if batch_sizes[1] == 20 and batch_sizes[0] == 30:
        assert together == undisturbed


@pytest.mark.parametrize(
    "options", [{"sampler": "balanced"}, {"repeat_augment": 4}, {"order": "blocks", "repeat_augment": 2}], ids=str
)
def test_samplers_are_resumed_at_any_position(shards: Path, options: dict[str, Any]) -> None:
    options = {"batch_size": 8, "image_size": 32, "num_classes": 3, **options}
    with make(shards, **options) as loader:
        batches, states = [], []
        for _ in range(10):
            states.append(saved(loader.state_dict()))
            batches += take(loader, 1)
    for position in (0, 3, 6, 7, 9):
        with make(shards, **options) as loader:
            loader.load_state_dict(states[position])
            [again] = take(loader, 1)
            assert torch.equal(again["image"], batches[position]["image"])
            assert torch.equal(again["target"], batches[position]["target"])
    if "repeat_augment" in options:  # the same image with different crops
        first, second = batches[0]["image"][:2]
        assert batches[0]["target"][0] == batches[0]["target"][1]
        assert not torch.equal(first, second)


def test_balanced_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One class has 5 of 60 samples. Labels are read once and cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    labels = [b"1" if i % 12 == 5 else b"?" if i == 7 else b"0" for i in range(60)]
    write_tar(
        tmp_path / "x.tar", [(f"{i}.{end}", part) for i in range(60) for end, part in (("png", data), ("cls", labels[i]))]
    )
    options = {"batch_size": 10, "sampler": "balanced", "num_classes": 2}
    for _ in range(2):
        targets = np.concatenate([epoch.ravel() for epoch in epochs(tmp_path / "x.tar", 2, **options)])
        assert np.bincount(targets).tolist() == [60, 60]
        [kept] = (tmp_path / "cache").rglob("*.npy")
    kept.write_bytes(b"damaged")
    assert np.bincount(next(epochs(tmp_path / "x.tar", 1, **options)).ravel()).tolist() == [30, 30]


def test_the_position_of_another_order_is_refused(converted: Path) -> None:
    with make(converted) as loader:
        take(loader, 1)
        state = saved(loader.state_dict())
    with (
        make(converted, order="blocks", block_shards=3) as loader,
        pytest.raises(ValueError, match="another order: global, now blocks of 3 shards"),
    ):
        loader.load_state_dict(state)


def test_a_shard_as_large_as_a_data_set(tmp_path: Path, shards: Path) -> None:
    """Its index is read into a table of 24 bytes per sample, without an object per sample."""
    samples = scan_tar(open_shards(str(shards), "train").tars[0])
    (tmp_path / "x.idx").write_text(format_index(5000 * samples))
    tracemalloc.start()
    table = read_table(tmp_path / "x.idx", Members(IMAGE_EXTENSIONS, "cls"))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table.sizes) == 5000 * len(samples)
    assert held < 30 * len(table.sizes)
    assert peak < 50_000_000  # objects would take five times as much
