"""Builds one shard. The result depends on the task only, so any process on any machine can build it, also repeatedly."""

import collections
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from pipelines.json_file import as_object, get, parse_json
from pipelines.shards.index import format_index
from tools.shards.shape import Shape, Shaped, image_batches, trusted_extension
from tools.shards.sources.listing import Extent, read_bytes, read_into
from tools.shards.storage import Storage, write_text
from tools.shards.write import MAX_MEMBER_BYTES, ShardWriter

if TYPE_CHECKING:
    from tools.shards.encode import Encoder

Sample = tuple[str, Extent, int]  # key, image, label


class RejectedError(Exception):
    """An image was rejected in a strict conversion."""


@dataclass(frozen=True)
class ShardTask:
    """A shard to build. `name` and `report` are the file names of the tar and of the report, relative to `storage`."""

    name: str
    samples: tuple[Sample, ...]
    shape: Shape
    storage: Storage
    report: str
    strict: bool = False


@dataclass(frozen=True)
class ShardReport:
    """The report on a built shard.

    Attributes:
        file_bytes: Size of the tar and of the index.
        rejected: Name and reason of each rejected image.
        changes: Number of images by the change that was made to them.
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
    def from_json(cls, content: bytes, place: str) -> "ShardReport":
        """Parses the content of a file, whose name is `place` in messages.

        Raises:
            ValueError: The file is damaged.
        """
        fields = as_object(parse_json(content, place), place)
        sizes: list[int] = get(fields, "file_bytes", "a list of whole numbers from 0", place)
        tar_bytes, index_bytes, *_ = [*sizes, 0, 0]
        return cls(
            name=get(fields, "name", "a text", place),
            num_samples=get(fields, "num_samples", "a whole number from 0", place),
            image_bytes=get(fields, "image_bytes", "a whole number from 0", place),
            file_bytes=(tar_bytes, index_bytes),
            rejected=tuple(map(tuple, get(fields, "rejected", "a list of pairs of texts", place))),
            changes=get(fields, "changes", "an object of whole numbers from 0", place),
        )


def build_shard(task: ShardTask) -> ShardReport:
    """Writes tar, index and report in this order. Each file appears whole or not at all.

    Raises:
        RejectedError: The task is strict, and an image was rejected.
        ValueError: The source has changed.
        OSError: The source cannot be read, or the shard cannot be written.
    """
    with task.storage.new_file(task.name) as path:
        writer = ShardWriter(path)
        with writer:
            rejected, changes = _write_samples(task, writer)
    index = format_index(writer.samples)
    write_text(task.storage, task.name.removesuffix(".tar") + ".idx", index)
    report = ShardReport(
        name=task.name,
        num_samples=len(writer.samples),
        image_bytes=sum(image.size for image, _ in writer.samples),
        file_bytes=(writer.num_bytes, len(index.encode())),
        rejected=tuple(rejected),
        changes=dict(changes),
    )
    write_text(task.storage, task.report, report.to_json())
    return report


def _write_samples(task: ShardTask, writer: ShardWriter) -> tuple[list[tuple[str, str]], collections.Counter[str]]:
    """Writes the good samples. Returns name and reason of the rejected ones, and the number of images by change."""
    rejected: list[tuple[str, str]] = []
    changes: collections.Counter[str] = collections.Counter()
    for batch in image_batches(task.samples, lambda sample: sample[1].size):
        for (key, extent, label), shaped in zip(batch, _shape(task.shape, [extent for _, extent, _ in batch]), strict=True):
            reason = shaped.reason or _write(writer, key, extent, shaped, label)
            if reason and task.strict:
                raise RejectedError(f"{extent.name} in {extent.path}: {reason}")
            if reason:
                rejected.append((extent.name, reason))
            elif shaped.change:
                changes[shaped.change] += 1
    return rejected, changes


def _write(writer: ShardWriter, key: str, extent: Extent, shaped: Shaped, label: int) -> str:
    """Appends a sample, or returns the reason why its image cannot be read."""
    assert shaped.extension is not None
    data = shaped.data

    def read(into: memoryview) -> None:
        if data is None:
            read_into(extent, into)
        else:
            into[:] = data

    try:
        writer.add(key, shaped.extension, extent.size if data is None else len(data), read, str(label).encode())
    except PermissionError as error:
        return _unreadable(error)
    return ""


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror})"


def _shape(shape: Shape, extents: Sequence[Extent]) -> list[Shaped]:
    """Checks, resizes and encodes images. A good image without data can be copied without reading it first."""
    shaped: list[Shaped | None] = []
    images: list[bytes] = []
    for extent in extents:
        extension = trusted_extension(shape, extent.name)
        if extent.size > MAX_MEMBER_BYTES:
            shaped.append(Shaped(None, "larger than 8 GiB, the limit of a tar member"))
        elif extension is not None:
            shaped.append(Shaped(extension))
        else:
            try:
                images.append(read_bytes(extent))
                shaped.append(None)
            except PermissionError as error:
                shaped.append(Shaped(None, _unreadable(error)))
    encoded = iter(_encoder(shape)(images) if images else ())
    return [next(encoded) if one is None else one for one in shaped]


_encoders = threading.local()


def _encoder(shape: Shape) -> "Encoder":
    """Returns the encoder of this thread (Dask workers have several). Its decoders are slow to create."""
    from tools.shards.encode import Encoder  # slow to import, and not needed for copying

    if getattr(_encoders, "shape", None) != shape:
        _encoders.shape, _encoders.encoder = shape, Encoder(shape)
    encoder: Encoder = _encoders.encoder
    return encoder
