"""Where the image and the label of each sample lie in the tars. Index files are read when they are needed."""

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.index import Sample, damaged, parse_line, read_index
from pipelines.shards.members import first_of, key_of, lacks_in, not_there
from pipelines.shards.shard_set import ShardSet

EXTENSION_BYTES = 12  # compared per extension; longer extensions take the slow path
MOST_BYTES = 2**31 - 1  # of an image
CHUNK_BYTES = 1 << 22


class Members(NamedTuple):
    """Extensions of the image of a sample, of which it has one, and of its label."""

    images: tuple[str, ...]
    label: str


class Table(NamedTuple):
    """Extents of samples, one row each: the image in column 0, the label in column 1.

    Attributes:
        offsets: `(N, 2)` int64, in bytes from the beginning of the tar.
        sizes: `(N, 2)` int32, in bytes; -1 in the rows of samples without an image or a label.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int32]


class Extents:
    """Finds samples by their number, which runs through all shards of a split. Threads may share it.

    It keeps the table of each shard after the first use, at 24 bytes per sample.
    """

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._members = Members(shards.images, shards.label_reader.extension)
        self._ends = np.cumsum(shards.lengths)
        self._starts = self._ends - np.asarray(shards.lengths)
        self._tables: dict[int, Table] = {}
        self._samples = lru_cache(maxsize=8)(_samples)  # asked for each bad sample

    def locate(self, samples: NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """Returns the shard of each sample, and its row in that shard's index."""
        shards = np.searchsorted(self._ends, samples, "right")
        return shards.tolist(), (samples - self._starts[shards]).tolist()

    def of(self, shards: Sequence[int], rows: Sequence[int]) -> Table:
        """Returns the extents of samples, given by shard and row.

        Raises:
            ValueError: An index is damaged.
        """
        tables = [self._table(shard) for shard in shards]
        offsets = [table.offsets[row] for table, row in zip(tables, rows, strict=True)]
        sizes = [table.sizes[row] for table, row in zip(tables, rows, strict=True)]
        return Table(np.array(offsets, np.int64).reshape(-1, 2), np.array(sizes, np.int32).reshape(-1, 2))

    def lacks(self, shard: int, row: int) -> str:
        """Says what a sample without an image or a label lacks."""
        samples, by_key = self._samples(self._shards.indices[shard])
        sample = samples[row]
        return lacks_in(self._shards.tars[shard], sample, *self._members, by_key[key_of(sample)])

    def _table(self, shard: int) -> Table:
        table = self._tables.get(shard)
        if table is None:  # two threads may read the same table
            index, announced = self._shards.indices[shard], self._shards.lengths[shard]
            table = read_table(index, self._members)
            if len(table.sizes) != announced:
                raise ValueError(damaged(index, f"{announced} samples announced, {len(table.sizes)} listed"))
            self._check_within(shard, table)
            self._tables[shard] = table
        return table

    def _check_within(self, shard: int, table: Table) -> None:
        """Raises `ValueError` if an index lists bytes behind the end of its tar: a batch of them could exceed the memory."""
        ends = table.offsets + table.sizes
        if ends.size and ends.max() > self._shards.sizes[shard]:
            row, column = np.unravel_index(ends.argmax(), ends.shape)
            bytes_there = not_there(int(table.offsets[row, column]), int(table.sizes[row, column]))
            raise ValueError(f"{self._shards.indices[shard]}: {bytes_there}, where {self._shards.tars[shard]} has none")


def read_table(index: Path, members: Members) -> Table:
    """Reads the extents that an index file lists.

    Raises:
        ValueError: The file is damaged.
    """
    parts = []
    with open(index, "rb") as file:
        file.readline()  # the header, which `open_shards` has read
        while lines := file.readlines(CHUNK_BYTES):
            parts.append(_read_uniform(lines, members) or _read_each(index, lines, members))
    offsets, sizes = zip(*parts, strict=True) if parts else ([], [])
    return Table(np.concatenate([np.empty((0, 2), np.int64), *offsets]), np.concatenate([np.empty((0, 2), np.int32), *sizes]))


def _read_uniform(lines: list[bytes], wanted: Members) -> Table | None:
    """Reads samples that all have the same members in the same order, as in most data sets; returns `None` for others.

    numpy's reader takes a third of the time of Python's `split` and `int`.
    """
    fields = lines[0].decode(errors="replace").lower().split()[::4]
    image = next((place for place, extension in enumerate(fields) if extension in wanted.images), None)
    if image is None or wanted.label not in fields:
        return None
    label = fields.index(wanted.label)
    members = range(max(image, label) + 1)
    kinds = [
        (f"{kind}{member}", dtype)
        for member in members
        for kind, dtype in (("e", f"S{EXTENSION_BYTES}"), ("o", "i8"), ("s", "i8"))
    ]
    columns = [4 * member + field for member in members for field in range(3)]
    try:
        found = np.loadtxt(io.BytesIO(b"".join(lines)), np.dtype(kinds), comments=None, usecols=columns, ndmin=1)
    except (ValueError, OverflowError):  # a line has fewer members, or is damaged
        return None
    for member in members:
        allowed = wanted.images if member == image else (fields[member],)
        if not {extension.decode(errors="replace").lower() for extension in set(found[f"e{member}"].tolist())} <= set(allowed):
            return None
    offsets, sizes = (np.stack([found[f"{kind}{image}"], found[f"{kind}{label}"]], 1) for kind in "os")
    if offsets.min() < 0 or sizes.min() < 0 or sizes.max() > MOST_BYTES:
        return None
    return Table(offsets, sizes.astype(np.int32))


def _read_each(index: Path, lines: list[bytes], wanted: Members) -> Table:
    offsets, sizes = np.zeros((len(lines), 2), np.int64), np.full((len(lines), 2), -1, np.int32)
    for row, line in enumerate(lines):
        sample = list(parse_line(index, line.decode(errors="replace")))
        image, label = first_of(sample, wanted.images), first_of(sample, (wanted.label,))
        if image is not None and label is not None:
            largest = max(image, label, key=lambda component: component.size)
            if largest.size > MOST_BYTES:
                raise ValueError(damaged(index, f"{largest.name[:80]!r} with an impossible size of {largest.size:,} bytes"))
            offsets[row] = image.offset, label.offset
            sizes[row] = image.size, label.size
    return Table(offsets, sizes)


def _samples(index: Path) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """Returns the samples of an index in order, and by key."""
    samples, by_key = read_index(index), dict[str, list[Sample]]()
    for sample in samples:
        by_key.setdefault(key_of(sample), []).append(sample)
    return samples, by_key
