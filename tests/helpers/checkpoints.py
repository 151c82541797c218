"""Checkpoints as train.py writes them, without training."""

import functools
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import save_checkpoint
from model.ema import EMA
from model.googlenet import GoogLeNet
from tests.conftest import CLASSES

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.cache
def _weights() -> dict[str, Any]:
    """Returns state dicts for three classes. The averaged weights differ from the raw ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GoogLeNet(num_classes=len(CLASSES))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in training
    average = EMA(model, decay=0.9)
    average.update_parameters(model)
    with torch.no_grad():
        model.fc.weight *= 3
    return {"model": model.state_dict(), "ema": average.state_dict()}


def state(image_size: int = 32, **changes: Any) -> dict[str, Any]:
    """Returns the content of a checkpoint of three classes. `changes` replace parts of it."""
    return {
        **_weights(),
        "classes": CLASSES,
        "epoch": 2,
        "step": 20,
        "best": 50.0,
        "config": {},
        "architecture": {"num_classes": len(CLASSES), "aux_logits": True, "transform_input": False},
        "preprocessing": {"image_size": image_size, "resize_shorter": round(image_size * 256 / 224), "mean": MEAN, "std": STD},
        **changes,
    }


def write(path: Path, **changes: Any) -> Path:
    """Writes a checkpoint with the `state` of these arguments, and returns its path."""
    save_checkpoint(path, state(**changes))
    return path
