"""Loads a trained network from a checkpoint, after checking everything that the checkpoint says about it."""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.checkpoint import load_checkpoint
from model.config import MAX_IMAGE_SIZE, Arch
from model.ema import averaged_weights
from model.factory import build_other
from model.fit import listed, load_tensors, misfits
from model.googlenet import GoogLeNet

Weights = Literal["ema", "raw"]
WeightsChoice = Literal["auto", "ema", "raw"]

NEEDED = ("model", "ema", "classes", "epoch", "step", "architecture", "preprocessing")
WAY_OUT = "name a best.pt or last.pt that train.py wrote"
MAX_CLASSES = 10_000_000
GOOGLENET = Arch()


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input, in validation and afterwards.

    Attributes:
        image_size: Side of the center crop, in pixels.
        resize_shorter: Length to which the shorter side is resized before the crop, in pixels.
        mean: Mean of the red, green, and blue values in [0, 1]; it is subtracted.
        std: Standard deviation of these values; they are divided by it.
    """

    image_size: int
    resize_shorter: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Description:
    """What a checkpoint says about its network.

    Attributes:
        num_classes: Length of the network's logits.
        arch: Which network it is.
        aux_logits: Whether GoogLeNet has auxiliary heads.
        transform_input: Whether GoogLeNet renormalizes its input.
        classes: Class names by number, or `None` if the training data had none.
        preprocessing: How images become its input.
        epoch: Epoch of the checkpoint, from 1.
        step: Optimizer steps before the checkpoint.
        is_bf16: Whether training computed in bfloat16.
        better: The weights with the higher top-1 in the last validation, the averaged ones if both are equal or unknown.
        why_better: The reason, for the output of commands.
    """

    num_classes: int
    arch: Arch
    aux_logits: bool
    transform_input: bool
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing
    epoch: int
    step: int
    is_bf16: bool
    better: Weights
    why_better: str


@dataclass(frozen=True)
class TrainedModel(Description):
    """A trained network and its description.

    Attributes:
        path: The checkpoint.
        weights: "ema" for the averaged weights, "raw" for those of the last step.
        why: Why these weights, for the output of commands.
        model: The network in eval mode.
    """

    path: Path
    weights: Weights
    why: str
    model: nn.Module

    def class_name(self, number: int) -> str | None:
        """Returns the name of a class, if it has one."""
        return self.classes[number] if self.classes and number < len(self.classes) else None


def load_model(
    path: Path, weights: WeightsChoice = "auto", device: torch.device | str = "cpu", arch: Arch = GOOGLENET
) -> TrainedModel:
    """Loads the network of a checkpoint.

    Args:
        path: The checkpoint.
        weights: "auto" for those that scored better in the last validation before the checkpoint.
        device: Device of the network.
        arch: The network that the user expects. Its code runs, so a checkpoint alone must not choose it.

    Raises:
        ValueError: The file does not exist, is damaged, is not a checkpoint, or is one of another network.
    """
    return _build(path, _read(path), weights, device, arch)


def load_both(path: Path, device: torch.device | str = "cpu", arch: Arch = GOOGLENET) -> tuple[TrainedModel, TrainedModel, str]:
    """Loads the raw and the averaged network of a checkpoint, and says which of them "auto" is; otherwise as `load_model`."""
    state = _read(path)
    weights, why = choose_weights("auto", describe(path, state))
    raw, ema = (_build(path, state, one, device, arch) for one in ("raw", "ema"))
    return raw, ema, f"{weights} ({why})"


def choose_weights(choice: WeightsChoice, described: Description) -> tuple[Weights, str]:
    """Returns the weights to take from a checkpoint, and the reason. `choice` is the user's."""
    return (described.better, described.why_better) if choice == "auto" else (choice, "as --weights says")


