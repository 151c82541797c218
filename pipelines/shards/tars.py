"""Open tars of a split: local ones, or the copies of remote ones; and what became of them since the run began."""

import contextlib
import dataclasses
import errno
import os
import resource
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from pipelines.shards.shard_set import ShardSet

if TYPE_CHECKING:
    from pipelines.remote.cache import ShardCache
    from pipelines.shards.extents import Extents
    from pipelines.shards.order import Deal, Plan

WAY_OUT = "Put the shard back as it was and resume, or begin a run on the new ones"
MOST_OPEN = 128  # tars of a loader; a process may often have no more than 1,024 files open


class OpenTar:
    """A tar that is open for as long as somebody refers to it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # it could be opened
            os.close(self.descriptor)


class Tars:
    """Opens the tars of local shards, keeps the last ones open, and tells tars that have changed. Threads may share it.

    Args:
        shards: Those of the split.
    """

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._before = {} if shards.is_remote else {shard: os.stat(tar) for shard, tar in enumerate(shards.tars)}
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most_open = min(MOST_OPEN, max(2, limit // 8)) if limit != resource.RLIM_INFINITY else MOST_OPEN
        self._open: OrderedDict[int, OpenTar] = OrderedDict()
        self._lock = threading.Lock()

    def parts(self, plan: "Plan") -> Iterator[list[int]]:
        """Slots of a batch that can be read together; their tars are there until the next part is asked for."""
        if plan.batch == 0:
            self.forget()
        yield list(range(len(plan.samples)))

    def path(self, shard: int) -> str:
        """The local path of a tar."""
        return self._shards.tars[shard]

    def open(self, shard: int) -> OpenTar:
        """The tar, open for reading.

        Raises:
            ValueError: It is not what it was when the run began, or this process may not open more files.
            OSError: It cannot be opened.
        """
        with self._lock:
            tar = self._open.pop(shard, None)
        if tar is None:
            path = self.path(shard)
            self.check_size(shard)
            try:
                tar = OpenTar(path)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                raise ValueError(
                    f"{path}: {error.strerror}; this process may have {limit:,} files open: raise that with `ulimit -n`"
                ) from error
        with self._lock:
            self._open[shard] = tar
            while len(self._open) > self.most_open:
                self._open.popitem(last=False)
        return tar

    def forget(self) -> None:
        """Lets go of all tars, so that whoever opens one next sees what is there by then."""
        with self._lock:
            self._open.clear()

    def check_size(self, shard: int) -> None:
        """Compares a tar with the size that it had.

        Raises:
            ValueError: It has changed, or is gone.
        """
        path, size = self.path(shard), self._shards.sizes[shard]
        try:
            now = os.stat(path).st_size
        except FileNotFoundError:
            raise ValueError(f"{path}: gone; it was there when the run began") from None
        if now != size:
            what = "cut short" if now < size else "replaced"
            raise ValueError(f"{path}: {what} while the run was under way: {now:,} bytes, {size:,} when it began. {WAY_OUT}")

    def check_content(self, samples: Iterable[tuple[int, bool]]) -> None:
        """Looks for tars that have been written to, and of whose samples not one can be used.

        Args:
            samples: The shard of each sample of a batch, and whether the sample is bad.

        Raises:
            ValueError: There is one: the tar is what is wrong then, and not its samples.
        """
        verdicts = defaultdict(list)
        for shard, is_bad in samples:
            verdicts[shard].append(is_bad)
        for shard, bad in verdicts.items():
            before = self._before.get(shard)
            if before is None or not all(bad):
                continue
            now = os.stat(self.path(shard))
            if (now.st_mtime_ns, now.st_ino) != (before.st_mtime_ns, before.st_ino):
                raise ValueError(
                    f"{self.path(shard)}: written to while the run was under way, and what is read now is no image. {WAY_OUT}"
                )

    def close(self) -> None:
        """Lets go of everything."""
        self.forget()


class CopiedTars(Tars):
    """The same for remote shards, by their copies in a cache, which holds those of one block of the order at a time.

    While the samples of a block are read, the shards of the next one are copied as far as there is room. To hold two blocks at
    once would be to wait for room, and to keep it from others. Nothing is held between two epochs, when another loader reads.
    One thread at a time may use it.

    Args:
        shards: Those of the split.
        cache: For the copies.
        deal: Which samples the batches of this rank have.
        extents: Of the split's samples.
    """

    def __init__(self, shards: ShardSet, cache: "ShardCache", deal: "Deal", extents: "Extents") -> None:
        super().__init__(shards)
        self._cache, self._deal, self._extents = cache, deal, extents
        self._held: tuple[int, int] | None = None  # epoch and block
        self._lease = contextlib.ExitStack()
        self._paths: dict[int, str] = {}

    def path(self, shard: int) -> str:
        return self._paths[shard]

    def parts(self, plan: "Plan") -> Iterator[list[int]]:
        blocks = self._deal.order.blocks(plan.epoch, plan.samples)
        for block in np.unique(blocks).tolist():
            slots = np.flatnonzero(blocks == block)
            self._enter(plan, block, set(self._extents.locate(plan.samples[slots])[0]))
            yield slots.tolist()
        if plan.is_last:
            self.release()
            self.prefetch(self._deal.first_plan_after(plan))

    def prefetch(self, plan: "Plan | None") -> None:
        """Begins to copy the shards of the block in which a batch begins."""
        if plan is not None:
            block = int(self._deal.order.blocks(plan.epoch, plan.samples).min())
            self._cache.prefetch(self._remote(self._scan(plan, block)[0]))

    def release(self) -> None:
        """Lets the copies go, for which others may be waiting."""
        self.forget()
        self._lease.close()
        self._held = None

    def close(self) -> None:
        self.release()

    def _enter(self, plan: "Plan", block: int, needed: set[int]) -> None:
        # After a jump back, or for a stand-in, other shards of the block may be needed than it was entered for.
        if self._held == (plan.epoch, block) and needed <= self._paths.keys():
            return
        self.release()
        shards, following = self._scan(plan, block)
        copies = self._lease.enter_context(self._cache.hold(self._remote(shards)))
        self._paths = dict(zip(shards, map(str, copies), strict=True))
        self._held = plan.epoch, block
        self.prefetch(following)

    def _scan(self, plan: "Plan", block: int) -> tuple[list[int], "Plan | None"]:
        """The shards of a block from which this rank reads, from a batch on; and what follows on the block."""
        shards = set[int]()
        following: Plan | None = plan
        while following is not None and following.epoch == plan.epoch:
            blocks = self._deal.order.blocks(plan.epoch, following.samples)
            shards |= set(self._extents.locate(following.samples[blocks == block])[0])
            if (blocks > block).any():
                return sorted(shards), dataclasses.replace(following, samples=following.samples[blocks > block])
            following = None if following.is_last else self._deal.plan(plan.epoch, following.batch + 1, plan.offset)
        return sorted(shards), None

    def _remote(self, shards: Iterable[int]) -> list[tuple[str, int]]:
        """URLs and bytes of tars."""
        return [(self._shards.tars[shard], self._shards.sizes[shard]) for shard in shards]
