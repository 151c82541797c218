"""Where the image and the label of each sample lie in the tars. Index files are read when they are needed."""

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.index import parse_line, read_sample
from pipelines.shards.shard_set import IMAGE_EXTENSIONS, ShardSet, first_of

EXTENSION_BYTES = 12  # compared per extension; longer extensions take the slow path
MOST_BYTES = 2**31 - 1  # of an image
CHUNK_BYTES = 1 << 22


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
        self._label_extension = shards.label_reader.extension
        self._ends = np.cumsum(shards.lengths)
        self._starts = self._ends - np.asarray(shards.lengths)
        self._tables: dict[int, Table] = {}

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
        return _lacks(self._shards.indices[shard], row, self._label_extension)

    def _table(self, shard: int) -> Table:
        table = self._tables.get(shard)
        if table is None:  # two threads may read the same table
            index, announced = self._shards.indices[shard], self._shards.lengths[shard]
            table = read_table(index, self._label_extension)
            if len(table.sizes) != announced:
                raise ValueError(f"{index}: damaged index; {announced} samples announced, {len(table.sizes)} listed")
            self._tables[shard] = table
        return table


def read_table(index: Path, label_extension: str) -> Table:
    """Reads the extents that an index file lists.

    Raises:
        ValueError: The file is damaged.
    """
    parts = []
    with open(index, "rb") as file:
        next(file)  # the header, which `open_shards` has read
        while lines := file.readlines(CHUNK_BYTES):
            parts.append(_read_uniform(lines, label_extension) or _read_each(index, lines, label_extension))
    offsets, sizes = zip(*parts, strict=True) if parts else ([], [])
    return Table(np.concatenate([np.empty((0, 2), np.int64), *offsets]), np.concatenate([np.empty((0, 2), np.int32), *sizes]))


def _read_uniform(lines: list[bytes], label_extension: str) -> Table | None:
    """Reads samples that all have the same members in the same order, as in most data sets; returns `None` for others.

    numpy's reader takes a third of the time of Python's `split` and `int`.
    """
    fields = lines[0].decode(errors="replace").lower().split()[::4]
    image = next((place for place, extension in enumerate(fields) if extension in IMAGE_EXTENSIONS), None)
    if image is None or label_extension not in fields:
        return None
    label = fields.index(label_extension)
    members = range(max(image, label) + 1)
    kinds = [
        (f"{kind}{member}", dtype)
        for member in members
        for kind, dtype in (("e", f"S{EXTENSION_BYTES}"), ("o", "i8"), ("s", "i8"))
    ]
    columns = [4 * member + field for member in members for field in range(3)]
    try:
        found = np.loadtxt(io.BytesIO(b"".join(lines)), np.dtype(kinds), comments=None, usecols=columns, ndmin=1)
    except ValueError:  # a line has fewer members, or is damaged
        return None
    for member in members:
        allowed = IMAGE_EXTENSIONS if member == image else (fields[member],)
        if not {extension.decode(errors="replace").lower() for extension in set(found[f"e{member}"].tolist())} <= set(allowed):
            return None
    offsets, sizes = (np.stack([found[f"{kind}{image}"], found[f"{kind}{label}"]], 1) for kind in "os")
    if offsets.min() < 0 or sizes.min() < 0 or sizes.max() > MOST_BYTES:
        return None
    return Table(offsets, sizes.astype(np.int32))


def _read_each(index: Path, lines: list[bytes], label_extension: str) -> Table:
    offsets, sizes = np.zeros((len(lines), 2), np.int64), np.full((len(lines), 2), -1, np.int32)
    for row, line in enumerate(lines):
        sample = list(parse_line(index, line.decode(errors="replace")))
        image, label = first_of(sample, IMAGE_EXTENSIONS), first_of(sample, (label_extension,))
        if image is not None and label is not None:
            if max(image.size, label.size) > MOST_BYTES or max(image.offset, label.offset) > 2**62:
                raise ValueError(f"{index}: damaged index; impossible offset or size of {image.name}: {line.decode()[:120]!r}")
            offsets[row] = image.offset, label.offset
            sizes[row] = image.size, label.size
    return Table(offsets, sizes)


@lru_cache(maxsize=4096)  # asked again in each epoch
def _lacks(index: Path, row: int, label_extension: str) -> str:
    extensions = [component.extension for component in read_sample(index, row)]
    present = {extension.lower() for extension in extensions}
    lacking = []
    if present.isdisjoint(IMAGE_EXTENSIONS):
        lacking.append("no image")
    if label_extension not in present:
        lacking.append(f"no .{label_extension}")
    return f"{' and '.join(lacking)} among its members, .{' .'.join(extensions)}"
