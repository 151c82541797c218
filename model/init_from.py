"""Initial weights from a file, for fine-tuning."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint import load_checkpoint
from model.ema import averaged_weights

log = logging.getLogger("train")

AUXILIARY = ("aux1", "aux2")
LAST_LAYERS = ("fc", "aux1.fc2", "aux2.fc2")
NAMED = 8  # tensors that an error lists


@dataclass(frozen=True)
class InitialWeights:
    """Initial weights: the average of a checkpoint, or a bare state dict as torchvision publishes it.

    Attributes:
        path: The file.
        state: State dict.
        classes: Class names by number, if they are known.
        transform_input: Whether the network must scale its input, see `GoogLeNet`.
        is_partial: Whether tensors that do not fit are skipped instead of refused.
    """

    path: Path
    state: dict[str, Tensor]
    classes: tuple[str, ...] | None
    transform_input: bool
    is_partial: bool

    def __call__(self, model: nn.Module, classes: tuple[str, ...] | None) -> None:
        """Loads the weights into a model.

        If the classes differ in number or name, the last layers keep their random weights. Auxiliary heads that only one side
        has are ignored.

        Args:
            model: The network.
            classes: Names of its classes, if they are known.

        Raises:
            ValueError: Other tensors do not match, and `is_partial` is not set.
        """
        wanted = model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        are_renamed = self.classes is not None and classes is not None and self.classes != classes
        others = {
            layer: (shapes[f"{layer}.weight"][0], wanted[f"{layer}.weight"].shape[0])
            for layer in LAST_LAYERS
            if _are_for_classes(shapes, wanted, layer)
            and (are_renamed or shapes[f"{layer}.weight"] != tuple(wanted[f"{layer}.weight"].shape))
        }
        other_head = {f"{layer}.{kind}" for layer in others for kind in ("weight", "bias")}
        one_sided = {head for head in AUXILIARY if _has(shapes, head) != _has(wanted, head)}
        auxiliary = {name for name in {*wanted, *shapes} if name.split(".")[0] in one_sided}
        mismatches = [
            *(f"{name} is missing" for name in wanted if name not in shapes and name not in auxiliary),
            *(f"{name} is not one of the network's" for name in shapes if name not in wanted and name not in auxiliary),
            *(
                f"{name} is {'x'.join(map(str, shapes[name]))} instead of {'x'.join(map(str, wanted[name].shape))}"
                for name in wanted
                if name in shapes and name not in other_head and shapes[name] != tuple(wanted[name].shape)
            ),
        ]
        listed = "; ".join(mismatches[:NAMED]) + (f"; and {len(mismatches) - NAMED} more" if len(mismatches) > NAMED else "")
        if mismatches and not self.is_partial:
            raise ValueError(f"--init-from {self.path} does not fit: {listed}; --init-from-partial loads what fits")
        taken = {
            name: tensor
            for name, tensor in self.state.items()
            if name in wanted and name not in other_head and shapes[name] == tuple(wanted[name].shape)
        }
        if not taken:
            raise ValueError(f"--init-from {self.path}: nothing in it fits the network")
        model.load_state_dict(taken, strict=False)
        log.info("loaded %d of %d tensors from %s", len(taken), len(wanted), self.path)
        if mismatches:
            log.warning("not loaded from %s: %s", self.path, listed)
        for before, now in {*others.values()}:
            why = f"the file has {before} classes, and the data {now}" if before != now else "the classes have other names"
            log.info("%s: the last layers are reset: %s", why, ", ".join(others))
        if missing := [head for head in AUXILIARY if head in one_sided and _has(wanted, head)]:
            log.info("the file lacks auxiliary heads; they are reset: %s", ", ".join(missing))


def _are_for_classes(shapes: dict[str, tuple[int, ...]], wanted: dict[str, Tensor], layer: str) -> bool:
    """Returns whether both sides have this linear layer with the same input size."""
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    if not {weight, bias} <= {*shapes} & {*wanted} or len(shapes[weight]) != 2:
        return False
    classes, width = shapes[weight]
    return width == wanted[weight].shape[1] and shapes[bias] == (classes,)


def _has(names: Iterable[str], head: str) -> bool:
    return any(name.startswith(f"{head}.") for name in names)


def read_initial_weights(path: Path | None, *, is_partial: bool) -> InitialWeights | None:
    """Reads the file of `--init-from`, if any.

    Raises:
        ValueError: The file holds no weights.
    """
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"--init-from {path}: no such file")
    content = _read(path)
    if "ema" in content and "architecture" in content:
        classes = None if content["classes"] is None else tuple(content["classes"])
        transform_input = content["architecture"]["transform_input"]
        return InitialWeights(path, averaged_weights(content["ema"]), classes, transform_input, is_partial)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        raise ValueError(f"--init-from {path}: neither a checkpoint of train.py nor a state dict of tensors")
    # torchvision ported its weights from TensorFlow, where inputs lie between -1 and 1. Its `googlenet(weights=...)` sets this.
    return InitialWeights(path, content, None, True, is_partial)


def _read(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, or a state dict in torch's older format, which has no checksums."""
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        return load_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        what, *_ = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"--init-from {path}: cannot be read ({what})") from error
    if not isinstance(content, dict):
        raise ValueError(f"--init-from {path}: holds a {type(content).__name__} instead of a state dict")
    return content
