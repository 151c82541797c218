"""Index files: where in a tar each component of each sample lies, in the format DALI's webdataset reader takes.

The first line is `v1.2 NUM_SAMPLES`; then one line a sample with four fields a component: extension, offset of the bytes
in the tar, size in bytes, name of the member. It is what DALI's `wds2idx` writes.
"""

import contextlib
import hashlib
import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from tqdm import tqdm

from pipelines.files import replace_text, user_cache
from pipelines.remote.object_store import RemoteFile, in_threads, is_url, open_remote, read_text

VERSION = "v1.2"


@dataclass(frozen=True)
class Component:
    """One member of a tar: `extension` without the leading dot, `offset` and `size` of its data in bytes."""

    extension: str
    offset: int
    size: int
    name: str


Sample = list[Component]


def split_name(name: str) -> tuple[str, str]:
    """A member's name as (key, extension): the first dot after the last slash parts them, as webdataset has it."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension


def scan_tar(tar: str | Path | RemoteFile) -> list[Sample]:
    """The samples of a tar, local or at a URL, in its order; of a remote one only the headers are read.

    Raises:
        ValueError: The file is not a tar, or is damaged or cut short.
        OSError: It cannot be read.
    """
    with _open_tar(tar) as file:
        return group_samples(iter_components(file, str(tar)))


def _open_tar(tar: str | Path | RemoteFile) -> BinaryIO:
    if isinstance(tar, RemoteFile):
        return open_remote(tar.url, tar.size)
    return open_remote(str(tar)) if is_url(str(tar)) else open(tar, "rb")


def iter_components(file: BinaryIO, place: str) -> Iterator[Component]:
    """The members of a tar that can belong to samples, in order; seeks over their data.

    Args:
        file: The tar.
        place: What to call it in messages.

    Raises:
        ValueError: The file is not a tar, or is damaged or cut short, once what lies before the damage has been given.
    """
    try:
        # A name that is not UTF-8 has to become text that can be printed and written, and two such names two texts.
        with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # where it keeps every member that it has seen
                key, extension = split_name(member.name)
                if member.isreg() and key and not key.endswith("/"):
                    yield Component(extension, member.offset_data, member.size, member.name)
            end = tar.offset
    # The others are what it lets through from inside a damaged header.
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(f"{place}: not a readable tar ({error})") from error
    check_end_mark(file, place, end)


def group_samples(components: Iterable[Component]) -> list[Sample]:
    """Neighbouring members with one key are a sample."""
    return [list(sample) for _, sample in itertools.groupby(components, key=lambda component: split_name(component.name)[0])]


def format_index(samples: list[Sample]) -> str:
    """The text of the index of a tar's samples."""
    lines = (" ".join(f"{as_field(c.extension)} {c.offset} {c.size} {as_field(c.name)}" for c in sample) for sample in samples)
    return f"{VERSION} {len(samples)}\n" + "".join(f"{line}\n" for line in lines)


def write_index(index_path: Path, samples: list[Sample]) -> None:
    """Writes the index of a tar's samples; the file appears whole or not at all."""
    replace_text(index_path, format_index(samples))


def read_index(index_path: Path) -> list[Sample]:
    """The samples that an index lists.

    Raises:
        ValueError: The file is not an index of version 1.2, or is damaged.
    """
    with open(index_path, errors="replace") as file:
        num_samples = _parse_header(index_path, file.readline())
        samples = [list(parse_line(index_path, line)) for line in file]
    if len(samples) != num_samples:
        raise ValueError(f"{index_path}: damaged index; {num_samples} samples announced, {len(samples)} listed")
    return samples


def read_sample(index_path: Path, row: int) -> Sample:
    """The sample of that number; an index of a million samples is long to read into objects.

    Raises:
        ValueError: The file is not an index of version 1.2, or is damaged, or lists fewer.
    """
    with open(index_path, errors="replace") as file:
        num_samples = _parse_header(index_path, file.readline())
        for line in itertools.islice(file, row, row + 1):
            return list(parse_line(index_path, line))
    raise ValueError(f"{index_path}: damaged index; {num_samples} samples announced, and there is none of number {row}")


def count_samples(index_path: Path) -> int:
    """The number of samples, from the first line alone."""
    with open(index_path, errors="replace") as file:
        return _parse_header(index_path, file.readline())


def ensure_indices(tars: Sequence[Path] | Sequence[RemoteFile], index_dir: str = "") -> list[Path]:
    """`ensure_index` of each tar; remote ones many at a time. A bar shows the progress where it takes more than a second.

    Raises:
        ValueError: An index found is not one of its tar, or a tar without one is none.
        OSError: Something cannot be read.
    """

    def ensure(tar: Path | RemoteFile) -> Path:
        return ensure_remote_index(tar, index_dir) if isinstance(tar, RemoteFile) else ensure_index(tar, index_dir)

    remote = any(isinstance(tar, RemoteFile) for tar in tars)
    indices = in_threads(ensure, list(tars)) if remote else map(ensure, tars)
    return list(tqdm(indices, "indices", len(tars), unit="tar", delay=1, leave=False, disable=None))


