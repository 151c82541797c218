"""Which trackers there are, and what they need."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools.run.trackers.background import Trackers
from tools.run.trackers.to_mlflow import MlflowTracker
from tools.run.trackers.to_wandb import WandbTracker
from tools.run.trackers.tracker import Tracker

TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def require_installed(names: Sequence[str]) -> None:
    """Checks that the libraries of trackers are installed, without importing them.

    Raises:
        ValueError: One is missing.
    """
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # the second: a folder of this name, such as wandb makes
            raise ValueError(f"--log {name}: the package is not installed; pip install -e '.[{name}]'")


def start_trackers(names: Sequence[str], path: Path, settings: dict[str, Any]) -> Trackers:
    """Starts trackers of a run.

    Args:
        names: Their names.
        path: The folder of the run.
        settings: Its settings by flat names.
    """
    return Trackers([TRACKERS[name](path, settings) for name in dict.fromkeys(names)])
