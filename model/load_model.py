"""A trained network out of a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from model.checkpoint import load_checkpoint
from model.ema import averaged_weights
from model.googlenet import GoogLeNet, googlenet

Weights = Literal["ema", "raw"]

NEEDED = ("model", "ema", "classes", "epoch", "step", "architecture", "preprocessing")
WAY_OUT = "name a best.pt or last.pt that train.py wrote"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input, in training's validation and ever after.

    Attributes:
        image_size: Side of the square that the network sees, pixels.
        resize_shorter: To what the image's shorter side is resized before that square is cut from the centre, pixels.
        mean: Of the channels red, green and blue, values in [0, 1]; subtracted.
        std: The same; divided by.
    """

    image_size: int
    resize_shorter: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Trained:
    """A network that has been trained, and what is to be known about it.

    Attributes:
        path: The checkpoint.
        weights: Which of the checkpoint's: averaged over the steps ("ema"), or those of the last step ("raw").
        model: In eval mode.
        num_classes: Length of its logits.
        classes: Class names by number; None where the training data had none.
        preprocessing: What its input is made by.
        epoch: In which the checkpoint was written, from 1.
        step: After how many steps.
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
        """The name of a class, where it has one."""
        return self.classes[number] if self.classes and number < len(self.classes) else None


def load_trained(path: Path, weights: Weights = "ema", device: torch.device | str = "cpu") -> Trained:
    """The network that a checkpoint holds.

    Raises:
        ValueError: There is no such file, or it is no checkpoint, or damaged; says what to do.
    """
    state = _read(path)
    missing = [name for name in NEEDED if name not in state]
    if missing:
        raise ValueError(f"{path}: not a checkpoint of this version of train.py, it lacks {', '.join(missing)}; {WAY_OUT}")
    architecture, preprocessing = state["architecture"], state["preprocessing"]
    try:
        # What is made on "meta" has no values yet: initial ones would cost time, and draws of torch's random numbers.
        with torch.device("meta"):
            model = googlenet(
                architecture["num_classes"],
                aux_logits=architecture["aux_logits"],
                transform_input=architecture["transform_input"],
            )
        tensors = state["model"] if weights == "raw" else averaged_weights(state["ema"])
        model.load_state_dict(tensors, assign=True)
        return Trained(
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
