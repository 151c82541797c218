"""Index files: where in a tar each component of each sample lies, in the format of DALI's webdataset reader.

The first line is `v1.2 NUM_SAMPLES`. Each further line is a sample, with four fields per component: extension, offset of the
data in the tar, size in bytes, and member name. DALI's `wds2idx` writes the same format.
"""

import contextlib
import hashlib
import io
import itertools
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from tqdm import tqdm

from pipelines.files import cache_errors, replace_text, user_cache
from pipelines.printable import printable
from pipelines.remote.object_store import RemoteFile, in_threads, is_url, open_remote, read_text
from pipelines.shards.compression import compressed, compression_in
from pipelines.shards.walk import Entry, walk

VERSION = "v1.2"
HEADER_CHARACTERS = 100  # the first line is shorter
LEAST_LINE_BYTES = 8  # of a sample in an index
MOST_DIGITS = 18  # of offsets and sizes: a million terabytes
REPAIR = "remove it, or write it anew with `shards index --overwrite`"


@dataclass(frozen=True)
class Component:
    """One member of a tar: `extension` without the leading dot, `offset` and `size` of its data in bytes."""

    extension: str
    offset: int
    size: int
    name: str


Sample = list[Component]


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name into (key, extension) at the first dot after the last slash, as WebDataset does."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension


def scan_tar(tar: str | Path | RemoteFile) -> list[Sample]:
    """Returns the samples of a tar, local or at a URL, in order. Reads only the headers of a remote tar.

    Raises:
        ValueError: The file is not a tar, or is damaged or cut short.
        OSError: The file cannot be read.
    """
    with _open_tar(tar) as file:
        return group_samples(iter_components(file, str(tar)))


def _open_tar(tar: str | Path | RemoteFile) -> BinaryIO:
    if isinstance(tar, RemoteFile):
        return open_remote(tar.url, tar.size)
    return open_remote(str(tar)) if is_url(str(tar)) else open(tar, "rb")


def iter_components(file: BinaryIO, place: str) -> Iterator[Component]:
    """Yields the files in a tar that can belong to samples, in order; seeks over their data.

    Args:
        file: The tar.
        place: Name of the tar in messages.

    Raises:
        ValueError: The file is not a tar, or is damaged or cut short. The members before the damage are yielded first.
    """
    return (component for entry in walk(file, place) if (component := as_component(entry)) is not None)


def as_component(entry: Entry) -> Component | None:
    """Returns a member as the component of a sample; `None` if it has no bytes of its own, or no key."""
    key, extension = split_name(entry.name)
    if entry.other or not key or key.endswith("/"):
        return None
    return Component(extension, entry.offset, entry.size, entry.name)


def group_samples(components: Iterable[Component]) -> list[Sample]:
    """Groups neighbouring members with the same key into samples."""
    return [list(sample) for _, sample in itertools.groupby(components, key=lambda component: split_name(component.name)[0])]


def format_index(samples: list[Sample]) -> str:
    """Formats the index of a tar's samples."""
    lines = (" ".join(f"{as_field(c.extension)} {c.offset} {c.size} {as_field(c.name)}" for c in sample) for sample in samples)
    return f"{VERSION} {len(samples)}\n" + "".join(f"{line}\n" for line in lines)


def as_field(text: str) -> str:
    """Replaces the blanks of a name: blanks separate fields, and the format has no quoting. Names are used in messages only."""
    return "_".join(text.split()) or "_"


def write_index(index_path: Path, samples: list[Sample]) -> None:
    """Writes the index of a tar's samples atomically."""
    replace_text(index_path, format_index(samples))


def read_index(index_path: Path) -> list[Sample]:
    """Reads the samples that an index lists.

    Raises:
        ValueError: The file is not an index of version 1.2, or is damaged.
    """
    with open(index_path, errors="replace") as file:
        num_samples = _read_header(file, str(index_path))
        samples = [list(parse_line(index_path, line)) for line in file]
    if len(samples) != num_samples:
        raise ValueError(damaged(index_path, f"{num_samples} samples announced, {len(samples)} listed"))
    return samples


def read_sample(index_path: Path, row: int) -> Sample:
    """Reads one sample, without creating objects for all the others.

    Raises:
        ValueError: The file is not an index of version 1.2, is damaged, or lists fewer samples than when it was counted.
    """
    with open(index_path, errors="replace") as file:
        _read_header(file, str(index_path))
        for line in itertools.islice(file, row, row + 1):
            return list(parse_line(index_path, line))
    raise ValueError(f"{index_path}: the index was replaced while the run was in progress; it no longer lists sample {row}")


def count_samples(index_path: Path) -> int:
    """Reads the number of samples from the first line.

    Raises:
        ValueError: The file is not an index of version 1.2, or too small for so many samples.
    """
    with open(index_path, errors="replace") as file:
        num_samples = _read_header(file, str(index_path))
        size = os.fstat(file.fileno()).st_size
    if num_samples * LEAST_LINE_BYTES > size:
        raise ValueError(damaged(index_path, f"{num_samples} samples announced, in a file of {size:,} bytes"))
    return num_samples


