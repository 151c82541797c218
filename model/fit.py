"""Compares the tensors of a file with those that a network, or a training job, needs, and loads them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NAMED = 8  # misfits that an error lists


def misfits(state: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> list[str]:
    """Describes what keeps a state dict from being loaded: tensors that are missing, unknown, or of another kind.

    Args:
        state: The state dict of a file.
        wanted: The state dict of the network. Its tensors may be on "meta".
    """
    return [
        *(f"{name} is missing" for name in wanted if name not in state),
        *(f"{ascii(name)[1:-1]} is not one of the network's" for name in state if name not in wanted),
        *(f"{name} is {why}" for name in wanted if name in state and (why := misfit(state[name], wanted[name]))),
    ]


def misfit(value: Any, wanted: Tensor) -> str:
    """Describes how a value differs from the tensor that is needed, in kind and in shape; empty if it fits."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} instead of a tensor"
    if value.shape != wanted.shape:
        return f"{_shape(value)} instead of {_shape(wanted)}"
    if not is_dense(value):
        return "a tensor that lacks the memory of its values"
    kind, needed = _kind(value), _kind(wanted)
    return "" if kind == needed else f"a tensor of {kind} instead of {needed}"


def is_dense(value: Tensor) -> bool:
    """Returns whether a tensor has memory for each of its values. A few bytes can claim to be any number of values."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def listed(problems: list[str]) -> str:
    """Joins the first problems, and says how many more there are."""
    return "; ".join(problems[:NAMED]) + (f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else "")


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Loads tensors by name into a network; the others stay. `assign` takes the tensors themselves instead of their values.

    A state dict of the network itself also has the versions of its layers, for which torchvision's MNASNet asks.
    """
    state = network.state_dict()
    state.update(tensors)
    network.load_state_dict(state, assign=assign)


def difference(own: Any, saved: Any, place: str) -> str:
    """Describes the first difference in form between a job's own state and a saved one: keys, types, shapes, dtypes,
    and whole numbers that are too small.

    A missing switch (a bool or None) is no difference: other versions of torch have others.

    Args:
        own: State dict of the job, which knows the right form.
        saved: State dict of a checkpoint.
        place: Name of the state in the message, with a dot at its end; "" for the whole.
    """
    name = place.rstrip(".")
    if isinstance(own, dict):
        if not isinstance(saved, dict):
            return f"{name} is a {type(saved).__name__} instead of a dict"
        missing = [key for key, value in own.items() if key not in saved and not isinstance(value, bool | None)]
        if missing:
            return f"{place}{missing[0]} is missing"
        pairs = [(f"{place}{key}.", value, saved[key]) for key, value in own.items() if key in saved]
    elif isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            return f"{name} is not a list of {len(own)}"
        pairs = [(f"{place}{i}.", *pair) for i, pair in enumerate(zip(own, saved, strict=True))]
    elif isinstance(own, Tensor):
        same = misfit(saved, own) or ("" if saved.dtype == own.dtype else f"{saved.dtype} instead of {own.dtype}")
        return same and f"{name} is {same}"
    elif isinstance(own, bool | int | float | str):
        # A whole number is a float as well, but a bool is no number.
        types = (int, float) if type(own) is float else (type(own),)
        if type(saved) not in types:
            return f"{name} is a {type(saved).__name__} instead of a {type(own).__name__}"
        return f"{name} is {saved}" if type(own) is int and saved < min(own, 1) else ""  # counts, and lengths from 1
    else:
        return ""
    return next((text for key, mine, other in pairs if (text := difference(mine, other, key))), "")


def _kind(value: Tensor) -> str:
    return "floats" if value.is_floating_point() else "complex numbers" if value.is_complex() else "integers"


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a single number"
