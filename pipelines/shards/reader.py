"""Reads the encoded images and the labels of coming batches in background threads, straight from the tars."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.bad_samples.jpeg import CUT_SHORT, END, is_cut_short
from pipelines.bad_samples.quarantine import RowId
from pipelines.shards.extents import Extents, Table
from pipelines.shards.order import Plan
from pipelines.shards.shard_set import ShardSet
from pipelines.shards.tars import OpenTar, Tars

# One thread reads 30,000 images of 110 KB a second from memory. The second has its requests under way meanwhile, which matters
# where each one takes long.
NUM_THREADS = 2
GAP_BYTES = 65_536  # between an image and its label; to read across it takes less time than a second request
SPARE = 1.25  # of a buffer's size, so that a batch that is a little larger fits

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Fetched:
    """A batch as it lies in the tars.

    Attributes:
        plan: Which batch.
        rows: Shard and row of each sample.
        images: Encoded image of each, uint8 `(size,)`; views of `buffer`. Empty where the image or the label is missing.
        labels: `(N,)` int64 class numbers; 0 where there is none.
        reasons: For each sample that lacks the image or a label that is a class, or whose JPEG is cut short, what is wrong.
        buffer: Holds all of it.
    """

    plan: Plan
    rows: list[RowId]
    images: list[Bytes]
    labels: NDArray[np.int64]
    reasons: dict[int, str]
    buffer: Bytes


class Buffers:
    """Memory for batches, used again and again: new pages cost as much time as filling them. Threads may share it."""

    def __init__(self) -> None:
        self._free: list[Bytes] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Bytes:
        """A buffer of at least that many bytes, uint8."""
        with self._lock:
            fitting = [buffer for buffer in self._free if len(buffer) >= num_bytes]
            if fitting:
                self._free = [buffer for buffer in self._free if buffer is not fitting[0]]
                return fitting[0]
            del self._free[:1]  # too small; the new one is there in its stead
        return np.empty(int(SPARE * num_bytes) + 1, np.uint8)

    def give_back(self, buffer: Bytes) -> None:
        """Nobody may refer to it any more."""
        with self._lock:
            self._free.append(buffer)


class Reader:
    """Fetches batches in the background, in the order in which they are asked for.

    Args:
        shards: Those of the split.
        extents: Of its samples.
        tars: Opens its tars.
        num_classes: Labels must be below it.
        num_threads: Batches that are read at the same time.
    """

    def __init__(
        self, shards: ShardSet, extents: Extents, tars: Tars, num_classes: int, num_threads: int = NUM_THREADS
    ) -> None:
        self._shards, self._extents, self._tars, self._num_classes = shards, extents, tars, num_classes
        self._buffers = Buffers()
        self._num_threads = num_threads
        self._threads: ThreadPoolExecutor | None = None

    def submit(self, plan: Plan) -> "Future[Fetched]":
        """Begins to read a batch. The result is an error if a tar is not what it was, an index is damaged, or a disk fails."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_threads, "reads shards")
        return self._threads.submit(self._fetch, plan)

    def release(self, fetched: Fetched) -> None:
        """Gives the memory of a batch back, which nobody may look at afterwards."""
        self._buffers.give_back(fetched.buffer)

    def close(self) -> None:
        """Waits for what is being read, and ends the threads."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _fetch(self, plan: Plan) -> Fetched:
        shards, rows = self._extents.locate(plan.samples)
        table = self._extents.of(shards, rows)
        spans = _Spans(table)
        buffer = self._buffers.take(spans.num_bytes)
        size = max(1, self._tars.most_open // self._num_threads)  # not more at a time than tars stay open
        for part in self._tars.parts(plan):
            for start in range(0, len(part), size):
                self._read(shards, part[start : start + size], spans, buffer.data)
        ids = [RowId(shard, row) for shard, row in zip(shards, rows, strict=True)]
        images = [buffer[start : start + size] for start, size in spans.of_images()]
        labels, reasons = self._labels(ids, spans, buffer)
        return Fetched(plan, ids, images, labels, _cut_short(images, spans, buffer) | reasons, buffer)

    def _read(self, shards: list[int], slots: list[int], spans: "_Spans", buffer: memoryview) -> None:
        wanted = [(shards[slot], *extent) for slot in slots for extent in spans.reads[slot]]
        tars = {shard: self._tars.open(shard) for shard in dict.fromkeys(shard for shard, *_ in wanted)}
        for shard, offset, size, _ in wanted:  # so that the storage works on all of them at once
            os.posix_fadvise(tars[shard].descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        for shard, offset, size, start in wanted:
            if _read_into(tars[shard], buffer[start : start + size], offset) < size:
                self._tars.check_size(shard)
                raise ValueError(
                    f"{self._shards.indices[shard]}: damaged index, or one of another tar; it lists bytes from {offset:,} to "
                    f"{offset + size:,}, where {tars[shard].path} has none"
                )

    def _labels(self, rows: list[RowId], spans: "_Spans", buffer: Bytes) -> tuple[NDArray[np.int64], dict[int, str]]:
        labels, reasons = np.zeros(len(rows), np.int64), {}
        for i, (start, size) in enumerate(spans.of_labels()):
            try:
                if size < 0:
                    raise ValueError(self._extents.lacks(*rows[i]))
                label = self._shards.label_reader.parse(buffer[start : start + size].tobytes(), "")
                if label >= self._num_classes:
                    raise ValueError(f"class {label} is out of range; there are {self._num_classes} classes, from 0 on")
                labels[i] = label
            except ValueError as error:
                reasons[i] = str(error).removeprefix(": ")
        return labels, reasons


def _cut_short(images: list[Bytes], spans: "_Spans", buffer: Bytes) -> dict[int, str]:
    """The samples whose JPEGs are cut short. Almost all images end with the marker, and are not looked at any further."""
    ends = spans.ends_of_images()
    is_unclear = (buffer[np.maximum(ends - 2, 0)] != END[0]) | (buffer[np.maximum(ends - 1, 0)] != END[1])
    unclear = np.flatnonzero(is_unclear).tolist()
    return {slot: CUT_SHORT for slot in unclear if is_cut_short(images[slot].tobytes())}


class _Spans:
    """Where the bytes of a batch lie in its buffer, one sample after the other, and what has to be read for them.

    Attributes:
        num_bytes: Of the buffer.
        reads: For each sample the extents to be read: offset in the tar, bytes, offset in the buffer.
    """

    def __init__(self, table: Table) -> None:
        offsets, sizes = table.offsets, np.maximum(table.sizes, 0).astype(np.int64)
        self._sizes = table.sizes
        begin, end = offsets.min(1, initial=np.iinfo(np.int64).max), (offsets + sizes).max(1, initial=0)
        is_near = end - begin <= sizes.sum(1) + GAP_BYTES
        lengths = np.where(is_near, end - begin, sizes.sum(1))
        starts = np.cumsum(lengths) - lengths
        self.num_bytes = int(lengths.sum())
        # In one read or in two, which lie behind each other in the buffer.
        apart = np.stack([starts, starts + sizes[:, 0]], 1)
        self._starts = np.where(is_near[:, None], starts[:, None] + offsets - begin[:, None], apart)
        whole = zip(begin.tolist(), lengths.tolist(), starts.tolist(), is_near.tolist(), strict=True)
        self.reads = [
            ([(offset, length, start)] if length else []) if near else self._two(i, table)
            for i, (offset, length, start, near) in enumerate(whole)
        ]

    def _two(self, i: int, table: Table) -> list[tuple[int, int, int]]:
        both = zip(table.offsets[i].tolist(), table.sizes[i].tolist(), self._starts[i].tolist(), strict=True)
        return [extent for extent in both if extent[1]]  # to `posix_fadvise` no bytes are all up to the file's end

    def of_images(self) -> Iterator[tuple[int, int]]:
        """Offset in the buffer and bytes of each image."""
        return zip(self._starts[:, 0].tolist(), np.maximum(self._sizes[:, 0], 0).tolist(), strict=True)

    def ends_of_images(self) -> NDArray[np.int64]:
        """`(N,)`: offset in the buffer behind each image."""
        return self._starts[:, 0] + np.maximum(self._sizes[:, 0], 0)

    def of_labels(self) -> Iterator[tuple[int, int]]:
        """The same of each label; -1 bytes where there is none."""
        return zip(self._starts[:, 1].tolist(), self._sizes[:, 1].tolist(), strict=True)


def _read_into(tar: OpenTar, room: memoryview, offset: int) -> int:
    """Reads until the room is full or the file ends; bytes that were read. Python's lock is free meanwhile."""
    done = 0
    try:
        while done < len(room) and (more := os.preadv(tar.descriptor, [room[done:]], offset + done)):
            done += more
    except OSError as error:
        raise OSError(error.errno, error.strerror, tar.path) from error
    return done
