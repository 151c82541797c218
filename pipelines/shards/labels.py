"""The label of a sample: which member holds it, and which class number it means."""

import collections
import json
import re
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipelines.printable import printable

LARGEST_DIGITS = 9  # class numbers are kept as int32
MOST_KNOWN = 100_000  # contents of `.cls` members to remember; looking one up is several times faster than parsing it
MOST_KNOWN_BYTES = 256  # longer contents are parsed each time, or the memory would fill
SHOWN = 40  # characters of a label in messages
PADDING = string.whitespace + "\0\ufeff\u00a0"  # around a label: blanks, NUL bytes, the byte-order mark
_AMBIGUOUS = -1  # stands for the number of a name that several classes share
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BINARY_BYTES = re.compile(rb"[\x00-\x08\x0e-\x1f]")
# A whole number, also as the float that some tools write; group 1 is its value.
_NUMBER = re.compile(r"([0-9]+)(?:\.0*)?")
# What is no class name, unless a class file lists it: `\d` includes the digits of all scripts.
_UNLIKELY = {
    "a number, but not in plain digits": re.compile(r"[-+]?[\d.,_\s]*\d[\d.,_\s]*([eE][-+]?\d+)?"),
    "how Python prints bytes": re.compile(r"b(['\"]).*\1"),
    "how Python prints a tensor or an array": re.compile(r"(tensor|array|(np|numpy|torch)\.\w+)\(.*\)"),
    "a list of values": re.compile(r"\[.*\]|\(.*,.*\)"),
    "JSON": re.compile(r"\{.*\}"),
    "text in quotation marks": re.compile(r"(['\"]).*\1"),
}
_BINARY = {
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a pickle of Python"),
    b"PK\x03\x04": "a zip file or a file of torch.save",
    b"\x93NUMPY": "a file of numpy.save",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


class BinaryLabelError(ValueError):
    """A label is not text but, it seems, an integer in binary."""


@dataclass(frozen=True)
class LabelReader:
    """Finds and parses the labels of a set of shards.

    A label is a class number in ASCII digits, or a class name. Digits mean a number, unless a class file lists them as a name.
    If the file lists a number as the name of another class, digits would be ambiguous, so all labels must be names.

    Attributes:
        extension: Extension of the member with the label, in lower case.
        key: Key of the label in that member, with dots between nested keys; empty if the member is the label.
        classes: Class names by number; `None` if they are unknown, and labels must be numbers.
        class_file: File of the class names; empty if there is none.
        source: What has the class names otherwise, for messages; empty if it is an `_info.json`.
    """

    extension: str = "cls"
    key: str = ""
    classes: tuple[str, ...] | None = None
    class_file: str = ""
    source: str = field(default="", repr=False)  # the text of a reader is in the names of cached labels

    def parse(self, raw: bytes, place: str) -> int:
        """Returns the class number in the content of a member.

        The caller compares it with the number of classes, which it knows for all splits.

        Args:
            raw: Content of the member with `extension`.
            place: Name of the member in messages: `tar:offset:member`.

        Raises:
            ValueError: The content is not a valid label; the message begins with `place`.
        """
        number = None if self.key else self._known.get(raw)
        if number is None:
            try:
                number = self.number(self.text(raw))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            if not self.key and len(raw) <= MOST_KNOWN_BYTES and len(self._known) < MOST_KNOWN:
                self._known[raw] = number
        return number

    def text(self, raw: bytes) -> str:
        """Returns the label in the content of a member, a number or a name, without what surrounds it.

        Raises:
            ValueError: The content is no text, or no JSON with a label under the key.
        """
        return json_text(raw, self.key, self.extension) if self.key else plain_text(raw)

    def number(self, label: str) -> int:
        """Returns the class number of a number or a name.

        Raises:
            ValueError: It is neither a class number nor one of the classes.
        """
        if self._names and (found := self._names.get(label)) is not None:
            if found == _AMBIGUOUS:
                raise ValueError(f"the label is {_shown(label)}, which is the name of several classes; use numbers")
            return found
        if self._numbers_allowed and (number := class_number(label)) is not None:
            return number
        looks = _looks_like(label)
        if self.classes is None:
            needed = "" if looks else ", or a file of class names with --class-file (in training --data.class-file)"
            if self.source:  # then there is no such option
                needed = f"; {self.source} has no class names"
            raise ValueError(f"the label is {_shown(label)}{looks}; a class number in ASCII digits is needed{needed}")
        source = self.class_file or self.source or "_info.json"
        neither = " nor a class number" if self._numbers_allowed else ""
        raise ValueError(
            f"the label is {_shown(label)}{looks}, which is none of the {len(self.classes)} classes of {source}{neither}"
        )

    @cached_property
    def _known(self) -> dict[bytes, int]:
        """Class numbers by the content of a `.cls` member."""
        return {}

    @cached_property
    def _names(self) -> dict[str, int]:
        """Class numbers by name."""
        places: dict[str, int] = {}
        for place, name in enumerate(self.classes or ()):
            # If an `_info.json` calls the classes 0, 1, 10, 2, the label 2 is a number: the converter never writes names.
            if self.class_file or not _is_number(name):
                places[name] = _AMBIGUOUS if name in places else place
        return places

    @cached_property
    def _numbers_allowed(self) -> bool:
        return not self.class_file or all(int(name) == place for name, place in self._names.items() if _is_number(name))


def plain_text(raw: bytes) -> str:
    """Returns the text of a member that is a label, without the white space, NUL bytes and byte-order mark around it.

    Raises:
        ValueError: It is empty, or not one line of UTF-8 text without control characters.
    """
    if raw.startswith(tuple(_BINARY)):
        what = next(what for begin, what in _BINARY.items() if raw.startswith(begin))
        raise ValueError(f"the label is {what}, which begins with {_escaped(raw[:16])}; a line of UTF-8 text is needed")
    try:
        return _stripped(raw.decode(), "the label")
    except ValueError as error:
        if len(raw) in (1, 2, 4, 8) and _BINARY_BYTES.search(raw):
            looks = f"the label is {_escaped(raw)}, which looks like a number in binary; ASCII digits are needed"
            raise BinaryLabelError(looks) from error
        if isinstance(error, UnicodeDecodeError):
            raise ValueError(f"the label is {_escaped(raw[:SHOWN])}, which is not UTF-8 text") from error
        raise


def padded_length(raw: bytes) -> int:
    """Returns the length of content that could also be a number in binary, as a 1 with three NUL bytes: 49. Otherwise 0."""
    return len(raw) if len(raw) in (2, 4, 8) and (raw.endswith(b"\0") or raw.startswith(b"\0")) else 0


def json_text(raw: bytes, key: str, extension: str = "json") -> str:
    """Returns the label under a key of a `.json` member, with dots between nested keys.

    Raises:
        ValueError: The content is not JSON, or the key is missing, or its value is neither a class number nor a name.
    """
    try:
        value: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reasons: dict[type[Exception], str] = {
            json.JSONDecodeError: str(error),
            UnicodeDecodeError: "not UTF-8 text",
            RecursionError: "lists or objects are nested too deeply",
        }
        raise ValueError(f"damaged .{extension} ({reasons.get(type(error), 'a number has too many digits')})") from error
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"no {key!r} in .{extension}; --label-key (in training --data.label-key) names another")
        value = value[part]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # some tools write columns of integers as floats
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        what = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else json.dumps(value)
        raise ValueError(f"{key!r} is {what}, which is neither a class number nor a class name")
    return _stripped(str(value), repr(key))


