"""How augmentations are written on a command line: `rotate`, `random-erasing:area=0.1..0.2,probability=1`.

`--data.augment` takes a list of them.
"""

import dataclasses
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from pipelines.augment import Augmentation


def augmentation_classes() -> dict[str, type[Augmentation]]:
    """All that can be listed, by name, sorted."""
    found, waiting = {}, [Augmentation]
    while waiting:
        for subclass in waiting.pop().__subclasses__():
            found[subclass.name] = subclass
            waiting.append(subclass)
    return dict(sorted(found.items()))


def parse_augmentation(text: str) -> Augmentation:
    """One entry of the list.

    Raises:
        ValueError: There is no such augmentation or parameter, or the value does not fit; says what there is.
    """
    name, _, parameters = text.partition(":")
    classes = augmentation_classes()
    if name not in classes:
        raise ValueError(f"there is no augmentation {name!r}; there are {', '.join(classes)}")
    defaults = _parameters(classes[name])
    values = {}
    for assignment in parameters.split(",") if parameters else []:
        parameter, _, value = assignment.partition("=")
        if parameter not in defaults:
            there_are = ", ".join(f"{known}={_written(default)}" for known, default in defaults.items())
            raise ValueError(f"{name} has no parameter {parameter!r}; {f'it has {there_are}' if there_are else 'it has none'}")
        values[parameter] = _converted(value, get_type_hints(classes[name])[parameter], f"{name}:{assignment}")
    return classes[name](**values)


def write_augmentation(augmentation: Augmentation) -> str:
    """What `parse_augmentation` makes the same augmentation of."""
    defaults = _parameters(type(augmentation))
    values = {name: getattr(augmentation, name) for name in defaults}
    parameters = [f"{name}={_written(value)}" for name, value in values.items() if value != defaults[name]]
    return augmentation.name + (":" if parameters else "") + ",".join(parameters)


def _parameters(augmentation: type[Augmentation]) -> dict[str, Any]:
    """Names and defaults."""
    return {field.name: field.default for field in dataclasses.fields(augmentation) if field.init}


def _written(value: Any) -> str:
    return "..".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def _converted(text: str, kind: Any, place: str) -> Any:
    """A number or text, or several with two dots between them."""
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


# One specification for the whole list: for a list of specified entries, tyro replaces the error of an entry by one of its own.
AugmentationList = Annotated[
    tuple[Augmentation, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{{{','.join(augmentation_classes())}}}[:PARAMETER=VALUE,...] ...]",
        instance_from_str=lambda words: tuple(parse_augmentation(word) for word in words),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(entry, Augmentation) for entry in value),
        str_from_instance=lambda augmentations: [write_augmentation(augmentation) for augmentation in augmentations],
    ),
]
