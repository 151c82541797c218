"""Loads a trained network from a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from model.checkpoint import load_checkpoint
from model.ema import averaged_weights
from model.googlenet import GoogLeNet

Weights = Literal["ema", "raw"]

NEEDED = ("model", "ema", "classes", "epoch", "step", "architecture", "preprocessing")
WAY_OUT = "name a best.pt or last.pt that train.py wrote"


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
class TrainedModel:
    """A trained network and its description.

    Attributes:
        path: The checkpoint.
        weights: "ema" for the averaged weights, "raw" for those of the last step.
        model: The network in eval mode.
        num_classes: Length of its logits.
        classes: Class names by number, or `None` if the training data had none.
        preprocessing: How images become its input.
        epoch: Epoch of the checkpoint, from 1.
        step: Optimizer steps before the checkpoint.
    """

    path: Path
    weights: Weights
    model: GoogLeNet
    num_classes: int
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing
    epoch: int
    step: int

    def class_name(self, number: int) -> str | None:
        """Returns the name of a class, if it has one."""
        return self.classes[number] if self.classes and number < len(self.classes) else None


def load_model(path: Path, weights: Weights = "ema", device: torch.device | str = "cpu") -> TrainedModel:
    """Loads the network of a checkpoint.

    Raises:
        ValueError: The file does not exist, is damaged, or is not a checkpoint.
    """
    return _build(path, _read(path), weights, device)


def load_both(path: Path, device: torch.device | str = "cpu") -> tuple[TrainedModel, TrainedModel]:
    """Loads the raw and the averaged network of a checkpoint; otherwise as `load_model`."""
    state = _read(path)
    return _build(path, state, "raw", device), _build(path, state, "ema", device)


def _build(path: Path, state: dict[str, Any], weights: Weights, device: torch.device | str) -> TrainedModel:
    missing = [name for name in NEEDED if name not in state]
    if missing:
        raise ValueError(f"{path}: not a checkpoint of this version of train.py, it lacks {', '.join(missing)}; {WAY_OUT}")
    architecture, preprocessing = state["architecture"], state["preprocessing"]
    try:
        # Parameters on "meta" have no values, so drawing initial ones takes no time and no random numbers.
        with torch.device("meta"):
            model = GoogLeNet(
                architecture["num_classes"],
                aux_logits=architecture["aux_logits"],
                transform_input=architecture["transform_input"],
            )
        tensors = state["model"] if weights == "raw" else averaged_weights(state["ema"])
        model.load_state_dict(tensors, assign=True)
        return TrainedModel(
            path=path,
            weights=weights,
            model=model.to(device).eval(),
            num_classes=architecture["num_classes"],
            classes=None if state["classes"] is None else tuple(state["classes"]),
            preprocessing=Preprocessing(
                preprocessing["image_size"],
                preprocessing["resize_shorter"],
                tuple(preprocessing["mean"]),
                tuple(preprocessing["std"]),
            ),
            epoch=state["epoch"],
            step=state["step"],
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a checkpoint of this version of train.py ({error}); {WAY_OUT}") from error
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its weights are not those of the network that it describes ({what}); {WAY_OUT}") from error


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
