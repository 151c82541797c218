"""Reads the encoded batches of a rank some batches ahead, in background threads."""

import contextlib
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

from pipelines.bad_samples.quarantine import RowId
from pipelines.remote.cache import ShardCache, open_cache
from pipelines.shards.deal import Deal, Plan
from pipelines.shards.extents import Extents
from pipelines.shards.reader import Fetched, Reader
from pipelines.shards.shard_set import ShardSet
from pipelines.shards.tars import CopiedTars, Tars

if TYPE_CHECKING:
    from pipelines.config import DataConfig

READ_AHEAD = 2  # batches to read beyond those that DALI works on


class ReadAhead:
    """The encoded batches of a rank, in order, epoch after epoch.

    Remote shards are released between epochs, so reading stops at the end of an epoch until `begin_epoch` is called.

    Args:
        shards: Shards of the split.
        config: Names the cache folder.
        deal: This rank's share of the samples.
        num_classes: Labels must be below this number.
        prefetch: Batches that DALI works on at a time.

    Attributes:
        tars: The open tars.
        reader: Reads them.
    """

    def __init__(self, shards: ShardSet, config: "DataConfig", deal: Deal, num_classes: int, prefetch: int) -> None:
        self._deal = deal
        self._depth = prefetch + READ_AHEAD
        self._opened = contextlib.ExitStack()
        self._cache: ShardCache | None = None
        self.tars: Tars
        self._extents = extents = Extents(shards)
        if shards.is_remote:
            self._cache = self._opened.enter_context(open_cache(config.cache_dir, config.cache_gigabytes, config.timeout))
            self.tars = CopiedTars(shards, self._cache, deal, extents)
            self.reader = Reader(shards, extents, self.tars, num_classes, num_threads=1)
        else:
            self.tars = Tars(shards)
            self.reader = Reader(shards, extents, self.tars, num_classes)
        self._requested = deque[tuple[Plan, Future[Fetched]]]()
        self.go_to(0, 0, 0)

    def go_to(self, epoch: int, batch: int, offset: int) -> None:
        """Discards the batches read so far, and continues from a position."""
        self.tars.forget()  # a changed tar may have been restored
        for _, future in self._requested:
            future.cancel()
        self._requested.clear()
        self._plans = self._deal.plans(epoch, batch, offset)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Allows reading of the next epoch. Call it when all batches of the previous one have been used."""
        self._is_epoch_requested = False

    def next_plan(self, num_in_use: int) -> Plan | None:
        """Requests coming batches, and returns the plan of the next one, or None if there is none to read now.

        Args:
            num_in_use: Batches that were taken, and that DALI is still working on.
        """
        while len(self._requested) + num_in_use < self._depth:
            plan = None if self._cache is not None and self._is_epoch_requested else next(self._plans, None)
            if plan is None:
                break
            self._is_epoch_requested = plan.is_last
            self._requested.append((plan, self.reader.submit(plan)))
        return self._requested[0][0] if self._requested else None

    @property
    def copies(self) -> bool:
        """Whether reading waits for copies of remote shards. Requests to the store have time limits of their own."""
        return self._cache is not None

    def rows(self, plan: Plan) -> list[RowId]:
        """Returns the row IDs of the samples of a batch."""
        return [RowId(*row) for row in zip(*self._extents.locate(plan.samples), strict=True)]

    def is_ready(self) -> bool:
        """Whether the next batch has been read."""
        return self._requested[0][1].done()

    def next_batch(self) -> Fetched:
        """Waits for the next batch. It remains the next one until `advance` is called.

        Raises:
            ValueError: A tar changed or an index is damaged.
            OSError: A tar cannot be read.
        """
        return self._requested[0][1].result()

    def advance(self) -> None:
        """Marks the next batch as taken."""
        self._requested.popleft()

    def close(self) -> None:
        """Ends reading, and releases files and copies of remote shards."""
        if self._cache is not None:
            self._cache.close()  # ends the wait for copies
        self._requested.clear()
        self.reader.close()
        self.tars.close()
        self._opened.close()
