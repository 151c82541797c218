"""Lets tests import torchvision's networks beside a torch without CUDA.

The wheels of PyPI are built for CUDA. Beside another torch their own operators, which boxes need and networks do not, are not
loaded, and importing torchvision fails because it describes two of them.
"""

import importlib
import importlib.util
import sys

import pytest
import torch


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
