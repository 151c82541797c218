"""Initial weights from a file: fine-tuning."""

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
NAMED = 8  # how many names an error lists


@dataclass(frozen=True)
class InitialWeights:
    """Weights to begin with: a checkpoint's average, or a bare state dict such as torchvision publishes.

    Attributes:
        path: The file.
        state: Names and tensors.
        classes: Class names by number, where they are known.
        transform_input: Whether they expect the network to scale its input, see `GoogLeNet`.
        is_partial: Take what fits and leave the rest, in place of refusing it.
    """

    path: Path
    state: dict[str, Tensor]
    classes: tuple[str, ...] | None
    transform_input: bool
    is_partial: bool

    def __call__(self, model: nn.Module, classes: tuple[str, ...] | None) -> None:
        """Sets a model's weights.

        The last layers for other classes, in number or by name, begin anew; auxiliary heads that only one side has are let be.

        Args:
            model: The network.
            classes: Names of the classes that it is to tell apart, where they are known.

        Raises:
            ValueError: Other tensors do not match, and `is_partial` is not set; lists them.
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
                f"{name} is {'x'.join(map(str, shapes[name]))} in place of {'x'.join(map(str, wanted[name].shape))}"
                for name in wanted
                if name in shapes and name not in other_head and shapes[name] != tuple(wanted[name].shape)
            ),
        ]
        listed = "; ".join(mismatches[:NAMED]) + (f"; and {len(mismatches) - NAMED} more" if len(mismatches) > NAMED else "")
        if mismatches and not self.is_partial:
            raise ValueError(f"--init-from {self.path} does not fit: {listed}; --init-from-partial takes what does")
        taken = {
            name: tensor
            for name, tensor in self.state.items()
            if name in wanted and name not in other_head and shapes[name] == tuple(wanted[name].shape)
        }
        if not taken:
            raise ValueError(f"--init-from {self.path}: nothing in it fits the network")
        model.load_state_dict(taken, strict=False)
        log.info("%d of %d tensors are from %s", len(taken), len(wanted), self.path)
        if mismatches:
            log.warning("not taken from %s: %s", self.path, listed)
        for before, now in {*others.values()}:
            why = (
                f"it has {before} classes and these data {now}" if before != now else "its classes are not those of these data"
            )
            log.info("%s: the last layers begin anew (%s)", why, ", ".join(others))
        if missing := [head for head in AUXILIARY if head in one_sided and _has(wanted, head)]:
            log.info("auxiliary heads that it has not begin anew: %s", ", ".join(missing))


def _are_for_classes(shapes: dict[str, tuple[int, ...]], wanted: dict[str, Tensor], layer: str) -> bool:
    """Whether both have the linear layer, the same but perhaps for the length of what it gives."""
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    if not {weight, bias} <= {*shapes} & {*wanted} or len(shapes[weight]) != 2:
        return False
    classes, width = shapes[weight]
    return width == wanted[weight].shape[1] and shapes[bias] == (classes,)


def _has(names: Iterable[str], head: str) -> bool:
    return any(name.startswith(f"{head}.") for name in names)


def read_initial_weights(path: Path, *, is_partial: bool) -> InitialWeights:
    """Reads the file of `--init-from`.

    Raises:
        ValueError: It holds no weights.
    """
    if not path.is_file():
        raise ValueError(f"--init-from {path}: no such file")
    content = _read(path)
    if "ema" in content and "architecture" in content:
        classes = None if content["classes"] is None else tuple(content["classes"])
        transform_input = content["architecture"]["transform_input"]
        return InitialWeights(path, averaged_weights(content["ema"]), classes, transform_input, is_partial)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        raise ValueError(f"--init-from {path}: neither a checkpoint of train.py nor a state dict of tensors")
    # torchvision's weights were ported from TensorFlow, whose input lies between -1 and 1: `googlenet(weights=...)` sets this.
    return InitialWeights(path, content, None, True, is_partial)


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint, or a state dict in the older of torch's formats, which has no checksums."""
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
        raise ValueError(f"--init-from {path}: holds a {type(content).__name__} in place of a state dict")
    return content