def describe(path: Path, state: dict[str, Any], way_out: str = WAY_OUT) -> Description:
    """Reads what a checkpoint says about its network.

    Args:
        path: The checkpoint, for messages.
        state: Its content.
        way_out: End of the messages.

    Raises:
        ValueError: Something is missing, or it cannot be right. The message names the file and the key.
    """
    if missing := [name for name in NEEDED if name not in state]:
        raise ValueError(f"{path}: not a checkpoint of this version of train.py, it lacks {', '.join(missing)}; {way_out}")

    def take(key: str, is_right: Callable[[Any], bool], needed: str) -> Any:
        value = state
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                raise ValueError(f"{path}: not a checkpoint of this version of train.py, it lacks {key}; {way_out}")
            value = value[name]
        if not is_right(value):
            raise ValueError(f"{path}: {key} is {_short(value)} instead of {needed}; {way_out}")
        return value

    count = take("architecture.num_classes", _whole(1, MAX_CLASSES), f"a whole number from 1 to {MAX_CLASSES:,}")
    classes = take("classes", lambda value: value is None or _is_names(value, count), f"a list of up to {count} names")
    size = take("preprocessing.image_size", _whole(32, MAX_IMAGE_SIZE), f"a whole number from 32 to {MAX_IMAGE_SIZE}")
    better, why_better = _better(state.get("scores"))
    is_other = isinstance(state["architecture"], dict) and "factory" in state["architecture"]
    factory = take("architecture.factory", _is_text, "a name") if is_other else ""
    options = take("architecture.options", _is_texts, "a list of arguments") if is_other else ()
    sides = f"a whole number from {size}, the image size, to {2 * MAX_IMAGE_SIZE}"
    return Description(
        num_classes=count,
        arch=Arch(factory, tuple(options)),
        aux_logits=not is_other and take("architecture.aux_logits", _is_bool, "True or False"),
        transform_input=not is_other and take("architecture.transform_input", _is_bool, "True or False"),
        classes=None if classes is None else tuple(classes),
        preprocessing=Preprocessing(
            size,
            take("preprocessing.resize_shorter", _whole(size, 2 * MAX_IMAGE_SIZE), sides),
            tuple(take("preprocessing.mean", _colors(0, 1), "three numbers from 0 to 1")),
            tuple(take("preprocessing.std", _colors(1e-6, 1e6), "three numbers above 0")),
        ),
        epoch=take("epoch", _whole(0, 2**63), "a whole number of at least 0"),
        step=take("step", _whole(0, 2**63), "a whole number of at least 0"),
        is_bf16=state.get("autocast_dtype") == "torch.bfloat16",
        better=better,
        why_better=why_better,
    )


def weights_of(path: Path, state: dict[str, Any], network: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Returns the raw or the averaged weights of a checkpoint as a state dict of its network, see `empty_network`.

    Raises:
        ValueError: They are not the weights of the network that the checkpoint describes.
    """
    tensors = state["model"] if weights == "raw" else state["ema"]
    place = "model" if weights == "raw" else "ema"
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path}: {place} is not a state dict; {WAY_OUT}")
    if weights == "ema":
        tensors = averaged_weights(tensors)
    if problems := misfits(tensors, network.state_dict()):
        raise ValueError(
            f"{path}: its weights are not those of the network that it describes ({place}: {listed(problems)}); {WAY_OUT}"
        )
    return tensors


def require_arch(path: Path, described: Description, arch: Arch, flag: str = "--arch") -> None:
    """Compares the network of a checkpoint with the one that the user names. `flag` names it on the command line.

    Raises:
        ValueError: They differ.
    """
    if described.arch == GOOGLENET and arch != GOOGLENET:
        raise ValueError(f"{path}: its network is GoogLeNet, and {flag} names {arch}; leave out {flag}")
    if described.arch != arch:
        names = "" if arch == GOOGLENET else f", and {flag} names {arch}"
        raise ValueError(
            f"{path}: its network is {described.arch}{names}. Its code is imported only if you name it: "
            f"{described.arch.flags(flag)}"
        )


def _build(path: Path, state: dict[str, Any], choice: WeightsChoice, device: torch.device | str, arch: Arch) -> TrainedModel:
    described = describe(path, state)
    require_arch(path, described, arch)
    weights, why = choose_weights(choice, described)
    model = empty_network(described)
    load_tensors(model, weights_of(path, state, model, weights), assign=True)
    model = model.to(device).float().eval()
    return TrainedModel(**vars(described), path=path, weights=weights, why=why, model=model)


def empty_network(described: Description) -> nn.Module:
    """Builds the network. GoogLeNet's parameters have no values, so drawing them takes no time and no random numbers."""
    if described.arch != GOOGLENET:  # others may have buffers that no state dict contains
        with torch.random.fork_rng(devices=[]):  # it is built on the CPU
            return build_other(described.arch, described.num_classes)
    with torch.device("meta"):
        return GoogLeNet(described.num_classes, aux_logits=described.aux_logits, transform_input=described.transform_input)


def _short(value: Any) -> str:
    try:
        return ascii(reprlib.repr(value))[1:-1][:60]
    except ValueError:  # a number of thousands of digits
        return f"a {type(value).__name__}"


def _better(scores: Any) -> tuple[Weights, str]:
    """Returns the weights with the higher top-1, and how this is known."""
    if not isinstance(scores, dict) or not all(_is_number(scores.get(name)) for name in ("top1", "ema_top1")):
        return "ema", "averaged; the checkpoint has no validation scores to choose by"
    if scores["top1"] == scores["ema_top1"]:
        return "ema", "averaged; on the validation split, the raw ones scored the same"
    return "raw" if scores["top1"] > scores["ema_top1"] else "ema", "the better ones on the validation split"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # neither NaN nor too long for a float


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _is_names(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) <= count and all(isinstance(name, str) for name in value)


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _colors(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list | tuple) and len(value) == 3 and all(_is_number(v) and low <= v <= high for v in value)
    )


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(f"{path}: a folder; {WAY_OUT}, as in {path / 'best.pt'}")
    try:
        return load_checkpoint(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {WAY_OUT}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{error}; {WAY_OUT}") from error
