"""Has torch's Python side take fake tensors on a CUDA device as it takes real ones."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.cuda.amp import common
from torch.utils import _foreach_utils

DEVICE = torch.device("cuda", 0)

# Operators that torch has for real devices only. They work in place, so a fake tensor stays as it is.
LACKING: dict[str, Callable[..., Any]] = {
    "_fused_sgd_": lambda *arguments, **options: None,
    "_amp_foreach_non_finite_check_and_unscale_": lambda gradients, found_inf, inverse_scale: None,
    "_amp_update_scale_": lambda scale, *arguments: scale,
}
_library = torch.library.Library("aten", "IMPL", "Meta")  # the operators last as long as this


class FakeCUDA(FakeTensorMode):
    """Tensors made under this mode have no data, wherever they are."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeCUDA":
        return self  # tensors refer to their mode, and the copies that the average takes have to be of the same one


def pretend() -> None:
    """Changes torch, for good: call it once, in a process of its own whose guard has been loaded."""
    for name, operator in LACKING.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
            _library.impl(name, operator)
    nn.Module._apply = _apply  # type: ignore[method-assign]
    common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    _foreach_utils._foreach_supported_types.append(FakeTensor)  # else gradients are clipped one by one
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copy.deepcopy asks whether there is one


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Moves a network that has no gradients yet. torch's own swaps tensors, which is refused where a mode remembers them."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            moved = function(parameter.detach())
            module._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module
