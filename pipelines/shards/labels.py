"""The label of a sample: which member holds it, and which class number it means."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

LARGEST_DIGITS = 9  # class numbers are kept as int32
MOST_KNOWN = 100_000  # contents of `.cls` members to remember; looking one up is several times faster than parsing it
_AMBIGUOUS = -1  # stands for the number of a name that several classes share


@dataclass(frozen=True)
class LabelReader:
    """Finds and parses the labels of a set of shards.

    A label is a class number in ASCII digits, or a class name. Digits mean a number, unless a class file lists them as a name.
    If the file lists a number as the name of another class, digits would be ambiguous, so all labels must be names.

    Attributes:
        key: Key of the label in the sample's `.json`, with dots between nested keys; empty if the label is the sample's `.cls`.
        classes: Class names by number; `None` if they are unknown, and labels must be numbers.
        class_file: File of the class names; empty if they come from an `_info.json`.
    """

    key: str = ""
    classes: tuple[str, ...] | None = None
    class_file: str = ""

    @property
    def extension(self) -> str:
        """Extension of the member with the label, in lower case."""
        return "json" if self.key else "cls"

    def parse(self, raw: bytes, place: str) -> int:
        """Returns the class number in the content of a member.

        The caller compares it with the number of classes, which it knows for all splits.

        Args:
            raw: Content of the member with `extension`.
            place: Name of the member in messages: `tar:offset:member`.

        Raises:
            ValueError: The content is not a valid label; the message begins with `place`.
        """
        if not self.key:
            number = self._known.get(raw)
            if number is None:
                number = self._number(raw, place)
                if len(self._known) < MOST_KNOWN:
                    self._known[raw] = number
            return number
        try:
            label = json_label(raw, self.key)
        except KeyError as error:
            raise ValueError(f"{place}: {error.args[0]}; --label-key (in training --data.label-key) names another") from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if isinstance(label, float) and label.is_integer():
            label = int(label)  # some tools write columns of integers as floats
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise ValueError(f"{place}: {self.key!r} is {str(label)[:40]}, which is neither a class number nor a class name")
        return self._number(str(label).encode("utf-8", "replace"), place)

    def _number(self, label: bytes, place: str) -> int:
        """Returns the class number of a number or a name, ignoring blanks around it."""
        digits = label.strip()
        if self._names and (found := self._names.get(digits.decode("utf-8", "replace"))) is not None:
            if found == _AMBIGUOUS:
                raise ValueError(f"{place}: the label is {_shown(digits)}, which is the name of several classes; use numbers")
            return found
        if digits.isdigit() and self._numbers_allowed:
            if len(digits.lstrip(b"0")) > LARGEST_DIGITS:
                raise ValueError(f"{place}: the label is {label[:40]!r}, which is too large for a class number")
            return int(digits)
        if self.classes is None:
            raise ValueError(
                f"{place}: the label is {label[:40]!r}; a class number in ASCII digits is needed, or a file of class names "
                "with --class-file (in training --data.class-file)"
            )
        source = self.class_file or "_info.json"
        neither = " nor a class number" if self._numbers_allowed else ""
        raise ValueError(
            f"{place}: the label is {_shown(digits)}, which is none of the {len(self.classes)} classes of {source}{neither}"
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


def open_labels(label_key: str = "", class_file: str = "", listed: Sequence[str] | None = None) -> LabelReader:
    """Builds the reader of labels from the options and the classes of an `_info.json`.

    Args:
        label_key: Key of the label in `.json`; empty for labels in `.cls`.
        class_file: File of class names, one per line in the order of their numbers; empty if there is none.
        listed: Classes in the `_info.json` beside the shards.

    Raises:
        ValueError: The class file cannot be read, has an empty line, or contradicts the `_info.json`.
    """
    if not class_file:
        return LabelReader(label_key, tuple(listed) if listed else None)
    classes = _read_class_file(class_file)
    # The converter lists numbers if its source has no names. A class file may name those.
    unnamed = listed and list(listed) == [str(number) for number in range(len(listed))] and len(listed) <= len(classes)
    if listed and not unnamed and classes != tuple(listed):
        raise ValueError(
            f"{class_file} has other classes than the _info.json beside the shards, or in another order; "
            "omit the class file, or use the one that matches the shards"
        )
    return LabelReader(label_key, classes, class_file)


def _read_class_file(path: str) -> tuple[str, ...]:
    """Reads class names by number from a file with one name per line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = tuple(line.strip() for line in file.read().rstrip().split("\n"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error
    if "" in names:
        raise ValueError(f"{path}, line {names.index('') + 1}: empty; one class name per line is needed")
    return names


def json_label(raw: bytes, key: str) -> Any:
    """Returns the value of a key in a `.json` member, with dots between nested keys.

    Raises:
        KeyError: The key is missing; the argument is a message.
        ValueError: The content is not JSON.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged .json ({error})") from error
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(f"no {key!r} in .json")
        value = value[part]
    return value


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _shown(label: bytes) -> str:
    return repr(label.decode("utf-8", "replace")[:40])
