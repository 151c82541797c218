"""The data of a run: both splits, opened and checked against each other."""

import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.distributed import World
from pipelines.config import DataConfig
from pipelines.loader import MEAN, STD, resize_shorter_for
from pipelines.shards.shard_set import ShardSet, open_shards
from pipelines.shards.sorted_shards import order_warning
from tools.run.recipes import DEMO_DATA

log = logging.getLogger("train")

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Shards:
    """The shards of both splits, and the number of classes in them."""

    train: ShardSet
    valid: ShardSet
    num_classes: int


def open_splits(config: DataConfig, world: World) -> Shards:
    """Opens the shards of both splits. If they are the demo's, they are drawn first.

    Raises:
        ValueError: Shards are missing or unusable, or the splits have different classes.
    """
    if config.train == str(DEMO_DATA):
        if world.local_rank == 0:
            _make_demo_data()
        world.barrier()
    train, valid = config.open_shards("train"), config.open_shards("valid")
    require_same_classes("training and validation shards", train.classes, valid.classes)
    num_classes = max(train.num_classes(), valid.num_classes())
    if world.is_main and (warning := order_warning(train, config, num_classes)):
        log.warning("%s", warning)
    return Shards(train, valid, num_classes)


def require_same_classes(what: str, one: Sequence[str] | None, other: Sequence[str] | None) -> None:
    """Raises a `ValueError` about two things if both list their classes, and the lists differ."""
    if one and other and one != other:
        only = sorted(set(one) ^ set(other))
        raise ValueError(f"{what} have different classes: {', '.join(only[:20]) or 'another order'}")


def _make_demo_data() -> None:
    """Draws and converts the demo's images with the `shards` command, unless an earlier run has done so."""
    try:
        open_shards(str(DEMO_DATA), "train"), open_shards(str(DEMO_DATA), "valid")
        return
    except ValueError:  # shards are missing
        pass
    log.info("drawing the demo's images into %s", DEMO_DATA)
    command = [sys.executable, "-m", "tools.shards", "demo", str(DEMO_DATA), "--overwrite"]
    if subprocess.run(command, check=False, cwd=ROOT).returncode:
        raise ValueError("the demo's images could not be made; the line above says why")


def count_steps(num_batches: int, accumulate_steps: int) -> int:
    """Returns the optimizer steps per epoch.

    Raises:
        ValueError: An epoch has too few batches for one step.
    """
    if num_batches < accumulate_steps:
        raise ValueError(f"{num_batches} batches an epoch, too few for a step of --accumulate-steps {accumulate_steps}")
    return num_batches // accumulate_steps


def preprocessing(image_size: int) -> dict[str, Any]:
    """Returns the preprocessing of validation, which checkpoints store for prediction."""
    return {"image_size": image_size, "resize_shorter": resize_shorter_for(image_size), "mean": MEAN, "std": STD}
