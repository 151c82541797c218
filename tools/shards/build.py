"""Builds one shard: a function of its task and nothing else, so that any process on any machine can do it, twice if need be."""

import collections
import json
import threading
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.index import format_index
from tools.shards.errors import RejectedError
from tools.shards.shape import Shape, Shaper, make_shaper
from tools.shards.sources.listing import Extent, read_extent
from tools.shards.storage import Storage, write_text
from tools.shards.write import MAX_MEMBER_BYTES, ShardWriter


@dataclass(frozen=True)
class ShardTask:
    """A shard to build.

    Attributes:
        name: File name of the tar.
        samples: Key, image and label of each.
        shape: How images are checked and shaped.
        storage: Where the shard goes.
        report: File name of the report, relative to `storage`.
        strict: Stop at the first image that is rejected.
    """

    name: str
    samples: tuple[tuple[str, Extent, int], ...]
    shape: Shape
    storage: Storage
    report: str
    strict: bool = False


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard.

    Attributes:
        name: File name of the tar.
        num_samples: Samples in it.
        image_bytes: Of all images in it.
        file_bytes: Size of the tar and of the index.
        rejected: Name and reason of what was left out.
        changes: Images by what was done to them.
    """

    name: str
    num_samples: int
    image_bytes: int
    file_bytes: tuple[int, int]
    rejected: tuple[tuple[str, str], ...]
    changes: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ShardReport":
        fields: dict[str, Any] = json.loads(text)
        fields["file_bytes"] = tuple(fields["file_bytes"])
        fields["rejected"] = tuple((name, reason) for name, reason in fields["rejected"])
        return cls(**fields)


def build_shard(task: ShardTask) -> ShardReport:
    """Writes tar, index and report; each appears whole, the report last.

    Raises:
        RejectedError: With `strict`, an image was rejected.
        ValueError: The source has changed.
        OSError: It cannot be read, or the shard not be written.
    """
    with task.storage.new_file(task.name) as path:
        writer = ShardWriter(path)
        with writer:
            rejected, changes, image_bytes = _write_samples(task, writer)
    index = format_index(writer.samples)
    write_text(task.storage, task.name.removesuffix(".tar") + ".idx", index)
    sizes = (writer.num_bytes, len(index.encode()))
    report = ShardReport(task.name, len(writer.samples), image_bytes, sizes, tuple(rejected), dict(changes))
    write_text(task.storage, task.report, report.to_json())
    return report


def _write_samples(task: ShardTask, writer: ShardWriter) -> tuple[list[tuple[str, str]], collections.Counter[str], int]:
    shaper = _shaper(task.shape)
    rejected: list[tuple[str, str]] = []
    changes: collections.Counter[str] = collections.Counter()
    image_bytes = 0
    for key, extent, label in task.samples:
        try:
            shaped = shaper(extent.name, read_extent(extent))
            extension, reason = shaped.extension, shaped.reason
        except PermissionError as error:
            extension, reason = None, f"cannot be read ({error.strerror})"
        if extension is not None and len(shaped.data) > MAX_MEMBER_BYTES:
            extension, reason = None, "larger than the 8 GiB that a member of a tar can be"
        if extension is None:
            if task.strict:
                raise RejectedError(f"{extent.name} in {extent.path}: {reason}")
            rejected.append((extent.name, reason))
            continue
        writer.add(key, {extension: shaped.data, "cls": str(label).encode()})
        image_bytes += len(shaped.data)
        if shaped.change:
            changes[shaped.change] += 1
    return rejected, changes, image_bytes


_shapers = threading.local()


def _shaper(shape: Shape) -> Shaper:
    """One a thread (a Dask worker has several): its decoders take a moment to make."""
    if getattr(_shapers, "shape", None) != shape:
        _shapers.shape, _shapers.shaper = shape, make_shaper(shape)
    shaper: Shaper = _shapers.shaper
    return shaper
