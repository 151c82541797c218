"""What must hold for any bytes: a reader returns, or raises a ValueError of one line. For hypothesis and for atheris."""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from model.checkpoint import load_checkpoint
from pipelines.shards.find_tars import parse_info
from pipelines.shards.index import format_index, iter_components, read_index, scan_tar
from pipelines.shards.labels import open_labels


@contextlib.contextmanager
def refusal() -> Iterator[None]:
    """Lets a ValueError of one line pass. A UnicodeDecodeError, which is a ValueError too, is a slip."""
    try:
        yield
    except UnicodeError:
        raise
    except ValueError as error:
        if "\n" in str(error):
            raise RuntimeError(f"a message of several lines: {error}") from error


@contextlib.contextmanager
def as_file(content: bytes) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def tar(content: bytes) -> None:
    """Members lie within the tar. What the index of it lists is the same when it is read again."""
    with refusal():
        for component in iter_components(io.BytesIO(content), "x.tar"):
            assert 0 <= component.offset <= component.offset + component.size <= len(content), component
    with refusal(), as_file(content) as path:
        samples = scan_tar(path)
        with as_file(format_index(samples).encode()) as index:
            listed = read_index(index)
        places = [[(part.offset, part.size) for part in sample] for sample in samples]
        assert [[(part.offset, part.size) for part in sample] for sample in listed] == places


def index(content: bytes) -> None:
    with refusal(), as_file(content) as path:
        for sample in read_index(path):
            assert sample
            assert all(part.offset >= 0 and part.size >= 0 for part in sample)


def info(content: bytes) -> None:
    """What is accepted has the types that the project relies on."""
    with refusal():
        found = parse_info(content, "_info.json")
        assert isinstance(found, dict)
        assert all(isinstance(name, str) for name in found.get("classes") or ())
        for split in (found.get("splits") or {}).values():
            assert all(isinstance(name, str) for name in split["filenames"])
        json.dumps(found)


READERS = [open_labels(), open_labels(listed=("ant", "bee", "10")), open_labels(label_key="a.b", listed=("ant", "bee"))]


def label(content: bytes) -> None:
    """A number that is accepted is one, for every reader that accepts it."""
    for reader in READERS:
        with refusal():
            number = reader.parse(content, "x")
            assert isinstance(number, int)
            assert 0 <= number < 2**31


def checkpoint(content: bytes) -> None:
    with refusal(), as_file(content) as path:
        assert isinstance(load_checkpoint(path), dict)


PROPERTIES: dict[str, Callable[[bytes], None]] = {
    "tar": tar,
    "index": index,
    "info": info,
    "label": label,
    "checkpoint": checkpoint,
}
