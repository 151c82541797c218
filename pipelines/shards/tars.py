"""Opens the tars of a split, or the local copies of remote ones, and detects tars that change during the run."""

import contextlib
import dataclasses
import errno
import os
import resource
import tarfile
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from pipelines.shards.index import member_size
from pipelines.shards.shard_set import ShardSet

if TYPE_CHECKING:
    from pipelines.remote.cache import ShardCache
    from pipelines.shards.deal import Deal, Plan
    from pipelines.shards.extents import Extents

WAY_OUT = "Restore the shard and resume, or start a new run with the new shards"
MOST_OPEN = 128  # tars per loader; processes are often limited to 1,024 open files


class OpenTar:
    """A tar that stays open as long as it is referenced."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def identity(self) -> tuple[int, int]:
        """Returns what changes when the file is written to, or is another one."""
        return _identity(os.fstat(self.descriptor))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # missing if `os.open` failed
            os.close(self.descriptor)


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_ino, stat.st_mtime_ns


class Tars:
    """Opens the tars of local shards, keeps the most recent ones open, and detects changed ones. Threads may share it."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._known = {} if shards.is_remote else {shard: _identity(os.stat(tar)) for shard, tar in enumerate(shards.tars)}
        self._limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        is_limited = self._limit != resource.RLIM_INFINITY
        self.most_open = min(MOST_OPEN, max(2, self._limit // 8)) if is_limited else MOST_OPEN
        self._open: OrderedDict[int, OpenTar] = OrderedDict()
        self._lock = threading.Lock()

    def parts(self, plan: "Plan") -> Iterator[list[int]]:
        """Yields slots of a batch that are read together. Their tars stay available until the next part."""
        if plan.batch == 0:
            self.forget()
        yield list(range(len(plan.samples)))

    def path(self, shard: int) -> str:
        """Returns the local path of a tar."""
        return self._shards.tars[shard]

    def open(self, shard: int) -> OpenTar:
        """Opens a tar for reading.

        Raises:
            ValueError: The tar has changed since the run began, or this process has too many open files.
            OSError: The tar cannot be opened.
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
                raise ValueError(f"{path}: {error.strerror}; raise the limit of {self._limit:,} with `ulimit -n`") from error
        with self._lock:
            self._open[shard] = tar
            while len(self._open) > self.most_open:
                self._open.popitem(last=False)
        return tar

    def forget(self) -> None:
        """Closes all unused tars, so that changed files are noticed when they are next opened."""
        with self._lock:
            self._open.clear()

    def check_size(self, shard: int) -> None:
        """Compares the size of a tar with its size when the run began.

        Raises:
            ValueError: The tar has changed, or is gone.
        """
        path, size = self.path(shard), self._shards.sizes[shard]
        try:
            now = os.stat(path).st_size
        except FileNotFoundError:
            raise ValueError(f"{path}: gone; it was there when the run began. Restore the shard and resume") from None
        if now != size:
            what = "cut short" if now < size else "replaced"
            raise ValueError(f"{path}: {what} while the run was in progress: {now:,} bytes, {size:,} when it began. {WAY_OUT}")

    def has_changed(self, shard: int, identity: tuple[int, int]) -> bool:
        """Tells whether a tar with this identity is not as when the run began. Copies of remote shards do not change."""
        return self._known.get(shard, identity) != identity

    def check_members(self, shard: int, tar: OpenTar, members: Iterable[tuple[int, int]]) -> None:
        """Looks for members of a shard, offset and size of each, in a tar that has changed.

        Bytes from between two members might pass for a label. A tar that was only touched, or written anew with the same
        members, is accepted.

        Raises:
            ValueError: One of them is not there.
        """
        for offset, size in members:
            if member_size(os.pread(tar.descriptor, tarfile.BLOCKSIZE, max(0, offset - tarfile.BLOCKSIZE))) != size:
                raise self.written_to(shard)

    def check_content(self, samples: Iterable[tuple[int, bool]]) -> None:
        """Looks for tars that have been written to and whose samples in a batch are all bad.

        Args:
            samples: For each sample of the batch, its shard and whether the sample is bad.

        Raises:
            ValueError: Such a tar exists: then the tar is at fault, not its samples.
        """
        verdicts = defaultdict(list)
        for shard, is_bad in samples:
            verdicts[shard].append(is_bad)
        for shard, bad in verdicts.items():
            if shard in self._known and all(bad) and self.has_changed(shard, _identity(os.stat(self.path(shard)))):
                raise ValueError(
                    f"{self.path(shard)}: written to while the run was in progress; its samples are no longer images. {WAY_OUT}"
                )

    def written_to(self, shard: int) -> ValueError:
        """Returns the error for a tar whose members have changed."""
        return ValueError(
            f"{self.path(shard)}: written to while the run was in progress; its members are not those that its index lists. "
            f"{WAY_OUT}"
        )

    def close(self) -> None:
        """Releases everything."""
        self.forget()


class CopiedTars(Tars):
    """Opens the copies of remote shards in a cache, which holds one block of the order at a time.

    While the samples of a block are read, the cache copies the shards of the next block as far as there is room. A loader that
    held two blocks at once could wait for room forever, and keep others waiting. Nothing is held between two epochs, when
    another loader reads. `deal` tells which batches follow. Not thread-safe.
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
            self._cache.show_life()
            yield slots.tolist()
        if plan.is_last:
            self.close()
            self._prefetch(self._deal.plan(self._deal.following_epoch(plan.epoch), 0))

    def close(self) -> None:
        """Releases the copies, for which other loaders may be waiting."""
        self.forget()
        self._lease.close()
        self._held = None

    def _prefetch(self, plan: "Plan") -> None:
        """Starts to copy the shards of a batch's first block."""
        block = int(self._deal.order.blocks(plan.epoch, plan.samples).min())
        self._cache.prefetch(self._remote(self._scan(plan, block)[0]))

    def _enter(self, plan: "Plan", block: int, needed: set[int]) -> None:
        # After a jump back, or for a stand-in, the batch may need shards of the block that are not held.
        if self._held == (plan.epoch, block) and needed <= self._paths.keys():
            return
        self.close()
        shards, following = self._scan(plan, block)
        copies = self._lease.enter_context(self._cache.hold(self._remote(shards)))
        self._paths = dict(zip(shards, map(str, copies), strict=True))
        self._held = plan.epoch, block
        if following is not None:
            self._prefetch(following)

    def _scan(self, plan: "Plan", block: int) -> tuple[list[int], "Plan | None"]:
        """Returns the shards of a block that this rank reads from a batch on, and the batch that begins the next block."""
        shards = set[int]()
        following: Plan | None = plan
        while following is not None:
            blocks = self._deal.order.blocks(plan.epoch, following.samples)
            shards |= set(self._extents.locate(following.samples[blocks == block])[0])
            if (blocks > block).any():
                return sorted(shards), dataclasses.replace(following, samples=following.samples[blocks > block])
            following = None if following.is_last else self._deal.plan(plan.epoch, following.batch + 1, plan.offset)
        return sorted(shards), None

    def _remote(self, shards: Iterable[int]) -> list[tuple[str, int]]:
        """Returns URLs and sizes of tars."""
        return [(self._shards.tars[shard], self._shards.sizes[shard]) for shard in shards]
