"""Index files: where in a tar each component of each sample lies, in the format DALI's webdataset reader takes.

The first line is `v1.2 NUM_SAMPLES`; then one line a sample with four fields a component: extension, offset of the bytes
in the tar, size in bytes, name of the member. It is what DALI's `wds2idx` writes.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.files import replace_text

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


def scan_tar(tar_path: Path) -> list[Sample]:
    """The samples of a tar, in its order: neighbouring members with one key are a sample.

    Raises:
        ValueError: The file is not a tar, or is cut short.
    """
    samples: list[Sample] = []
    last_key = None
    try:
        with tarfile.open(tar_path, "r:") as tar:
            for member in tar:
                key, extension = split_name(member.name)
                if not member.isreg() or not key or key.endswith("/"):
                    continue
                if key != last_key:
                    samples.append([])
                    last_key = key
                samples[-1].append(Component(extension, member.offset_data, member.size, member.name))
            end = max((member.offset_data + member.size for member in tar.getmembers()), default=0)
    except tarfile.TarError as error:
        raise ValueError(f"{tar_path}: not a readable tar ({error})") from error
    _check_end_mark(tar_path, -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
    return samples


def write_index(index_path: Path, samples: list[Sample]) -> None:
    """Writes the index of a tar's samples; the file appears whole or not at all."""
    lines = [f"{VERSION} {len(samples)}"]
    for sample in samples:
        lines.append(" ".join(f"{_field(c.extension)} {c.offset} {c.size} {_field(c.name)}" for c in sample))
    replace_text(index_path, "\n".join(lines) + "\n")


def read_index(index_path: Path) -> list[Sample]:
    """The samples that an index lists.

    Raises:
        ValueError: The file is not an index of version 1.2, or is damaged.
    """
    with open(index_path) as file:
        num_samples = _parse_header(index_path, file.readline())
        samples = [list(_parse_line(index_path, line)) for line in file]
    if len(samples) != num_samples:
        raise ValueError(f"{index_path}: damaged index; {num_samples} samples announced, {len(samples)} listed")
    return samples


def count_samples(index_path: Path) -> int:
    """The number of samples, from the first line alone."""
    with open(index_path) as file:
        return _parse_header(index_path, file.readline())


def ensure_index(tar_path: Path) -> Path:
    """The path of an index for the tar: the `.idx` beside it, or else one built once into the user's cache folder."""
    beside = tar_path.with_suffix(".idx")
    if beside.exists():
        return beside
    status = tar_path.stat()
    identity = f"{tar_path.resolve()} {status.st_size} {status.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "googlenet-dali" / "index"
    cached = cache / f"{tar_path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.idx"
    if not cached.exists():
        cache.mkdir(parents=True, exist_ok=True)
        write_index(cached, scan_tar(tar_path))
    return cached


def _field(text: str) -> str:
    """The format parts its fields by blanks and has no quoting; names in it serve messages only."""
    return "_".join(text.split()) or "_"


def _check_end_mark(tar_path: Path, end: int) -> None:
    """A tar ends with a block of zeros; `tarfile` takes one that was cut short between two members for complete."""
    with open(tar_path, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{tar_path}: cut short; there is no end mark behind its last whole member, at byte {end:,}")


def _parse_header(index_path: Path, line: str) -> int:
    version, _, count = line.strip().partition(" ")
    if version != VERSION or not count.isdigit():
        raise ValueError(f"{index_path}: not an index file; its first line is {line[:60]!r}, not '{VERSION} NUM_SAMPLES'")
    return int(count)


def _parse_line(index_path: Path, line: str) -> Iterator[Component]:
    fields = line.split()
    if not fields or len(fields) % 4:
        raise ValueError(f"{index_path}: damaged index; line {line[:80]!r} is not made of four fields a component")
    for extension, offset, size, name in zip(*[iter(fields)] * 4, strict=True):
        yield Component(extension, int(offset), int(size), name)
