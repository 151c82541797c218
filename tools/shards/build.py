"""Builds one shard: a function of its task and nothing else, so that any process on any machine can do it, twice if need be."""

import collections
import functools
import json
import threading
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.index import format_index
from tools.shards.errors import RejectedError
from tools.shards.shape import Shape, Shaped, trusted_extension
from tools.shards.sources.listing import Extent, read_extent
from tools.shards.storage import Storage, write_text
from tools.shards.write import MAX_MEMBER_BYTES, ShardWriter

if TYPE_CHECKING:
    from tools.shards.encode import Encoder


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
    rejected: list[tuple[str, str]] = []
    changes: collections.Counter[str] = collections.Counter()
    image_bytes = 0
    for key, extent, label in task.samples:
        cls = str(label).encode()
        reason, change = "", ""
        try:
            if extent.size > MAX_MEMBER_BYTES:
                reason = "larger than the 8 GiB that a member of a tar can be"
            elif extension := trusted_extension(task.shape, extent.name):
                writer.add(key, extension, extent.size, functools.partial(read_extent, extent), cls)
                image_bytes += extent.size
            else:
                shaped = _shape(task.shape, extent)
                reason, change = shaped.reason, shaped.change
                if shaped.extension is not None:
                    writer.add(key, shaped.extension, len(shaped.data), functools.partial(_copy, shaped.data), cls)
                    image_bytes += len(shaped.data)
        except PermissionError as error:
            reason = f"cannot be read ({error.strerror})"
        if reason and task.strict:
            raise RejectedError(f"{extent.name} in {extent.path}: {reason}")
        if reason:
            rejected.append((extent.name, reason))
        if change:
            changes[change] += 1
    return rejected, changes, image_bytes


def _copy(data: bytes, into: memoryview) -> None:
    into[:] = data


def _shape(shape: Shape, extent: Extent) -> Shaped:
    data = bytearray(extent.size)
    read_extent(extent, memoryview(data))
    return _encoder(shape)(bytes(data))


_encoders = threading.local()


def _encoder(shape: Shape) -> "Encoder":
    """One a thread (a Dask worker has several): its decoders take a moment to make."""
    from tools.shards.encode import Encoder  # its libraries take a while to import, and copying does without

    if getattr(_encoders, "shape", None) != shape:
        _encoders.shape, _encoders.encoder = shape, Encoder(shape)
    encoder: Encoder = _encoders.encoder
    return encoder
