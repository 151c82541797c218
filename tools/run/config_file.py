"""Settings from the file of `--config` (YAML, or the config.json of a run), and all settings as YAML for `--write-config`."""

import ast
import copy
import dataclasses
import inspect
import itertools
import os
import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pipelines.augment import Augmentation
from pipelines.files import replace_text
from pipelines.location import expand_location
from pipelines.notation import parse_augmentation, write_augmentation
from pipelines.printable import printable
from tools.parse import hint
from tools.run.config import Config
from tools.run.settings_text import read_entries, shown, yaml_text

Settings = TypeVar("Settings")

# In config.json: what the run found out, its folder, how it was started.
OF_ONE_RUN = ("transform_input", "classes", "class_weights", "run_dir", "resume")
TOP = """\
# All settings of train.py. Read them with --config FILE. Flags override them, and settings that are left out have the
# values of the recipe, or else their defaults. Paths are relative to the folder in which train.py is started.
"""


def read_settings(path: Path, base: Config) -> Config:
    """Returns settings with those of a file instead, whose names and types are checked.

    Values are not checked, because flags may still replace them: a new `Config` checks them.

    Args:
        path: A YAML file, or a JSON file (`.json`). From the config.json of a run, what belongs to that run alone is left out.
        base: Settings that the file overrides.

    Raises:
        ValueError: The file cannot be read, a name is unknown, or a value has the wrong type.
    """
    entries = read_entries(path)
    if path.suffix == ".json" and "transform_input" in entries:  # a run has written it
        entries = {name: value for name, value in entries.items() if name not in OF_ONE_RUN}
    try:
        return _overridden(base, entries)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None


def write_settings(path: Path, config: Config) -> None:
    """Writes all settings as a new YAML file, with the help of each as a comment.

    Raises:
        ValueError: The file exists, or its folder does not.
        OSError: The file cannot be written.
    """
    if os.path.lexists(path):
        raise ValueError(f"--write-config {path}: this file exists; name another one, or remove it")
    if not path.parent.is_dir():
        raise ValueError(f"--write-config {path}: there is no folder {path.parent}")
    replace_text(path, TOP + _block(config))


def _overridden(base: Settings, entries: Any, prefix: str = "") -> Settings:
    if entries is None:  # all lines of a block are comments
        return base
    if not isinstance(entries, dict):
        raise _wrong(prefix[:-1], "a block of settings (NAME: VALUE)", entries)
    changed, kinds = copy.copy(base), get_type_hints(type(base))  # a copy is not checked
    for name, value in entries.items():
        key = prefix + name
        if name not in kinds:
            raise _unknown(key, _names(Config()))
        vars(changed)[name] = _converted(value, kinds[name], key, getattr(base, name))
    return changed


def _names(settings: Any, prefix: str = "") -> list[str]:
    """Returns the names of all settings and of their blocks, with dots."""
    names = []
    for name, value in vars(settings).items():
        names += [prefix + name, *(_names(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else ())]
    return names


def _unknown(key: str, known: list[str]) -> ValueError:
    if key in known:
        lines = ", and indented below it ".join(f"{part}:" for part in key.split("."))
        return ValueError(f"{key}: names have no dots; write {lines}")
    return ValueError(f"{printable(key[:60])}: there is no such setting{hint(key[:60], known)}")


def _wrong(key: str, needed: str, value: Any) -> ValueError:
    return ValueError(f"{key}: {needed} is needed, not {shown(value)}")


def _converted(value: Any, kind: Any, key: str, before: Any = None) -> Any:
    """Returns a value of a file as the type of a setting."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        [other] = [part for part in parts if part is not NoneType]
        return None if value is None else _converted(value, other, key)
    if origin is Literal:
        if value not in parts:
            raise _wrong(key, f"one of {', '.join(parts)}", value)
        return value
    if origin is tuple:
        number = None if parts[-1] is ... else len(parts)
        if not isinstance(value, list) or number not in (None, len(value)):
            raise _wrong(key, "a list" if number is None else f"a list of {number}", value)
        return tuple(_converted(one, parts[0], f"{key}[{at}]") for at, one in enumerate(value))
    if kind is Augmentation:
        return _augmentation(value, key)
    if dataclasses.is_dataclass(kind):
        return _overridden(before, value, f"{key}.")
    return _scalar(value, kind, key)


def _augmentation(value: Any, key: str) -> Augmentation:
    """Reads an augmentation in the notation of the command line, or as config.json has it: its name and its parameters."""
    if isinstance(value, dict) and "name" in value:
        texts = {name: "..".join(map(str, one)) if isinstance(one, list) else one for name, one in value.items()}
        value = f"{texts.pop('name')}:{','.join(f'{name}={text}' for name, text in texts.items())}"
    text = _scalar(value, str, key)
    try:
        return parse_augmentation(text)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _scalar(value: Any, kind: Any, key: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        if not isinstance(value, bool):
            raise _wrong(key, "true or false", value)
    elif kind is int:
        if not is_number or isinstance(value, float):
            raise _wrong(key, "an integer", value)
    elif kind is float:
        try:
            return float(value) if is_number else float("")
        except (OverflowError, ValueError):
            raise _wrong(key, "a number", value) from None
    else:
        assert kind in (str, Path), f"{key}: a file cannot hold a {kind}"
        if not isinstance(value, str) or "\0" in value or (kind is Path and not value):
            raise _wrong(key, "text" if kind is str else "a path", value)
        try:
            return kind(expand_location(value))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return value


def _block(settings: Any, indent: str = "") -> str:
    """Returns settings as YAML, with the help of each above it."""
    helps, kinds, text = _helps(type(settings)), get_type_hints(type(settings)), ""
    for name in (field.name for field in dataclasses.fields(settings)):
        value, choices = getattr(settings, name), _choices(kinds[name])
        about = helps.get(name) or inspect.getdoc(type(value)) or ""
        about += f" One of: {', '.join(choices)}." if choices else ""
        start = f"{indent}# "
        comment = textwrap.fill(about, 120, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)
        is_scalar = not dataclasses.is_dataclass(value)
        written = f" {yaml_text(_plain(value))}\n" if is_scalar else f"\n{_block(value, indent + '  ')}"
        text += f"\n{comment}\n{indent}{name}:{written}"
    return text


def _helps(kind: type) -> dict[str, str]:
    """Returns the text below each field in the source of a class and of its bases, which is the help of the flag."""
    helps = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for field, text in itertools.pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                helps[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return helps


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [*get_args(kind)]
    return [choice for part in get_args(kind) for choice in _choices(part)]


def _plain(value: Any) -> Any:
    """Returns a setting as `_converted` reads it."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Augmentation):
        return write_augmentation(value)
    if isinstance(value, Path):  # a name such as ~ would be another folder
        return str(value) if expand_location(str(value)) == str(value) else f"./{value}"
    return value
