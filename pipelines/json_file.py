"""Reads JSON that other programs or earlier runs wrote: each error is one line that names the file and the key."""

import json
import math
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from pipelines.printable import printable

MOST_DIGITS = 300  # of whole numbers, which may then become floats
BLANK = b"\xef\xbb\xbf\0 \t\r"  # a byte order mark, zeros, and white space
MOST_BYTES = 256 * 2**20  # an `_info.json` of a million shards takes about a quarter of this


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: See `parse_json`.
        OSError: The file cannot be read.
    """
    return parse_json(read_limited(path), str(path))


def read_limited(path: Path) -> bytes:
    """Reads a file that should be small.

    Raises:
        ValueError: It is larger than any that this project writes.
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    _check_size(content, str(path))
    return content


def _check_size(content: bytes, place: str) -> None:
    if len(content) > MOST_BYTES:
        raise ValueError(f"{place}: larger than {MOST_BYTES // 2**20} MiB, the most that is read of such a file")


def read_json_lines(path: Path, *, torn: bool = False, finite: bool = True) -> Iterator[tuple[str, Any]]:
    """Yields (`PATH, line NUMBER`, value) for each line of a JSON Lines file that is not blank.

    An incomplete last line is left out: a run was killed while it wrote it, or is writing it now. `torn` leaves out all
    incomplete lines: a later run ends the line of a killed one, and adds its own. For `finite` see `parse_json`. A line
    is taken for incomplete only if it begins as an object, or has only zeros, as a power failure may leave them.

    Raises:
        ValueError: See `parse_json`.
        OSError: The file cannot be read.
    """
    return parse_json_lines(read_limited(path), str(path), torn=torn, finite=finite)


def parse_json_lines(content: bytes, place: str, *, torn: bool = False, finite: bool = True) -> Iterator[tuple[str, Any]]:
    """Yields the same as `read_json_lines`, of the content of a file."""
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{place}, line {number}"
        if not line.strip():
            continue
        try:
            value = parse_json(line, where, finite=finite)
        except ValueError:
            is_torn = number == len(lines) or (torn and not line.rstrip().endswith(b"}"))
            if is_torn and line.lstrip(BLANK)[:1] in (b"", b"{"):
                continue
            raise
        yield where, value


def parse_json(content: bytes, place: str, *, finite: bool = True, objects: Callable[[list[Any]], Any] | None = None) -> Any:
    """Parses JSON in UTF-8, with or without a byte order mark.

    Args:
        content: Content of the file.
        place: Name of the file in messages.
        finite: Whether to refuse `NaN` and `Infinity`, which Python writes although JSON does not have them.
        objects: Makes the value of an object from its pairs, for example `tuple`, which keeps keys that are there twice.

    Raises:
        ValueError: It is not JSON, or has a number beyond floats, or is nested too deeply to be read. The message begins with
            `place`.
    """
    _check_size(content, place)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text, from byte {error.start:,} on") from None
    if not text.strip():
        raise ValueError(f"{place}: empty")
    try:
        refuse = _refuse if finite else None
        return json.loads(text, parse_constant=refuse, parse_float=_finite, parse_int=_whole, object_pairs_hook=objects)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{place}: not usable JSON (lists or objects are nested too deeply)") from None
    except ValueError as error:  # of the three functions below
        raise ValueError(f"{place}: not usable JSON ({error})") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits is out of range")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is out of range")
    return number


def as_object(value: Any, place: str) -> dict[str, Any]:
    """Returns a value if it is a JSON object, or raises a `ValueError` that begins with `place`."""
    if not isinstance(value, dict):
        raise ValueError(f"{place}: an object is needed, not {shown(value)}")
    return value


def get(fields: dict[str, Any], key: str, kind: str, place: str, *, default: Any = ...) -> Any:
    """Returns the value of a key.

    Args:
        fields: The object.
        key: Its key.
        kind: What the value must be; a key of `KINDS`.
        place: Name of the object in messages.
        default: What a missing key or null means. Without it, the key is needed.

    Raises:
        ValueError: The key is missing, or its value is of another kind.
    """
    value = fields.get(key)
    if value is None and default is not ...:
        return default
    if key not in fields:
        raise ValueError(f"{place}: {key!r} is missing")
    if not KINDS[kind](value):
        raise ValueError(f"{place}: {key!r} must be {kind}, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Returns the beginning of a value as text that is safe to print."""
    return printable(reprlib.repr(value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": _is_text,
    "a list of texts": _is_list_of(_is_text),
    "a whole number from 0": _is_count,
    "a list of whole numbers from 0": _is_list_of(_is_count),
    "a list of pairs of texts": _is_list_of(lambda pair: _is_list_of(_is_text)(pair) and len(pair) == 2),
    "an object of whole numbers from 0": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    "an object": lambda value: isinstance(value, dict),
}
