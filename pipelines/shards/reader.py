"""Reads the encoded images and the labels of coming batches from the tars, in background threads."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.bad_samples.cut_short import why_cut_short
from pipelines.bad_samples.jpeg import END
from pipelines.bad_samples.quarantine import RowId
from pipelines.shards.deal import Plan
from pipelines.shards.extents import Extents, Table
from pipelines.shards.labels import check_range
from pipelines.shards.shard_set import ShardSet
from pipelines.shards.tars import OpenTar, Tars

# One thread reads 30,000 images of 110 KB per second from memory. A second one keeps requests in flight, which matters on
# storage with high latency.
NUM_THREADS = 2
GAP_BYTES = 65_536  # between an image and its label; reading across the gap is faster than a second request
SPARE = 1.25  # relative size of a new buffer, so that slightly larger batches fit

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Fetched:
    """A batch as the tars store it.

    Attributes:
        plan: Plan of the batch.
        rows: Shard and row of each sample.
        images: Encoded image of each sample, uint8 `(size,)`, views of `buffer`; empty if image or label is missing.
        labels: Class numbers, int64 `(N,)`; 0 if there is none.
        reasons: What is wrong, by slot: missing image, missing or invalid label, or truncated JPEG.
        buffer: Memory that holds all images and labels.
    """

    plan: Plan
    rows: list[RowId]
    images: list[Bytes]
    labels: NDArray[np.int64]
    reasons: dict[int, str]
    buffer: Bytes


class Buffers:
    """Reuses memory for batches, because touching new pages costs as much time as filling them. Threads may share it."""

    def __init__(self) -> None:
        self._free: list[Bytes] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Bytes:
        """Returns a uint8 buffer of at least `num_bytes`."""
        with self._lock:
            for i, buffer in enumerate(self._free):
                if len(buffer) >= num_bytes:
                    return self._free.pop(i)
            del self._free[:1]  # too small; the new one replaces it
        return np.empty(int(SPARE * num_bytes) + 1, np.uint8)

    def give_back(self, buffer: Bytes) -> None:
        """Recycles a buffer that nobody refers to any more."""
        with self._lock:
            self._free.append(buffer)


class Reader:
    """Fetches batches in the background, in the order of the requests.

    Args:
        shards: Shards of the split.
        extents: Extents of the samples.
        tars: Opens the tars.
        num_classes: Labels must be below this number.
        num_threads: Batches to read at the same time.
    """

    def __init__(
        self, shards: ShardSet, extents: Extents, tars: Tars, num_classes: int, num_threads: int = NUM_THREADS
    ) -> None:
        self._shards, self._extents, self._tars, self._num_classes = shards, extents, tars, num_classes
        self._buffers = Buffers()
        self._num_threads = num_threads
        self._threads: ThreadPoolExecutor | None = None

    def submit(self, plan: Plan) -> "Future[Fetched]":
        """Starts to read a batch. The future raises if a tar has changed, an index is damaged, or a read fails."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_threads, "reads shards")
        return self._threads.submit(self._fetch, plan)

    def release(self, fetched: Fetched) -> None:
        """Recycles the memory of a batch, which must not be used afterwards."""
        self._buffers.give_back(fetched.buffer)

    def close(self) -> None:
        """Waits for the reads in progress, and ends the threads."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _fetch(self, plan: Plan) -> Fetched:
        shards, rows = self._extents.locate(plan.samples)
        layout = _Layout(self._extents.of(shards, rows))
        buffer = self._buffers.take(layout.num_bytes)
        size = max(1, self._tars.most_open // self._num_threads)  # a part needs at most as many tars as stay open
        for part in self._tars.parts(plan):
            for start in range(0, len(part), size):
                self._read(shards, part[start : start + size], layout, buffer.data)
        ids = [RowId(shard, row) for shard, row in zip(shards, rows, strict=True)]
        images = [buffer[start:end] for start, end in layout.spans(0)]
        labels, reasons = self._labels(ids, layout, buffer)
        return Fetched(plan, ids, images, labels, _cut_short(images, layout, buffer) | reasons, buffer)

    def _read(self, shards: list[int], slots: list[int], layout: "_Layout", buffer: memoryview) -> None:
        wanted = [(shards[slot], *extent) for slot in slots for extent in layout.reads[slot]]
        tars = {shard: self._tars.open(shard) for shard in dict.fromkeys(shard for shard, *_ in wanted)}
        for shard, offset, size, _ in wanted:  # lets the storage work on all requests at once
            os.posix_fadvise(tars[shard].descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        before, now = None, {shard: tar.identity() for shard, tar in tars.items()}
        while before != now:  # again if somebody wrote to a tar meanwhile
            for shard, offset, size, start in wanted:
                if _read_into(tars[shard], buffer[start : start + size], offset) < size:
                    self._tars.check_size(shard)
                    raise self._tars.written_to(shard)
            before, now = now, {shard: tar.identity() for shard, tar in tars.items()}
        changed = {shard for shard in tars if self._tars.has_changed(shard, now[shard])}
        for slot in slots if changed else ():
            if shards[slot] in changed:
                self._tars.check_members(shards[slot], tars[shards[slot]], layout.members(slot))

    def _labels(self, rows: list[RowId], layout: "_Layout", buffer: Bytes) -> tuple[NDArray[np.int64], dict[int, str]]:
        labels, reasons = np.zeros(len(rows), np.int64), {}
        for i, (start, end) in enumerate(layout.spans(1)):
            try:
                if layout.is_missing[i]:
                    raise ValueError(self._extents.lacks(*rows[i]))
                label = self._shards.label_reader.parse(buffer[start:end].tobytes(), "")
                if label >= self._num_classes:
                    check_range(label, self._num_classes)
                labels[i] = label
            except ValueError as error:
                reasons[i] = str(error).removeprefix(": ")
        return labels, reasons


def _cut_short(images: list[Bytes], layout: "_Layout", buffer: Bytes) -> dict[int, str]:
    """Finds truncated JPEGs and PNGs. Almost all JPEGs end with the end marker, and need no further check."""
    ends = layout.ends[:, 0]
    is_unclear = (buffer[np.maximum(ends - 2, 0)] != END[0]) | (buffer[np.maximum(ends - 1, 0)] != END[1])
    unclear = np.flatnonzero(is_unclear).tolist()
    return {slot: why for slot in unclear if (why := why_cut_short(images[slot].tobytes()))}


class _Layout:
    """The layout of a batch in its buffer, one sample after the other.

    Attributes:
        num_bytes: Size of the buffer.
        starts: Buffer offsets of images and labels, int64 `(N, 2)`.
        ends: Buffer offsets after their last bytes, int64 `(N, 2)`.
        is_missing: Whether image or label is missing, for each sample.
        reads: Extents to read for each sample: offset in the tar, bytes, offset in the buffer.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        offsets, sizes = table.offsets, np.maximum(table.sizes, 0).astype(np.int64)
        begin, end = offsets.min(1), (offsets + sizes).max(1)
        is_near = end - begin <= sizes.sum(1) + GAP_BYTES  # one read covers image and label
        lengths = np.where(is_near, end - begin, sizes.sum(1))
        first = np.cumsum(lengths) - lengths
        self.num_bytes = int(lengths.sum())
        behind = np.stack([first, first + sizes[:, 0]], 1)  # the label behind the image, if each takes a read
        self.starts = np.where(is_near[:, None], first[:, None] + offsets - begin[:, None], behind)
        self.ends = self.starts + sizes
        self.is_missing: list[bool] = (table.sizes[:, 1] < 0).tolist()
        whole = zip(is_near.tolist(), begin.tolist(), lengths.tolist(), first.tolist(), strict=True)
        apart = np.stack([offsets, sizes, self.starts], 2)
        # Empty extents are left out: `posix_fadvise` takes a size of 0 for the rest of the file.
        self.reads = [
            [extent for extent in ([one] if near else apart[i].tolist()) if extent[1]] for i, (near, *one) in enumerate(whole)
        ]

    def members(self, slot: int) -> Iterator[tuple[int, int]]:
        """Yields offset and size of the image and the label of a sample, as its index lists them."""
        both = zip(self._table.offsets[slot].tolist(), self._table.sizes[slot].tolist(), strict=True)
        return ((offset, size) for offset, size in both if size >= 0)

    def spans(self, column: int) -> Iterator[tuple[int, int]]:
        """Yields the start and the end of each image (column 0) or label (column 1)."""
        return zip(self.starts[:, column].tolist(), self.ends[:, column].tolist(), strict=True)


def _read_into(tar: OpenTar, room: memoryview, offset: int) -> int:
    """Reads until the room is full or the file ends; returns the bytes read. Releases Python's lock meanwhile."""
    done = 0
    try:
        while done < len(room) and (more := os.preadv(tar.descriptor, [room[done:]], offset + done)):
            done += more
    except OSError as error:
        raise OSError(error.errno, error.strerror, tar.path) from error
    return done
