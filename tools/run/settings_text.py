"""Reads a YAML or JSON file of settings into plain values, and writes values as YAML. It knows no settings."""

import json
import math
import re
import stat
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from pipelines.printable import printable

MOST_BYTES = 1_000_000  # a judgment; a file of all settings has 13,000
TAG, SPECIAL = "tag:yaml.org,2002:", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
CORE_SCHEMA = (  # https://yaml.org/spec/1.2.2/#103-core-schema, without octal and hexadecimal numbers
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", rf"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|{SPECIAL}", list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Reads YAML 1.2: `no` and `5:32` are text, and `1e-3` is a number. PyYAML's own rules are those of YAML 1.1.

    Aliases may multiply a small file to any size, and tags may stand for other types. Settings need neither.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            raise ConstructorError(None, None, "anchors (&), aliases (*) and tags (!) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag != f"{TAG}str":
                raise ConstructorError(None, None, "the name of a setting is needed", key.start_mark)
            if key.value in entries:
                raise ConstructorError(None, None, f"{printable(key.value)} is given more than once", key.start_mark)
            entries[key.value] = self.construct_object(value, deep=True)
        return entries


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes every text that YAML 1.1 or `_Loader` would take for something else."""


for _name, _pattern, _first in CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _name, re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{TAG}int", lambda _, node: int(node.value))
_Loader.add_constructor(f"{TAG}float", lambda _, node: float(re.sub(r"\.(?=[a-zA-Z])", "", node.value)))
_Dumper.add_representer(  # other styles fold line breaks
    str, lambda dumper, text: dumper.represent_scalar(f"{TAG}str", text, style=None if text.isprintable() else '"')
)


def read_entries(path: Path) -> dict[str, Any]:
    """Reads a YAML file, or a JSON file if its name ends in `.json`.

    Raises:
        ValueError: The file cannot be read, or it does not have names of settings at its top.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"--config {path}: a regular file is needed, such as the config.json in the folder of a run")
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"--config {path}: more than 1 MB is too much for a file of settings")
    entries = _parsed(path, content)
    if entries is None:
        raise ValueError(f"--config {path}: there are no settings in it; --write-config FILE writes a file with all of them")
    if not isinstance(entries, dict):
        raise ValueError(f"--config {path}: settings (NAME: VALUE) are needed, not {shown(entries)}")
    return entries


def _parsed(path: Path, content: bytes) -> Any:
    try:
        text = content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        problem = f"byte {error.start:,} is not UTF-8 text"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
    except yaml.reader.ReaderError as error:
        problem = f"YAML does not allow the character U+{error.character:04X}"
    except RecursionError:
        problem = "brackets are nested too deeply"
    except ValueError as error:  # of json, of the system's limit for digits, or of `_once`
        problem = str(error)
    raise ValueError(f"--config {path}: {printable(problem)}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"{name} is given more than once")
        entries[name] = value
    return entries


def shown(value: Any) -> str:
    """Returns a value of a file for a message: short, and without control characters."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a block"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return printable(text if len(text) < 60 else f"{text[:60]}…")


def yaml_text(value: Any) -> str:
    """Writes None, a boolean, a number, a text, or a list of these as YAML on one line, which `read_entries` reads."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()
