"""Notes which operations a program makes, and for which of them the host would wait for the device.

torch tags the operations whose result has a shape or a value that depends on the data. The others that make the host wait were
looked up in torch 2.11: they are the functions of `libtorch_cuda.so` that call `cudaStreamSynchronize`, and the functions of
`libtorch_cuda.so` and `libtorch_cpu.so` that call `Tensor::item`.
"""

import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[3]

# Operations for which the host may wait, beside those with a tag. Overloads, which have the same name, are told apart below.
COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
FILLING = {"masked_fill", "masked_fill_", "index_fill", "index_fill_"}
READING = {"is_nonzero", "mode", "linspace", "logspace", "_linalg_check_errors"}


class Watch(TorchDispatchMode):
    """Notes what the operations made under it would do on a device.

    Attributes:
        waits: Each operation for which the host would wait for the device, with the reason and the place.
        mismatches: Each operation on lists of tensors that differ in layout: a fused optimizer refuses them, and other
            operations then launch a kernel for each tensor.
        launches: How often each operation was made that launches a kernel, or several.
        is_on: Whether anything is noted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.mismatches: list[str] = []
        self.launches = Counter[str]()
        self.is_on = True

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if self.is_on and function.namespace == "aten":
            self._note(function, arguments, options)  # first, as a fake tensor has no value to give out
        return function(*arguments, **options)

    def _note(self, function: OpOverload, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        name = function.overloadpacket.__name__
        given = {argument.name: value for argument, value in zip(function._schema.arguments, arguments, strict=False)}
        given |= options
        if reason := why_wait(name, function, given):
            self.waits.append(f"{name}: {reason}{_place()}")
        if name.startswith(("_foreach_", "_fused_")):
            self.mismatches += [f"{name}: {mismatch}" for mismatch in find_mismatches(given)]
        if is_launch(name, function, given):
            self.launches[name] += 1

    def report(self) -> dict[str, Any]:
        """Everything that was noted, ready for JSON."""
        return {"waits": self.waits, "mismatches": self.mismatches, "launches": dict(self.launches.most_common())}


def why_wait(name: str, function: OpOverload, given: Mapping[str, Any]) -> str | None:
    """Why the host would wait for the device, if it would.

    Args:
        name: The operation's name, which all its overloads share.
        function: The operation itself, which has tags.
        given: Its arguments by their names.
    """
    tensors = _tensors(given)
    if name in COPIES:
        return None if given.get("non_blocking") else _describe_copy(name, given)
    if not any(tensor.is_cuda for tensor in tensors):
        return None
    if name in INDEXING:
        return _describe_indexing(given)
    if torch.Tag.data_dependent_output in function.tags or name in READING:
        return "a value is read"
    if torch.Tag.dynamic_output_shape in function.tags and given.get("output_size") is None:
        return "the size of the result is read"
    if name in FILLING and isinstance(given.get("value"), Tensor) and given["value"].is_cuda:
        return "the value to fill in is read"
    if name == "where" and not all(tensor.is_cuda for tensor in tensors):
        return "a number is copied from cpu to cuda"
    return None


def _describe_copy(name: str, given: Mapping[str, Any]) -> str | None:
    if name == "_to_copy":
        source = given["self"].device.type
        moves = [(source, torch.device(given.get("device") or source).type)]
    else:
        targets, sources = ([side] if isinstance(side, Tensor) else side for side in (given["self"], given["src"]))
        moves = [(source.device.type, target.device.type) for source, target in zip(sources, targets, strict=True)]
    return next((f"copy from {source} to {target}" for source, target in moves if source != target), None)


def _describe_indexing(given: Mapping[str, Any]) -> str | None:
    """Why the host would wait for an operation that takes indices: see ATen/native/IndexingUtils.h.

    The host has to read how many elements a mask on the device selects, unless a single number is to be filled in. It turns a
    mask of its own into indices, which go to the device through pinned memory, but it waits until its own indices are copied.
    """
    value = given.get("values")
    fills = value is not None and value.numel() == 1 and not value.is_cuda
    for index in given["indices"]:
        if index is None:
            continue
        if index.dtype not in (torch.bool, torch.uint8):
            if not index.is_cuda:
                return "indices are copied from cpu to cuda"
        elif index.is_cuda and not fills:
            return "the number of elements in a mask is read"
    return None


def find_mismatches(given: Mapping[str, Any]) -> list[str]:
    """Corresponding tensors in lists that differ, as torch compares them (ATen/native/ForeachUtils.h)."""
    lists = [value for value in given.values() if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)]
    found = []
    for first, *others in zip(*lists, strict=True):
        found += [f"{_describe(first)} and {_describe(other)}" for other in others if _layout(first) != _layout(other)]
    return found


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """What has to be the same; a stride means nothing where the size is 1."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    return tensor.device, tensor.dtype, tensor.shape, strides


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"


def is_launch(name: str, function: OpOverload, given: Mapping[str, Any]) -> bool:
    """Whether an operation has the device do something: it is on the device, and more than another view or an allocation."""
    if function.is_view or torch.Tag.inplace_view in function.tags or name == "_unsafe_view" or "empty" in name:
        return False
    device = given.get("device")
    return any(tensor.is_cuda for tensor in _tensors(given)) or (device is not None and torch.device(device).type == "cuda")


def _tensors(given: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def _place() -> str:
    """The line of the project that has made the operation; the backward pass is in a thread of its own, which has none."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path.parent != Path(__file__).parent:
            return f" ({path.relative_to(ROOT)}:{frame.lineno})"
    return ""
