"""Divides the places of an epoch among batches and ranks.

A global batch is a range of places, so its samples do not depend on the number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.printable import counted
from pipelines.shards.order import Indices, Order


@dataclass(frozen=True)
class Plan:
    """The samples of one batch of one rank.

    Attributes:
        epoch: Epoch, from 0.
        batch: Index of the batch among this rank's batches of the epoch, from 0.
        offset: See `Deal.num_batches`.
        place: Place of the first sample; the others follow. Place and epoch determine each sample's random augmentation.
        samples: Sample numbers, int64 `(N,)`.
        is_last: Whether this is the last batch of the epoch.
    """

    epoch: int
    batch: int
    offset: int
    place: int
    samples: Indices
    is_last: bool


@dataclass(frozen=True)
class Deal:
    """The division of an epoch's places among ranks and batches.

    In training, global batches of `batch_size * world_size` places follow each other, and each rank takes its slice of each.
    Places that do not fill a global batch are dropped. In validation each rank has one contiguous range of places, and its last
    batch may be smaller.

    Attributes:
        order: Order of the samples.
        train: Whether this is training.
        batch_size: Samples per batch on this rank.
        rank: Index of this rank.
        world_size: Number of ranks.

    Raises:
        ValueError: The training samples do not fill one global batch.
    """

    order: Order
    train: bool
    batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.train and not self.num_batches():
            ranks = f" on each of {self.world_size} ranks" if self.world_size > 1 else ""
            raise ValueError(
                f"{counted(self.order.num_places, 'training sample')} cannot fill one batch of {self.batch_size}{ranks}; "
                "lower --batch-size"
            )

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size

    def num_batches(self, offset: int = 0) -> int:
        """Returns the number of this rank's batches in an epoch.

        Args:
            offset: Places at the beginning of the epoch that another world size has used already; 0 in validation.
        """
        if self.train:
            return (self.order.num_places - offset) // self.global_batch_size
        first, last = self._share()
        return -(-(last - first) // self.batch_size)

    def state(self, epoch: int, batch: int, offset: int) -> dict[str, int]:
        """Returns the position that loaders save. After the last batch of an epoch it is the beginning of the next.

        `place` is the progress within the epoch: in training the places that all ranks have used, in validation this rank's
        batches.
        """
        if batch == self.num_batches(offset):
            epoch, batch, offset = self.following_epoch(epoch), 0, 0
        return {"epoch": epoch, "batch": batch, "place": offset + batch * self.global_batch_size if self.train else batch}

    def position(self, epoch: int, place: int) -> tuple[int, int, int]:
        """Returns the epoch, batch and offset of a saved `place`, which another world size may have reached.

        If the rest of the epoch does not fill a batch, this is the beginning of the next epoch.
        """
        if not self.train:
            return epoch, place, 0
        batch, offset = divmod(place, self.global_batch_size)
        return (epoch, batch, offset) if batch < self.num_batches(offset) else (epoch + 1, 0, 0)

    def plan(self, epoch: int, batch: int, offset: int = 0) -> Plan:
        """Returns the plan of one batch."""
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

    def following_epoch(self, epoch: int) -> int:
        """Returns the number of the next epoch. All validation epochs have the number 0."""
        return epoch + 1 if self.train else 0

    def plans(self, epoch: int, batch: int, offset: int) -> Iterator[Plan]:
        """Yields the plans from a position on, epoch after epoch, without end."""
        while self.num_batches():  # a rank may have no validation batches
            for number in range(batch, self.num_batches(offset)):
                yield self.plan(epoch, number, offset)
            epoch, batch, offset = self.following_epoch(epoch), 0, 0

    def _share(self) -> tuple[int, int]:
        num_places = self.order.num_places
        return num_places * self.rank // self.world_size, num_places * (self.rank + 1) // self.world_size
