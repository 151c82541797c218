"""Reads and writes augmentations as `--data.augment` lists them: `rotate`, `random-erasing:area=0.1..0.2,probability=1`."""

import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

from pipelines.augment import AUGMENTATIONS, Augmentation


def parse_augmentation(text: str) -> Augmentation:
    """Reads one entry of the list.

    Raises:
        ValueError: The augmentation or parameter does not exist, or the value is invalid. Lists the valid ones.
    """
    name, _, parameters = text.partition(":")
    kind = AUGMENTATIONS.get(name)
    if kind is None:
        raise ValueError(f"there is no augmentation {name!r}; there are {', '.join(sorted(AUGMENTATIONS))}")
    defaults, types, values = _parameters(kind), get_type_hints(kind), {}
    for assignment in parameters.split(",") if parameters else []:
        parameter, _, value = assignment.partition("=")
        if parameter not in defaults:
            there_are = ", ".join(f"{known}={_written(default)}" for known, default in defaults.items())
            raise ValueError(f"{name} has no parameter {parameter!r}; {f'it has {there_are}' if there_are else 'it has none'}")
        if parameter in values:
            raise ValueError(f"{name}:{parameters}: {parameter} is given more than once")
        values[parameter] = _converted(value, types[parameter], f"{name}:{assignment}")
    return kind(**values)


def write_augmentation(augmentation: Augmentation) -> str:
    """Writes an augmentation so that `parse_augmentation` restores it."""
    defaults = _parameters(type(augmentation))
    values = {name: getattr(augmentation, name) for name in defaults}
    parameters = [f"{name}={_written(value)}" for name, value in values.items() if value != defaults[name]]
    return augmentation.name + (":" if parameters else "") + ",".join(parameters)


def _parameters(augmentation: type[Augmentation]) -> dict[str, Any]:
    """Returns the names and defaults of the parameters."""
    return {field.name: field.default for field in dataclasses.fields(augmentation) if field.init}


def _written(value: Any) -> str:
    return "..".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def _converted(text: str, kind: Any, place: str) -> Any:
    """Reads a number or text, or a pair of them with two dots between."""
    if get_origin(kind) is tuple:
        kinds, parts = get_args(kind), text.split("..")
        if len(kinds) != len(parts):
            raise ValueError(f"{place}: {len(kinds)} values are needed, as in 0.1..0.2")
        return tuple(_converted(part, kind, place) for part, kind in zip(parts, kinds, strict=True))
    assert kind in (int, float, str), f"{place}: a {kind} cannot be written on a command line"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{place}: {'an integer' if kind is int else 'a number'} is needed, not {text!r}") from None
