"""Augmentations on command lines, for tyro. The settings themselves need no tyro, which takes time to import."""

from typing import get_args

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from pipelines.augment import AUGMENTATIONS, Augmentation
from pipelines.notation import parse_augmentation, write_augmentation

AUGMENTATION_LISTS = ConstructorRegistry()  # for `registry` of `tyro.cli`


# One rule for the whole list: if each entry had its own, tyro would replace an entry's error message with another.
@AUGMENTATION_LISTS.primitive_rule
def _augmentation_list(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[tuple[Augmentation, ...]] | None:
    if info.type_origin is not tuple:
        return None
    kinds = {*get_args(info.type)} - {Ellipsis}  # tyro may narrow them to those of the default
    if not kinds or not all(isinstance(kind, type) and issubclass(kind, Augmentation) for kind in kinds):
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{{{','.join(sorted(AUGMENTATIONS))}}}[:PARAMETER=VALUE,...] ...]",
        instance_from_str=lambda words: tuple(parse_augmentation(word) for word in words),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(entry, Augmentation) for entry in value),
        str_from_instance=lambda augmentations: [write_augmentation(augmentation) for augmentation in augmentations],
    )
