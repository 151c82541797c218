"""An epoch in pieces: which rows of which shards a rank reads, and in which order.

The reader opens every tar and parses every index that it is given before it reads the first sample. A segment bounds that, and
with it the open files, the memory and, for remote shards, the disk; while one is read, the next can be made ready.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.loader import rank_extent

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

# Of a segment. Each is an open file; a process may often have no more than 1,024, and up to four segments are open at once: of
# training and of validation, one that is read and one that is made ready.
MAX_TARS = 128


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of the index of one shard, `shard` being its number in the set."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Segment:
    """What one pipeline reads; `number` counts the segments of an epoch, `first_batch` its batches before this one."""

    epoch: int
    number: int
    first_batch: int
    num_batches: int
    parts: tuple[Part, ...]

    @property
    def end_batch(self) -> int:
        return self.first_batch + self.num_batches

    @property
    def num_samples(self) -> int:
        return sum(part.stop - part.start for part in self.parts)


def num_train_batches(num_samples: int, batch_size: int, world_size: int) -> int:
    """Batches in an epoch of training, the same on each rank: whole ones, as many as the smallest share has.

    Raises:
        ValueError: There are not enough samples for one.
    """
    batches = num_samples // world_size // batch_size
    if not batches:
        raise ValueError(
            f"{num_samples} training samples over {world_size} rank(s) do not fill one batch of {batch_size}; "
            "lower --batch-size"
        )
    return batches


def plan_epoch(
    lengths: "Sequence[int]",
    *,
    train: bool,
    epoch: int,
    batch_size: int,
    segment_samples: int,
    seed: int,
    rank: int,
    world_size: int,
) -> list[Segment]:
    """The segments of an epoch for a rank; a pure function of its arguments.

    Training goes through the shards in an order drawn from (seed, epoch), the same on every rank, and each rank reads its
    share of that; what does not fill a batch is left out, and is other samples in other epochs. Validation goes in order, and
    over all ranks has each sample once.

    Args:
        lengths: Samples in each shard.
        train: Training or validation.
        epoch: From 0.
        batch_size: Samples a batch, on this rank.
        segment_samples: About as many samples a segment at the most.
        seed: Of the order.
        rank: Which share.
        world_size: How many shares there are.
    """
    import numpy as np

    order = np.random.default_rng([seed, epoch]).permutation(len(lengths)) if train else np.arange(len(lengths))
    ends = np.cumsum(np.asarray(lengths)[order])
    first, last = rank_extent(int(ends[-1]), rank, world_size)
    if train:
        last = first + num_train_batches(int(ends[-1]), batch_size, world_size) * batch_size
    num_batches = -(-(last - first) // batch_size)
    # The tar with the first sample of each batch, and that with the last.
    begins = np.searchsorted(ends, first + batch_size * np.arange(num_batches), "right")
    finals = np.searchsorted(ends, np.minimum(last, first + batch_size * np.arange(1, num_batches + 1)) - 1, "right")
    # As equal as possible, lest the last one be too short to shuffle in.
    most_batches = -(-num_batches // max(1, -(-(last - first) // segment_samples)))
    segments, start = list[Segment](), 0
    while start < num_batches:
        fitting = int(np.searchsorted(finals, begins[start] + MAX_TARS))
        stop = max(start + 1, min(start + most_batches, fitting, num_batches))
        parts = _parts(order, ends, first + start * batch_size, min(last, first + stop * batch_size))
        segments.append(Segment(epoch, len(segments), start, stop - start, parts))
        start = stop
    return segments


def _parts(order: "NDArray[np.int64]", ends: "NDArray[np.int64]", first: int, last: int) -> tuple[Part, ...]:
    """The parts that hold the samples `first` to `last` of shards read in `order`; `ends` counts samples to each one's end."""
    import numpy as np

    parts = []
    place = int(np.searchsorted(ends, first, "right"))
    while first < last:
        start_of_shard = int(ends[place - 1]) if place else 0
        stop = min(last, int(ends[place]))
        parts.append(Part(int(order[place]), first - start_of_shard, stop - start_of_shard))
        first, place = stop, place + 1
    return tuple(part for part in parts if part.stop > part.start)
