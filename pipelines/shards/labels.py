"""The label of a sample: where it is, and which class number its bytes mean."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

LARGEST_DIGITS = 9  # more are no class number, and would not fit where class numbers are kept
MAX_REMEMBERED = 100_000
KEY_OPTION = "--label-key (in training --data.label-key)"
FILE_OPTION = "--class-file (in training --data.class-file)"
_SEVERAL = -1  # in place of the number of a name that several classes have


@dataclass(frozen=True)
class LabelReader:
    """How the labels of a set of shards are found and read.

    A label is a class number in ASCII digits or a class name. Digits are a number, except where a class file has them as a
    name; a class file with such a name at another place than its number leaves no way to tell, and then all labels have to be
    names.

    Attributes:
        key: Of the label in the sample's `.json`, dots between nested keys; empty where the label is the sample's `.cls`.
        classes: Class names by number; None where they are not known, and labels have to be numbers.
        class_file: The file that the class names are from; empty where they are from an `_info.json`.
    """

    key: str = ""
    classes: tuple[str, ...] | None = None
    class_file: str = ""

    @property
    def extension(self) -> str:
        """That of the member with the label, in lower case."""
        return "json" if self.key else "cls"

    def parse(self, raw: bytes, place: str) -> int:
        """The class number that the bytes of the member mean.

        It is not compared with the number of classes: who reads shards knows that of all splits.

        Args:
            raw: The content of the member with `extension`.
            place: What to call it in messages: `tar:offset:member`.

        Raises:
            ValueError: They mean none; names the place.
        """
        if self.key:
            return self._parse_json(raw, place)
        number = self._remembered.get(raw)
        if number is None:
            number = self.number(raw, place)
            if len(self._remembered) < MAX_REMEMBERED:
                self._remembered[raw] = number
        return number

    def number(self, label: bytes, place: str) -> int:
        """The class number of a label by itself, in digits or by name, blanks around it allowed.

        Raises:
            ValueError: It is neither a number nor a known name; names the place.
        """
        digits = label.strip()
        if self._names and (found := self._names.get(digits.decode("utf-8", "replace"))) is not None:
            if found == _SEVERAL:
                raise ValueError(f"{place}: the label is {_shown(digits)}, which is the name of several classes; number them")
            return found
        if digits.isdigit() and self._numbers_allowed:
            if len(digits.lstrip(b"0")) > LARGEST_DIGITS:
                raise ValueError(f"{place}: the label is {label[:40]!r}, which is too large for a class number")
            return int(digits)
        if self.classes is None:
            needed = f"a class number in ASCII digits is needed, or the class names in a file as {FILE_OPTION}"
            raise ValueError(f"{place}: the label is {label[:40]!r}; {needed}")
        source = self.class_file or "_info.json"
        neither = " nor a class number" if self._numbers_allowed else ""
        raise ValueError(
            f"{place}: the label is {_shown(digits)}, which is none of the {len(self.classes)} classes of {source}{neither}"
        )

    def _parse_json(self, raw: bytes, place: str) -> int:
        try:
            label = json_label(raw, self.key)
        except KeyError as error:
            raise ValueError(f"{place}: {error.args[0]}; {KEY_OPTION} names another") from error
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if isinstance(label, float) and label.is_integer():
            label = int(label)  # what becomes of a column of integers in some tools
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise ValueError(f"{place}: {self.key!r} is {str(label)[:40]}, which is neither a class number nor a class name")
        return self.number(str(label).encode("utf-8", "replace"), place)

    @cached_property
    def _remembered(self) -> dict[bytes, int]:
        return {}

    @cached_property
    def _names(self) -> dict[str, int]:
        """Class numbers by name; several classes may share one, which is of no use as a label then."""
        places: dict[str, int] = {}
        for place, name in enumerate(self.classes or ()):
            # In an `_info.json` of classes that are called 0, 1, 10, 2, the label 2 is a number: the converter writes no names.
            if self.class_file or not _is_number(name):
                places[name] = _SEVERAL if name in places else place
        return places

    @cached_property
    def _numbers_allowed(self) -> bool:
        return not self.class_file or all(int(name) == place for name, place in self._names.items() if _is_number(name))


def open_labels(label_key: str = "", class_file: str = "", listed: Sequence[str] | None = None) -> LabelReader:
    """The reader of labels that the options and the classes of an `_info.json` make.

    Args:
        label_key: Of the label in `.json`; empty for labels in `.cls`.
        class_file: File of class names, one a line in the order of their numbers; empty where there is none.
        listed: The classes that the `_info.json` beside the shards lists.

    Raises:
        ValueError: The file cannot be read or has an empty line, or lists other classes than the `_info.json`.
    """
    if not class_file:
        return LabelReader(label_key, tuple(listed) if listed else None)
    classes = read_class_file(class_file)
    # The converter lists numbers where its source had nothing else; names may be given to those.
    unnamed = listed and list(listed) == [str(number) for number in range(len(listed))] and len(listed) <= len(classes)
    if listed and not unnamed and classes != tuple(listed):
        raise ValueError(
            f"{class_file} has other classes than the _info.json beside the shards, or in another order; "
            "leave the class file away, or take the one by which these shards are numbered"
        )
    return LabelReader(label_key, classes, class_file)


def read_class_file(path: str) -> tuple[str, ...]:
    """Class names by number, from a file of one a line.

    Raises:
        ValueError: It cannot be read, or a line is empty.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = tuple(line.strip() for line in file.read().rstrip().split("\n"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8") from error
    if "" in names:
        raise ValueError(f"{path}, line {names.index('') + 1}: empty; one class name a line is needed")
    return names


def json_label(raw: bytes, key: str) -> Any:
    """What a `.json` member has under a key, dots between nested ones.

    Raises:
        KeyError: Nothing; the message says so.
        ValueError: It is not JSON.
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
