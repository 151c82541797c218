"""Which sample comes when: orders of a split, and how ranks and batches divide an epoch.

An epoch is a row of *places*. An order says which sample stands at each place, from the seed and the epoch alone. `Deal` cuts
the row into global batches, and each of those into the batches of the ranks. So a global batch does not depend on the number of
ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipelines.config import DataConfig
    from pipelines.shards.shard_set import ShardSet

Indices = NDArray[np.int64]

# Enough that samples which were neighbours in their shard seldom meet; copies of two blocks, 4 GB, fit on most disks.
BLOCK_SAMPLES = 16_384

ROUNDS = 4  # each moves both coordinates; four are what Luby and Rackoff need for a permutation that withstands an adversary


def random_key(*words: Any) -> NDArray[np.uint64]:
    """A 64-bit key from integers, or keys from arrays of them; another one for each combination."""
    key = np.zeros(1, np.uint64)
    for word in words:
        key = _mixed(key + np.atleast_1d(np.asarray(word)).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return key


def permute(indices: Indices, lengths: Any, keys: NDArray[np.uint64]) -> Indices:
    """Where pseudo-random permutations of `range(length)` send indices.

    Nothing is stored, so 14 million samples cost as little as ten. The permutation is a Feistel network over a grid that has
    at least `length` cells; an index that leaves the range goes through it again until it comes back (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        indices: `(N,)` int64.
        lengths: Of the range, one for all or one for each index.
        keys: One permutation for each key; `(1,)` or `(N,)` uint64.
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
    return (mixed >> np.uint64(20)).astype(np.int64)  # 44 bits, which stay positive when a coordinate is added


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64: each bit of the result depends on all bits of `x`. Arrays wrap around without a warning."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order(ABC):
    """Which sample stands at each place of an epoch. Samples are numbered through all shards of the split.

    Attributes:
        num_places: Places in an epoch.
        is_by_shard: Whether the samples of a global batch come sorted by shard, so that each rank reads few shards.
    """

    num_places: int
    is_by_shard = False

    @abstractmethod
    def samples(self, epoch: int, first: int, last: int) -> Indices:
        """The samples at the places `first` to `last` (exclusive), int64; sorted among themselves if `is_by_shard`."""

    def blocks(self, epoch: int, samples: Indices) -> Indices:
        """The number of the block that each sample is in; blocks are read one after the other."""
        return np.zeros_like(samples)

    @abstractmethod
    def __str__(self) -> str:
        """What it is, for messages and for the settings that a saved position depends on."""


class InOrder(Order):
    """The samples as the shards hold them, for validation.

    Args:
        lengths: Samples of each shard.
        block_shards: Shards in a block.
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
    """A permutation of all samples, another one in each epoch.

    Args:
        num_samples: In the split.
        seed: Of the permutations.
        repeats: How many places in a row each sample takes. The epoch keeps its length, so it has fewer different samples.
    """

    def __init__(self, num_samples: int, seed: int, repeats: int = 1) -> None:
        self.num_places, self._seed, self._repeats = num_samples, seed, repeats

    def samples(self, epoch: int, first: int, last: int) -> Indices:
        return permute(np.arange(first, last) // self._repeats, self.num_places, random_key(self._seed, epoch))

    def __str__(self) -> str:
        return f"global{_times(self._repeats)}"


@dataclass(frozen=True)
class _Blocks:
    """The blocks of one epoch.

    Attributes:
        shards: The shards in the order of this epoch.
        ends: Samples up to the end of each of those shards.
        block_ends: Samples up to the end of each block.
        of_shard: The block of each shard.
    """

    shards: Indices
    ends: Indices
    block_ends: Indices
    of_shard: Indices


class BlockOrder(Order):
    """Shuffled shards, and the samples permuted within blocks of some shards: storage is read block by block.

    Args:
        lengths: Samples of each shard.
        block_shards: Shards in a block.
        seed: Of the permutations.
        repeats: As for `GlobalOrder`.
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
        # Sorted by shard. Places that span two blocks are sorted by the relative position in each, so that each rank keeps to
        # its own part of both.
        sequence = np.argsort(within / lengths, kind="stable")
        positions = (starts + within)[sequence]
        number = np.searchsorted(blocks.ends, positions, "right")
        shard = blocks.shards[number]
        return self._starts[shard] + positions - (blocks.ends[number] - self._lengths[shard])

    def blocks(self, epoch: int, samples: Indices) -> Indices:
        blocks = self._of_epoch(epoch)
        return blocks.of_shard[np.searchsorted(self._starts, samples, "right") - 1]

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
    """Each class equally often; within a class each sample as often as any other.

    A class with fewer samples than its part of the epoch repeats them, every time in another order. A class with more shows
    other samples in each epoch.

    Args:
        labels: Of each sample; samples with a negative label never come.
        seed: Of the permutations.
        repeats: As for `GlobalOrder`.

    Raises:
        ValueError: No sample has a label.
    """

    def __init__(self, labels: NDArray[np.int32], seed: int, repeats: int = 1) -> None:
        self.num_places, self._seed, self._repeats = len(labels), seed, repeats
        self._by_class = np.argsort(labels, kind="stable")[int((labels < 0).sum()) :]
        if not len(self._by_class):
            raise ValueError("--data.sampler balanced: not one sample has a label that can be read")
        _, self._starts, self._counts = np.unique(labels[self._by_class], return_index=True, return_counts=True)

    def samples(self, epoch: int, first: int, last: int) -> Indices:
        mixed = permute(np.arange(first, last) // self._repeats, self.num_places, random_key(self._seed, epoch))
        turn, kind = np.divmod(mixed, len(self._counts))
        # When the epoch's length is no multiple of the number of classes, other classes come once more in each epoch.
        kind = permute(kind, len(self._counts), random_key(self._seed, epoch, 1))
        times, within = np.divmod(turn, self._counts[kind])
        within = permute(within, self._counts[kind], random_key(self._seed, epoch, 2 + kind, times))
        return self._by_class[self._starts[kind] + within]

    def __str__(self) -> str:
        return f"balanced over {len(self._counts)} classes{_times(self._repeats)}"


def _times(repeats: int) -> str:
    return "" if repeats == 1 else f", each sample {repeats} times in a row"


@dataclass(frozen=True)
class Plan:
    """What a batch of a rank has.

    Attributes:
        epoch: From 0.
        batch: Its number in the epoch, of this rank's, from 0.
        offset: As for `Deal.num_batches`.
        place: Of its first sample; the others follow. With the epoch it decides what is drawn at random for the sample.
        samples: Their numbers, int64 `(N,)`.
        is_last: Whether it is the last batch of the epoch.
    """

    epoch: int
    batch: int
    offset: int
    place: int
    samples: Indices
    is_last: bool


@dataclass(frozen=True)
class Deal:
    """How the places of an epoch are dealt out to ranks and batches.

    In training, global batches of `batch_size * world_size` places follow each other, and each rank has its slice of every one.
    Places that do not fill a global batch are left out. In validation each rank has one run of places, and its last batch may
    be smaller.

    Attributes:
        order: Of the samples.
        train: Training or validation.
        batch_size: Samples a batch, on this rank.
        rank: Which share.
        world_size: How many shares there are.
    """

    order: Order
    train: bool
    batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.train and not self.num_batches():
            raise ValueError(
                f"{self.order.num_places} training samples over {self.world_size} rank(s) do not fill one batch of "
                f"{self.batch_size}; lower --batch-size"
            )

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size

    def num_batches(self, offset: int = 0) -> int:
        """Batches of this rank in an epoch.

        Args:
            offset: Places at the epoch's beginning that were dealt out before, to another number of ranks; in training only.
        """
        if self.train:
            return (self.order.num_places - offset) // self.global_batch_size
        first, last = self._share()
        return -(-(last - first) // self.batch_size)

    def state(self, epoch: int, batch: int, offset: int) -> dict[str, int]:
        """A position as loaders save it: epoch, batch and place. After an epoch's last batch it is the beginning of the next.

        The place is how far the epoch is: in training the places that all ranks have had, in validation this rank's batches.
        """
        if batch == self.num_batches(offset):
            epoch, batch, offset = self.following_epoch(epoch), 0, 0
        return {"epoch": epoch, "batch": batch, "place": offset + batch * self.global_batch_size if self.train else batch}

    def position(self, epoch: int, place: int) -> tuple[int, int, int]:
        """The epoch, the batch and the offset that belong to a `place`, which another number of ranks may have reached.

        If fewer places than a batch are left, it is the beginning of the next epoch.
        """
        if not self.train:
            return epoch, place, 0
        batch, offset = divmod(place, self.global_batch_size)
        return (epoch, batch, offset) if batch < self.num_batches(offset) else (epoch + 1, 0, 0)

    def plan(self, epoch: int, batch: int, offset: int = 0) -> Plan:
        """What a batch of an epoch has."""
        if self.train:
            start = offset + batch * self.global_batch_size
            first = start + self.rank * self.batch_size
            last = first + self.batch_size
        else:
            first_of_share, last_of_share = self._share()
            first = first_of_share + batch * self.batch_size
            last = min(last_of_share, first + self.batch_size)
        if self.train and self.order.is_by_shard:
            samples = self.order.samples(epoch, start, start + self.global_batch_size)[first - start : last - start]
        else:
            samples = self.order.samples(epoch, first, last)
        return Plan(epoch, batch, offset, first, samples, batch + 1 == self.num_batches(offset))

    def first_plan_after(self, plan: Plan) -> Plan:
        """What the first batch of the epoch after a batch's epoch has; epochs of validation are all alike."""
        return self.plan(self.following_epoch(plan.epoch), 0)

    def following_epoch(self, epoch: int) -> int:
        return epoch + 1 if self.train else 0

    def plans(self, epoch: int, batch: int, offset: int) -> Iterator[Plan]:
        """The batches from a position on, epoch after epoch, without end."""
        while self.num_batches():  # a rank of validation may have none
            for number in range(batch, self.num_batches(offset)):
                yield self.plan(epoch, number, offset)
            epoch, batch, offset = self.following_epoch(epoch), 0, 0

    def _share(self) -> tuple[int, int]:
        num_places = self.order.num_places
        return num_places * self.rank // self.world_size, num_places * (self.rank + 1) // self.world_size


def block_shards_of(config: "DataConfig", shards: "ShardSet") -> int:
    """Shards in a block: by default as many as have `BLOCK_SAMPLES`, rounded up."""
    found = config.block_shards or math.ceil(BLOCK_SAMPLES * len(shards.lengths) / shards.num_samples)
    return min(found, len(shards.lengths))


def choose_order(config: "DataConfig", shards: "ShardSet", train: bool, seed: int) -> Order:
    """The order that the settings ask for; see `DataConfig`.

    Raises:
        ValueError: Classes are to be balanced, and the labels of the shards cannot be read; or a setting has no effect.
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
                f"--data.sampler balanced: the labels of {shards.tars[0]} and the other shards would be a request each; "
                "copy the shards to a disk"
            )
        return BalancedOrder(shards.label_array(), seed, config.repeat_augment)
    if is_in_blocks:
        return BlockOrder(shards.lengths, block_shards, seed, config.repeat_augment)
    return GlobalOrder(shards.num_samples, seed, config.repeat_augment)