def _stripped(text: str, what: str) -> str:
    text = text.strip(PADDING)
    if not text:
        raise ValueError(f"{what} is empty")
    if _CONTROL.search(text):
        has = "several lines" if len(text.splitlines()) > 1 else "control characters"
        raise ValueError(f"{what} has {has}: {_shown(text)}")
    return text


def class_number(label: str) -> int | None:
    """Returns the class number of a label in ASCII digits (`7`, also `7.0`); `None` for other labels.

    Raises:
        ValueError: The number is too large.
    """
    match = _NUMBER.fullmatch(label)
    if match is None:
        return None
    if len(match[1].lstrip("0")) > LARGEST_DIGITS:
        raise ValueError(f"the label is {_shown(label)}, which is too large for a class number")
    return int(match[1])


def check_range(number: int, num_classes: int) -> None:
    """Raises `ValueError` if there are too few classes for a class number."""
    if number >= num_classes:
        raise ValueError(f"class {number} is out of range; there are {num_classes} classes, from 0 on")


def require_name(label: str) -> None:
    """Checks the name of a class that nobody has listed.

    Raises:
        ValueError: It is not a name but, for example, a number that is no class number, or what Python prints for bytes.
    """
    if looks := _looks_like(label):
        raise ValueError(f"the label is {_shown(label)}{looks}; a class number in ASCII digits or a class name is needed")