def ensure_index(tar_path: Path, index_dir: str = "") -> Path:
    """The path of an index for the tar: from `index_dir`, or beside the tar, or else built once into the user's cache folder.

    Raises:
        ValueError: The index found is not one of this tar.
    """
    folders = [Path(index_dir), tar_path.parent] if index_dir else [tar_path.parent]
    for index_path in (folder / f"{tar_path.stem}.idx" for folder in folders):
        if index_path.exists():
            _check_file_belongs(index_path, tar_path)
            return index_path
    status = tar_path.stat()
    cached = _cache_path(tar_path.stem, f"{tar_path.resolve()} {status.st_size} {status.st_mtime_ns}")
    if not cached.exists():
        write_index(cached, scan_tar(tar_path))
    return cached


def ensure_remote_index(tar: RemoteFile, index_dir: str = "") -> Path:
    """The path of a local index for a remote tar: from `index_dir`, or else from the user's cache folder.

    What is not in the cache folder is copied from beside the tar, or built from the tar's headers.

    Raises:
        ValueError: The index found is not one of this tar, or the tar is none.
        OSError: The store cannot be read.
    """
    stem = Path(tar.url).stem
    given = Path(index_dir) / f"{stem}.idx"
    if index_dir and given.exists():
        _check_file_belongs(given, tar)
        return given
    cached = _cache_path(stem, f"{tar.url} {tar.size} {tar.version}")
    if not cached.exists():
        beside = f"{tar.url.removesuffix('.tar')}.idx"
        try:
            text = read_text(beside)
        # Where listing is not allowed, S3 denies access to whatever is not there.
        except (FileNotFoundError, PermissionError):
            write_index(cached, scan_tar(tar))
        else:
            _check_belongs(io.StringIO(text), beside, tar)
            replace_text(cached, text)
    return cached


def _cache_path(stem: str, identity: str) -> Path:
    return user_cache("index", f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.idx")


def as_field(text: str) -> str:
    """A text as an index holds it: the format parts its fields by blanks and has no quoting. Names serve messages only."""
    return "_".join(text.split()) or "_"


def check_end_mark(file: BinaryIO, place: str, end: int) -> None:
    """A tar ends with a block of zeros; `tarfile` takes one that was cut short between two members for complete."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError(f"{place}: cut short; there is no end mark behind its last whole member, at byte {end:,}")
    if any(block):
        raise ValueError(f"{place}: damaged; at byte {end:,} there is neither a member nor an end mark")


def _check_file_belongs(index_path: Path, tar: Path | RemoteFile) -> None:
    with open(index_path, errors="replace") as index:
        _check_belongs(index, str(index_path), tar)


def _check_belongs(index: TextIO, place: str, tar: Path | RemoteFile) -> None:
    """Folders of indices are put together by hand, and tars replaced; anything would be read as an image then.

    One sample tells: it is unlikely that another tar has members of the same sizes at the same places.
    """
    num_samples = _parse_header(place, index.readline())
    with _open_tar(tar) as file:
        for component in parse_line(place, index.readline()) if num_samples else ():
            file.seek(max(0, component.offset - tarfile.BLOCKSIZE))
            if _member_size(file.read(tarfile.BLOCKSIZE)) != component.size:
                raise ValueError(f"{place}: not an index of {tar}; remove it, or make it anew with `shards index --overwrite`")


def _member_size(header: bytes) -> int:
    """What a member's header says, bytes; -1 where it is none."""
    with contextlib.suppress(ValueError):
        # Octal digits, but for sizes from 8 GiB on. To parse all of the header takes ten times as long, for each shard.
        return int(header[124:136].rstrip(b" \0"), 8)
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "replace").size
    except tarfile.TarError:
        return -1


def _parse_header(index_path: Path | str, line: str) -> int:
    version, _, count = line.strip().partition(" ")
    if version != VERSION or not count.isdigit():
        raise ValueError(f"{index_path}: not an index file; its first line is {line[:60]!r}, not '{VERSION} NUM_SAMPLES'")
    return int(count)


def parse_line(index_path: Path | str, line: str) -> Iterator[Component]:
    """The components that a line of an index lists.

    Raises:
        ValueError: It is damaged.
    """
    fields = line.split()
    if not fields or len(fields) % 4:
        raise ValueError(f"{index_path}: damaged index; line {line[:80]!r} is not made of four fields a component")
    for extension, offset, size, name in zip(*[iter(fields)] * 4, strict=True):
        if not (offset.isdecimal() and size.isdecimal()):
            raise ValueError(f"{index_path}: damaged index; offset {offset!r} and size {size!r} of {name} are not both numbers")
        yield Component(extension, int(offset), int(size), name)
