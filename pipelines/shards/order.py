"""The order of the samples in an epoch.

An epoch is a sequence of *places*. An order maps each place to a sample, from the seed and the epoch alone.
`pipelines/shards/deal.py` divides the places among batches and ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipelines.config import DataConfig
    from pipelines.shards.shard_set import ShardSet

Indices = NDArray[np.int64]

# Large enough that neighbours in a shard rarely share a batch; small enough that copies of two blocks (4 GB) fit on most disks.
BLOCK_SAMPLES = 16_384

ROUNDS = 4  # each mixes both coordinates; Luby and Rackoff (1988) prove that four withstand an adversary


def random_key(*words: Any) -> NDArray[np.uint64]:
    """Hashes integers to a 64-bit key, or arrays of integers to an array of keys: uint64 `(1,)` or `(N,)`."""
    key = np.zeros(1, np.uint64)
    for word in words:
        key = _mixed(key + np.atleast_1d(np.asarray(word)).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return key


def permute(indices: Indices, lengths: Any, keys: NDArray[np.uint64]) -> Indices:
    """Applies pseudo-random permutations of `range(length)` to indices.

    Nothing is stored, so 14 million samples cost as little as ten. The permutation is a Feistel network over a grid of at
    least `length` cells. An index that leaves the range goes through the network until it returns (cycle walking; Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        indices: `(N,)` int64.
        lengths: Length of the range: one number, or `(N,)`.
        keys: Keys of the permutations, uint64 `(1,)` or `(N,)`.
    """
    lengths, keys = np.broadcast_to(lengths, indices.shape), np.broadcast_to(keys, indices.shape)
    rows = np.ceil(np.sqrt(lengths)).astype(np.int64)
    columns = -(-lengths // rows)
    found = _through_grid(indices, rows, columns, keys)
    while len(outside := np.flatnonzero(found >= lengths)):
        found[outside] = _through_grid(found[outside], rows[outside], columns[outside], keys[outside])
    return found


def _through_grid(indices: Indices, rows: Indices, columns: Indices, keys: NDArray[np.uint64]) -> Indices:
    row, column = np.divmod(indices, columns)
    for number in range(ROUNDS):
        row = (row + _hashed(keys, 2 * number, column)) % rows
        column = (column + _hashed(keys, 2 * number + 1, row)) % columns
    return row * columns + column


def _hashed(keys: NDArray[np.uint64], number: int, values: Indices) -> Indices:
    mixed = _mixed(keys + values.astype(np.uint64) * np.uint64(0xD1342543DE82EF95) + np.uint64(number << 56))
    return (mixed >> np.uint64(20)).astype(np.int64)  # 44 bits: adding a coordinate cannot overflow


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Applies the finalizer of SplitMix64: each output bit depends on all input bits. Arrays wrap around without a warning."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order(ABC):
    """Maps each place of an epoch to a sample. Sample numbers run through all shards of the split.

    Attributes:
        num_places: Places in an epoch.
        is_by_shard: Whether a range of places comes sorted by shard. Each rank then reads few shards.
    """

    num_places: int
    is_by_shard = False

    @abstractmethod
    def samples(self, epoch: int, first: int, last: int) -> Indices:
        """Returns the samples at the places from `first` up to `last` (exclusive), int64; sorted by shard if `is_by_shard`."""

    def blocks(self, epoch: int, samples: Indices) -> Indices:
        """Returns the block of each sample, int64. Blocks are read one after the other."""
        return np.zeros_like(samples)

    @abstractmethod
    def __str__(self) -> str:
        """Describes the order, in messages and in the settings of a saved position."""


class InOrder(Order):
    """The order in which the shards store the samples, for validation.

    Args:
        lengths: Samples per shard.
        block_shards: Shards per block.
    """

    def __init__(self, lengths: Sequence[int], block_shards: int) -> None:
        self._ends, self._block_shards = np.cumsum(lengths), block_shards
        self.num_places = int(self._ends[-1])

    def samples(self, epoch: int, first: int, last: int) -> Indices:
        return np.arange(first, last)

    def blocks(self, epoch: int, samples: Indices) -> Indices:
        return np.searchsorted(self._ends, samples, "right") // self._block_shards

    def __str__(self) -> str:
        return "as in the shards"


class GlobalOrder(Order):
    """A new permutation of all samples in each epoch.

    Args:
        num_samples: Samples in the split.
        seed: Seed of the permutations.
        repeats: Consecutive places per sample. The epoch keeps its length and so has fewer distinct samples.
    """

    def __init__(self, num_samples: int, seed: int, repeats: int = 1) -> None:
        self.num_places, self._seed, self._repeats = num_samples, seed, repeats

    def samples(self, epoch: int, first: int, last: int) -> Indices:
        return permute(np.arange(first, last) // self._repeats, self.num_places, random_key(self._seed, epoch))

    def __str__(self) -> str:
        return f"global{_times(self._repeats)}"


class _Blocks(NamedTuple):
    """The blocks of one epoch."""

    shards: Indices  # in the order of this epoch
    ends: Indices  # cumulative sample count at the end of each of those shards
    block_ends: Indices  # cumulative sample count at the end of each block
    of_shard: Indices  # block of each shard


class BlockOrder(Order):
    """Shuffles the shards, and permutes the samples within blocks of shards. Storage is read block by block.

    Args:
        lengths: Samples per shard.
        block_shards: Shards per block.
        seed: Seed of the permutations.
        repeats: See `GlobalOrder`.
    """

    is_by_shard = True

    def __init__(self, lengths: Sequence[int], block_shards: int, seed: int, repeats: int = 1) -> None:
        self._lengths = np.asarray(lengths, np.int64)
        self._block_shards, self._seed, self._repeats = min(block_shards, len(lengths)), seed, repeats
        self._starts = np.cumsum(self._lengths) - self._lengths
        self.num_places = int(self._lengths.sum())
        self._of_epoch = lru_cache(2)(self._plan)

    def samples(self, epoch: int, first: int, last: int) -> Indices:
        blocks = self._of_epoch(epoch)
        places = np.arange(first, last) // self._repeats
        block = np.searchsorted(blocks.block_ends, places, "right")
        starts = np.concatenate([[0], blocks.block_ends])[block]
        lengths = blocks.block_ends[block] - starts
        within = permute(places - starts, lengths, random_key(self._seed, epoch, block + 1))
        # Sort by shard. If the places span two blocks, sort by the relative position in each, so that each rank keeps to
        # its own part of both.
        sequence = np.argsort(within / lengths, kind="stable")
        positions = (starts + within)[sequence]
        number = np.searchsorted(blocks.ends, positions, "right")
        shard = blocks.shards[number]
        return self._starts[shard] + positions - (blocks.ends[number] - self._lengths[shard])

    def blocks(self, epoch: int, samples: Indices) -> Indices:
        return self._of_epoch(epoch).of_shard[np.searchsorted(self._starts, samples, "right") - 1]

    def _plan(self, epoch: int) -> _Blocks:
        num_shards = len(self._lengths)
        shards = permute(np.arange(num_shards), num_shards, random_key(self._seed, epoch, 0))
        ends = np.cumsum(self._lengths[shards])
        last_of_blocks = np.append(np.arange(self._block_shards, num_shards, self._block_shards), num_shards) - 1
        of_shard = np.empty_like(shards)
        of_shard[shards] = np.arange(num_shards) // self._block_shards
        return _Blocks(shards, ends, ends[last_of_blocks], of_shard)

    def __str__(self) -> str:
        return f"blocks of {self._block_shards} shards{_times(self._repeats)}"


class BalancedOrder(Order):
    """Draws each class equally often, and within a class each sample equally often.

    A class with fewer samples than its share of the epoch repeats them, each time in a new order. A larger class shows
    different samples in each epoch.

    Args:
        labels: Label of each sample, int32. Samples with a negative label are never drawn.
        seed: Seed of the permutations.
        repeats: See `GlobalOrder`.

    Raises:
        ValueError: No sample has a label.
    """

    def __init__(self, labels: NDArray[np.int32], seed: int, repeats: int = 1) -> None:
        self.num_places, self._seed, self._repeats = len(labels), seed, repeats
        self._by_class = np.argsort(labels, kind="stable")[int((labels < 0).sum()) :]
        if not len(self._by_class):
            raise ValueError("--data.sampler balanced: no sample has a readable label")
        _, self._starts, self._counts = np.unique(labels[self._by_class], return_index=True, return_counts=True)

    def samples(self, epoch: int, first: int, last: int) -> Indices:
        mixed = permute(np.arange(first, last) // self._repeats, self.num_places, random_key(self._seed, epoch))
        turn, kind = np.divmod(mixed, len(self._counts))
        # If the epoch's length is not a multiple of the number of classes, different classes get an extra sample each epoch.
        kind = permute(kind, len(self._counts), random_key(self._seed, epoch, 1))
        times, within = np.divmod(turn, self._counts[kind])
        within = permute(within, self._counts[kind], random_key(self._seed, epoch, 2 + kind, times))
        return self._by_class[self._starts[kind] + within]

    def __str__(self) -> str:
        return f"balanced over {len(self._counts)} classes{_times(self._repeats)}"


def _times(repeats: int) -> str:
    return "" if repeats == 1 else f", each sample {repeats} times in a row"


def block_shards_of(config: "DataConfig", shards: "ShardSet") -> int:
    """Returns the number of shards per block; the default makes blocks of about `BLOCK_SAMPLES` samples."""
    found = config.block_shards or math.ceil(BLOCK_SAMPLES * len(shards.lengths) / shards.num_samples)
    return min(found, len(shards.lengths))


def choose_order(config: "DataConfig", shards: "ShardSet", train: bool, seed: int) -> Order:
    """Builds the order that the settings ask for; see `DataConfig`.

    Raises:
        ValueError: Balanced sampling cannot read the labels, or a setting has no effect.
    """
    block_shards = block_shards_of(config, shards)
    if not train:
        return InOrder(shards.lengths, block_shards)
    is_in_blocks = config.order == "blocks" or (config.order == "auto" and shards.is_remote)
    if config.block_shards is not None and not is_in_blocks:
        raise ValueError(f"--data.block-shards {config.block_shards} has no effect; it goes with --data.order blocks")
    if config.sampler == "balanced":
        if shards.is_remote:
            raise ValueError(
                f"--data.sampler balanced: {shards.tars[0]} is remote, where each label would take a request; "
                "copy the shards to a local disk"
            )
        return BalancedOrder(shards.label_array(), seed, config.repeat_augment)
    if is_in_blocks:
        return BlockOrder(shards.lengths, block_shards, seed, config.repeat_augment)
    return GlobalOrder(shards.num_samples, seed, config.repeat_augment)