def unlisted_label(label: str) -> str:
    """Returns a label of a set without a list of classes, from a table: a class number in digits alone, or a class name.

    Raises:
        ValueError: It is empty, or neither of them.
    """
    text = _stripped(label, "the label")
    if (number := class_number(text)) is None:
        require_name(text)
        return text
    return text if text.isdecimal() else str(number)


def _looks_like(label: str) -> str:
    if _NUMBER.fullmatch(label):
        return ""
    return next((f" ({what})" for what, pattern in _UNLIKELY.items() if pattern.fullmatch(label)), "")


def class_names(classes: Sequence[str] | None, num_classes: int) -> list[str]:
    """Returns a name for each class: its own, with its number if other classes have the same, or its number alone."""
    names = [*(classes or ())[:num_classes]]
    names += map(str, range(len(names), num_classes))
    times = collections.Counter(names)
    return [name if times[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def no_class_zero(used: Collection[int]) -> str:
    """Returns a warning if the labels of a split seem to begin at 1; else an empty text.

    Args:
        used: Class numbers that occur.
    """
    if len(used) < 2 or min(used) != 1:
        return ""
    return (
        "no sample has class 0; class numbers begin at 0, so labels that begin at 1 shift all class names by one, "
        "and leave an output of the network unused"
    )


def label_place(label_key: str) -> tuple[str, str]:
    """Returns the extension of the member that holds the label, and the key in it, from the option --label-key.

    `cls` or a value that ends in `.cls` is the extension of a member that is the label. `json:KEY` or `X.json:KEY` is a key in
    that member. Any other value is a key in `.json`. Without a value, the label is the `.cls`.

    Raises:
        ValueError: The key is missing behind the colon.
    """
    member, colon, key = label_key.partition(":")
    if colon and re.fullmatch(r"(.*\.)?json", member, re.IGNORECASE):
        if not key:
            raise ValueError(f"label key {label_key!r}: there is no key behind the colon; an example is {label_key}label")
        return member.lower().removeprefix("."), key
    if re.fullmatch(r"(.*\.)?cls", label_key, re.IGNORECASE):
        return label_key.lower().removeprefix("."), ""
    return ("json", label_key) if label_key else ("cls", "")


def open_labels(label_key: str = "", class_file: str = "", listed: Sequence[str] | None = None) -> LabelReader:
    """Builds the reader of labels from the options and the classes of an `_info.json`.

    Args:
        label_key: Member or key of the label, see `label_place`; empty for labels in `.cls`.
        class_file: File of class names, one per line in the order of their numbers; empty if there is none.
        listed: Classes in the `_info.json` beside the shards.

    Raises:
        ValueError: The class file cannot be read, has an empty line, or contradicts the `_info.json`.
    """
    extension, key = label_place(label_key)
    if not class_file:
        return LabelReader(extension, key, tuple(listed) if listed else None)
    classes = _read_class_file(class_file)
    # The converter lists numbers if its source has no names. A class file may name those.
    unnamed = listed and list(listed) == [str(number) for number in range(len(listed))] and len(listed) <= len(classes)
    if listed and not unnamed and classes != tuple(listed):
        raise ValueError(
            f"{class_file} has other classes than the _info.json beside the shards, or in another order; "
            "omit the class file, or use the one that matches the shards"
        )
    return LabelReader(extension, key, classes, class_file)


def _read_class_file(path: str) -> tuple[str, ...]:
    """Reads class names by number from a file with one name per line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = tuple(line.strip() for line in file.read().rstrip().split("\n"))
    except OSError as error:
        why = "a local file is needed" if "://" in path else error.strerror
        raise ValueError(f"{path}: cannot be read ({why})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error
    if "" in names:
        raise ValueError(f"{path}, line {names.index('') + 1}: empty; one class name per line is needed")
    return names


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _shown(label: str) -> str:
    return repr(label[:SHOWN])


def _escaped(raw: bytes) -> str:
    return f"'{printable(raw.decode(errors='backslashreplace'))}'"
