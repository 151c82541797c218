"""Where the installed commands begin.

Only this module has a name that nobody else uses. PYTHONPATH often contains the current folder, and a `tools`, `model` or
`train.py` there would come before the installed ones. So this module first puts the project's folder in front.
"""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def _run(command: str) -> None:
    import_module(f"tools.{command}.cli").main()


def evaluate() -> None:
    """Runs `evaluate`."""
    _run("evaluate")


def export_model() -> None:
    """Runs `export-model`."""
    _run("export")


def predict() -> None:
    """Runs `predict`."""
    _run("predict")


def report() -> None:
    """Runs `report`."""
    _run("report")


def shards() -> None:
    """Runs `shards`."""
    _run("shards")


def throughput() -> None:
    """Runs `throughput`."""
    _run("throughput")
