"""Builds one shard: a function of its task and nothing else, so that any process on any machine can do it, twice if need be."""

import collections
import functools
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.shards.index import format_index
from tools.shards.errors import RejectedError
from tools.shards.shape import Shape, Shaped, trusted_extension
from tools.shards.sources.listing import Extent, read_bytes, read_into
from tools.shards.storage import Storage, write_text
from tools.shards.write import MAX_MEMBER_BYTES, ShardWriter

if TYPE_CHECKING:
    from tools.shards.encode import Encoder

# Read and decoded together: the decoder is a tenth faster with several. Fewer where they are large.
IMAGES_AT_ONCE = 16
BYTES_AT_ONCE = 8 << 20

Sample = tuple[str, Extent, int]  # key, image, label


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
    samples: tuple[Sample, ...]
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


Tally = tuple[list[tuple[str, str]], collections.Counter[str], int]


def _write_samples(task: ShardTask, writer: ShardWriter) -> Tally:
    """Writes what is good; gives name and reason of the rest, a count of what was changed, the bytes of all images."""
    rejected: list[tuple[str, str]] = []
    changes: collections.Counter[str] = collections.Counter()
    image_bytes = 0
    for chunk in _chunks(task.samples):
        for (key, extent, label), shaped in zip(chunk, _shape(task.shape, [extent for _, extent, _ in chunk]), strict=True):
            reason = shaped.reason or _write(writer, key, extent, shaped, label)
            if reason and task.strict:
                raise RejectedError(f"{extent.name} in {extent.path}: {reason}")
            if reason:
                rejected.append((extent.name, reason))
                continue
            image_bytes += writer.samples[-1][0].size
            if shaped.change:
                changes[shaped.change] += 1
    return rejected, changes, image_bytes


def _write(writer: ShardWriter, key: str, extent: Extent, shaped: Shaped, label: int) -> str:
    """Appends a sample; gives the reason why it cannot be."""
    assert shaped.extension is not None
    size, read = extent.size, functools.partial(read_into, extent)
    if shaped.data is not None:
        size, read = len(shaped.data), functools.partial(_copy, shaped.data)
    try:
        writer.add(key, shaped.extension, size, read, str(label).encode())
    except PermissionError as error:
        return _unreadable(error)
    return ""


def _copy(data: bytes, into: memoryview) -> None:
    into[:] = data


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror})"


def _chunks(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    """Samples whose images are held in memory and decoded together."""
    begin = num_bytes = 0
    for end, (_, extent, _) in enumerate(samples):
        if end > begin and (end - begin == IMAGES_AT_ONCE or num_bytes + extent.size > BYTES_AT_ONCE):
            yield samples[begin:end]
            begin, num_bytes = end, 0
        num_bytes += extent.size
    yield samples[begin:]


def _shape(shape: Shape, extents: Sequence[Extent]) -> list[Shaped]:
    """The images in shape; without data those that are copied as they are, unseen."""
    shaped: list[Shaped | None] = []
    images: list[bytes] = []
    for extent in extents:
        extension = trusted_extension(shape, extent.name)
        if extent.size > MAX_MEMBER_BYTES:
            shaped.append(Shaped(None, "larger than the 8 GiB that a member of a tar can be"))
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
    """One a thread (a Dask worker has several): its decoders take a moment to make."""
    from tools.shards.encode import Encoder  # its libraries take a while to import, and copying does without

    if getattr(_encoders, "shape", None) != shape:
        _encoders.shape, _encoders.encoder = shape, Encoder(shape)
    encoder: Encoder = _encoders.encoder
    return encoder
