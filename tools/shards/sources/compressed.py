"""Compressed tars of a source: they are unpacked into the scratch folder, because shards need random access."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.printable import printable
from pipelines.shards.compression import TAR_ENDINGS, compressed, compression_of
from tools.shards import parallel
from tools.shards.sources.scratch import open_scratch, unpacked_path, write_unpacked

CHUNK_BYTES = 1 << 20
OPENERS: dict[str, Callable[[Path], Any]] = {"gzip": gzip.GzipFile, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}


class SourceTar(NamedTuple):
    """A tar of a source.

    Attributes:
        origin: The file as the user named it.
        path: The file with the members: `origin`, or the unpacked copy.
    """

    origin: Path
    path: Path

    @property
    def stem(self) -> str:
        """The name of the origin without its ending."""
        return next(
            (self.origin.name.removesuffix(end) for end in TAR_ENDINGS if self.origin.name.endswith(end)), self.origin.stem
        )

    @property
    def modified(self) -> int:
        """Modification time of the origin, in ns since 1970."""
        return self.origin.stat().st_mtime_ns

    @property
    def is_unpacked(self) -> bool:
        return self.path != self.origin


def is_tar_name(name: str) -> bool:
    """Returns whether a file name is that of a tar, compressed or not."""
    return name.endswith(TAR_ENDINGS)


def open_source_tars(files: tuple[Path, ...], scratch: Path | None, num_workers: int) -> tuple[SourceTar, ...]:
    """Unpacks the compressed ones of these tars, unless an earlier run has done so.

    Args:
        files: The tars.
        scratch: Folder for the unpacked tars, created if needed. Without it, nothing can be unpacked.
        num_workers: Number of processes.

    Raises:
        ValueError: A tar is compressed and cannot be unpacked here, or it is damaged.
        OSError: The scratch folder cannot be written.
    """
    tars, tasks = [], []
    for file in files:
        kind = compression_of(file)
        if kind is None:
            tars.append(SourceTar(file, file))
            continue
        if kind not in OPENERS:
            raise ValueError(compressed(str(file), kind))
        if scratch is None:
            raise ValueError(f"{compressed(str(file), kind)}, or name a local folder with --scratch for the unpacked tar")
        target = Path(f"{unpacked_path(scratch, file)}.tar")
        tars.append(SourceTar(file, target))
        if not target.exists():
            tasks.append((file, target, kind))
    if tasks and scratch is not None:
        open_scratch(scratch)
        for _ in parallel.run(_unpack, tasks, min(num_workers, len(tasks))):
            pass
    return tuple(tars)


def _unpack(task: tuple[Path, Path, str]) -> None:
    file, target, kind = task
    write_unpacked(target, lambda: _parts(file, kind))


def _parts(file: Path, kind: str) -> Iterator[bytes]:
    """Yields the content of a compressed file. An error of the content is not one of the disk, although some are OSErrors."""
    with OPENERS[kind](file) as content:
        while True:
            try:
                part = content.read(CHUNK_BYTES)
            except (EOFError, zlib.error, lzma.LZMAError, ValueError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # the disk's; those of gzip and bz2 have no number
                    raise OSError(error.errno, error.strerror, str(file)) from error
                raise ValueError(f"{printable(str(file))}: damaged {kind} file ({error})") from error
            if not part:
                return
            yield part
