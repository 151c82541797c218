"""Records the operations of a program, and those that would make the host wait for the device.

torch tags operations whose result has a shape or a value that depends on the data. The list of other waiting operations is from
torch 2.11: functions of `libtorch_cuda.so` that call `cudaStreamSynchronize`, and functions of `libtorch_cuda.so` and
`libtorch_cpu.so` that call `Tensor::item`.
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

# Untagged operations that may make the host wait. Overloads share a name; the functions below tell them apart.
COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
FILLING = {"masked_fill", "masked_fill_", "index_fill", "index_fill_"}
READING = {"is_nonzero", "mode", "linspace", "logspace", "_linalg_check_errors"}


class Watch(TorchDispatchMode):
    """Records what operations would do on a device.

    Attributes:
        waits: Operations that would make the host wait, each with the reason and the line.
        mismatches: Operations on lists of tensors whose layouts differ. A fused optimizer refuses them, and other operations
            launch a kernel for each tensor.
        launches: Number of calls of each operation that launches at least one kernel.
        is_on: Whether to record.
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
            self._note(function, arguments, options)  # first: a fake tensor may raise for want of values
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
        """Returns all records as JSON values."""
        return {"waits": self.waits, "mismatches": self.mismatches, "launches": dict(self.launches.most_common())}


def why_wait(name: str, function: OpOverload, given: Mapping[str, Any]) -> str | None:
    """Returns why the host would wait for the device, if it would.

    Args:
        name: Name of the operation, without the overload.
        function: The operation.
        given: Its arguments by name.
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
    """Returns why the host would wait for an operation that takes indices, if it would; see ATen/native/IndexingUtils.h.

    The host must read how many elements a mask on the device selects, unless the operation fills in a single number. A mask on
    the host becomes indices, which are copied through pinned memory. Indices on the host are copied with a wait.
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
    """Compares corresponding tensors of lists like torch (ATen/native/ForeachUtils.h), and describes those that differ."""
    lists = [value for value in given.values() if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)]
    found = []
    for first, *others in zip(*lists, strict=True):
        found += [f"{_describe(first)} and {_describe(other)}" for other in others if _layout(first) != _layout(other)]
    return found


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Returns what must be the same. The stride of a dimension of size 1 has no meaning."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    return tensor.device, tensor.dtype, tensor.shape, strides


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"


def is_launch(name: str, function: OpOverload, given: Mapping[str, Any]) -> bool:
    """Returns whether an operation launches a kernel: it is on the device, and neither a view nor an allocation."""
    if function.is_view or torch.Tag.inplace_view in function.tags or name == "_unsafe_view" or "empty" in name:
        return False
    device = given.get("device")
    return any(tensor.is_cuda for tensor in _tensors(given)) or (device is not None and torch.device(device).type == "cuda")


def _tensors(given: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def _place() -> str:
    """Returns the line of the project that called the operation. The backward pass has a separate thread without any."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path.parent != Path(__file__).parent:
            return f" ({path.relative_to(ROOT)}:{frame.lineno})"
    return ""
