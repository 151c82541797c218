"""Lets tests import torchvision's networks beside a torch without CUDA.

The wheels of PyPI are built for CUDA. Beside another torch their own operators, which boxes need and networks do not, are not
loaded, and importing torchvision fails because it describes two of them.
"""

import dataclasses
import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from model.config import Arch
from model.distributed import join_world
from model.published import published_weights


def require_torchvision() -> None:
    """Imports torchvision, or skips the test if it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        importlib.import_module("torchvision.models")
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision.models")


def redirect(network: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the default weights of a network of torchvision another URL."""
    require_torchvision()
    weights = importlib.import_module("torchvision.models").get_model_weights(network).DEFAULT
    monkeypatch.setattr(weights, "_value_", dataclasses.replace(weights.value, url=url))


def fetch_resnet18(rank: int, url: str, port: int, folder: Path) -> None:
    """Fetches weights in a process of its own, as one of two ranks or, with port 0, as a run by itself; copies the file."""
    if port:
        ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as monkeypatch, join_world("cpu") as world:
        redirect("resnet18", url, monkeypatch)
        shutil.copy(published_weights(Arch("torchvision.models:resnet18"), world), folder / f"{rank}.pth")
