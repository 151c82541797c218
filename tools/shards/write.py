"""Writes the shards of a split: tars and their indices."""

import io
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from pipelines.index import Component, Sample, write_index

KEY_LENGTH = 80  # USTAR holds names of up to 100 bytes in one header block


def shard_name(split: str, number: int) -> str:
    """The file name of a split's shard."""
    return f"{split}-{number:06d}.tar"


class ShardWriter:
    """A tar of samples, the same bytes for the same samples: no owner, no clock time, headers of one block.

    On the standard library's `tarfile`: webdataset's `TarWriter` ignores the format it is asked for, and adds a kilobyte of
    PAX headers to each member.
    """

    def __init__(self, tar_path: Path) -> None:
        self._path = tar_path
        self._tar = tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  (closed by `close`)
        self._samples: list[Sample] = []

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, key: str, components: Mapping[str, bytes]) -> None:
        """Appends a sample: a member `key.extension` for each component, in order."""
        sample = []
        for extension, data in components.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            sample.append(Component(extension, self._tar.offset + tarfile.BLOCKSIZE, len(data), member.name))
            self._tar.addfile(member, io.BytesIO(data))
        self._samples.append(sample)

    def close(self) -> None:
        """Finishes the tar and writes its index beside it."""
        self._tar.close()
        write_index(self._path.with_suffix(".idx"), self._samples)


class SplitWriter:
    """Distributes samples over shards of `shard_samples` in a folder.

    Attributes:
        shard_lengths: Samples in each shard so far.
        image_bytes: Bytes of all images so far.
    """

    def __init__(self, folder: Path, split: str, shard_samples: int) -> None:
        self._folder, self._split, self._shard_samples = folder, split, shard_samples
        self._shard: ShardWriter | None = None
        self._num_samples = 0
        self.shard_lengths: list[int] = []
        self.image_bytes = 0

    def add(self, origin: str, components: Mapping[str, bytes]) -> None:
        """Appends a sample, the image first among its components; `origin`, the image's path, becomes part of the key."""
        if self._shard is None or len(self._shard) == self._shard_samples:
            self._finish_shard()
            self._shard = ShardWriter(self._folder / shard_name(self._split, len(self.shard_lengths)))
            self.shard_lengths.append(0)
        self._shard.add(_key(self._num_samples, origin), components)
        self._num_samples += 1
        self.shard_lengths[-1] += 1
        self.image_bytes += len(next(iter(components.values())))

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._finish_shard()


def _key(number: int, origin: str) -> str:
    """The sample's number for uniqueness and its origin for people, without dots, blanks or slashes."""
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", str(Path(origin).with_suffix("")))
    return f"{number:08d}_{readable}"[:KEY_LENGTH]
