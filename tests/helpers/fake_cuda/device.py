"""Makes torch's Python code treat fake tensors on a CUDA device like real ones."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.cuda.amp import common
from torch.utils import _foreach_utils

DEVICE = torch.device("cuda", 0)

# torch has these operators for real devices only. They work in place, so a fake tensor does not change.
LACKING: dict[str, Callable[..., Any]] = {
    "_fused_sgd_": lambda *arguments, **options: None,
    "_amp_foreach_non_finite_check_and_unscale_": lambda gradients, found_inf, inverse_scale: None,
    "_amp_update_scale_": lambda scale, *arguments: scale,
}
_library = torch.library.Library("aten", "IMPL", "Meta")  # the operators live as long as this object


class FakeCUDA(FakeTensorMode):
    """Creates tensors without data on every device."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeCUDA":
        return self  # tensors refer to their mode, and the copies of the average need the same one


def pretend() -> None:
    """Patches torch. Call it once, in a separate process that has loaded the guard."""
    for name, operator in LACKING.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
            _library.impl(name, operator)
    nn.Module._apply = _apply  # type: ignore[method-assign]
    nn.init.trunc_normal_ = lambda tensor, **options: tensor  # torch's own reads the values that it draws
    common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    _foreach_utils._foreach_supported_types.append(FakeTensor)  # otherwise gradients are clipped one by one
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copy.deepcopy asks whether there is one


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Moves a network without gradients. torch's own method swaps tensors, which fails for tensors that a mode remembers."""
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