def _read_header(index: TextIO, place: str) -> int:
    line = index.readline(HEADER_CHARACTERS)
    version, _, count = line.strip().partition(" ")
    if version != VERSION or not _is_number(count):
        found = f"its first line is {line.strip()[:60]!r}, not '{VERSION} NUM_SAMPLES'" if line else "it is empty"
        raise ValueError(f"{place}: not an index file; {found}; {REPAIR}")
    return int(count)


def parse_line(index_path: Path | str, line: str) -> Iterator[Component]:
    """Yields the components that a line of an index lists.

    Raises:
        ValueError: The line is damaged.
    """
    fields = line.split()
    if not fields or len(fields) % 4:
        raise ValueError(damaged(index_path, f"line {line.strip()[:80]!r} is not made of four fields per component"))
    for extension, offset, size, name in zip(*[iter(fields)] * 4, strict=True):
        if not (_is_number(offset) and _is_number(size)):
            fields_of = f"offset {offset[:30]!r} and size {size[:30]!r} of {printable(name[:80])}"
            raise ValueError(damaged(index_path, f"{fields_of} are not both numbers of bytes"))
        yield Component(extension, int(offset), int(size), name)


def damaged(place: Path | str, what: str) -> str:
    """Returns the message about a damaged index."""
    return f"{place}: damaged index; {what}; {REPAIR}"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS


def ensure_indices(tars: Sequence[Path] | Sequence[RemoteFile], index_dir: str = "") -> list[Path]:
    """Calls `ensure_index` for each tar, for remote ones in threads. Shows a progress bar after a second.

    Raises:
        ValueError: An index belongs to another tar, or a file is not a tar.
        OSError: A file cannot be read.
    """

    def ensure(tar: Path | RemoteFile) -> Path:
        return ensure_index(tar, index_dir)

    indices = in_threads(ensure, list(tars)) if any(isinstance(tar, RemoteFile) for tar in tars) else map(ensure, tars)
    return list(tqdm(indices, "indices", len(tars), unit="tar", delay=1, leave=False, disable=None))


def ensure_index(tar: Path | RemoteFile, index_dir: str = "") -> Path:
    """Returns the local index file of a tar, from `index_dir`, from beside the tar, or else from the user's cache folder.

    If the cache folder lacks the index, it is built there. The index beside a remote tar is copied there.

    Raises:
        ValueError: The index belongs to another tar, or the file is not a tar, or the cache folder cannot be written to.
        OSError: The tar cannot be read.
    """
    stem = Path(str(tar)).stem
    folders = [Path(index_dir)] if index_dir else []
    if isinstance(tar, Path):
        folders.append(tar.parent)
    for index_path in (folder / f"{stem}.idx" for folder in folders):
        if index_path.exists():
            with open(index_path, errors="replace") as index:
                _check_belongs(index, str(index_path), tar)
            return index_path
    cached = user_cache("index", f"{stem}-{hashlib.sha256(_identity(tar).encode()).hexdigest()[:16]}.idx")
    if not cached.exists():
        text = _read_beside(tar) if isinstance(tar, RemoteFile) else None
        text = text or format_index(scan_tar(tar))
        with cache_errors(cached.parent):
            replace_text(cached, text)
    return cached


def _identity(tar: Path | RemoteFile) -> str:
    if isinstance(tar, RemoteFile):
        return f"{tar.url} {tar.size} {tar.version}"
    status = tar.stat()
    return f"{tar.resolve()} {status.st_size} {status.st_mtime_ns}"


def _read_beside(tar: RemoteFile) -> str | None:
    url = f"{tar.url.removesuffix('.tar')}.idx"
    text = read_text(url)
    if text is not None:
        _check_belongs(io.StringIO(text), url, tar)
    return text


def _check_belongs(index: TextIO, place: str, tar: Path | RemoteFile) -> None:
    """Compares the first sample of an index with its tar. Users move index files and replace tars, and the loader would decode
    whatever bytes a wrong index points at. Another tar is unlikely to have members of the same sizes at the same offsets.
    """
    num_samples = _read_header(index, place)
    with _open_tar(tar) as file:
        size = file.seek(0, io.SEEK_END)  # first, because it empties the buffer: each read of a remote tar is a request
        file.seek(0)
        if kind := compression_in(file.read(8)):
            raise ValueError(compressed(str(tar), kind))
        for component in parse_line(place, index.readline()) if num_samples else ():
            file.seek(min(max(0, component.offset - tarfile.BLOCKSIZE), size))
            if member_size(file.read(tarfile.BLOCKSIZE)) != component.size:
                raise ValueError(f"{place}: not an index of {tar}; {REPAIR}")


def member_size(header: bytes) -> int:
    """Returns the size in the header of a tar's member, in bytes; -1 if this is not a header."""
    with contextlib.suppress(ValueError):
        # Octal digits, except for sizes from 8 GiB. Parsing the whole header would take ten times as long for each shard.
        return int(header[124:136].rstrip(b" \0"), 8)
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "replace").size
    except tarfile.TarError:
        return -1
