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
from pipelines.printable import counted, printable
from pipelines.shards.labels import no_class_zero
from pipelines.shards.shard_set import ShardSet, open_shards
from pipelines.shards.sorted_shards import order_warning
from tools.run.recipes import DEMO_DATA

log = logging.getLogger("train")

NAMED_CLASSES = 5  # of each side, in the message about different classes
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
    require_same_classes("the training shards", train.classes, "the validation shards", valid.classes)
    num_classes = max(train.num_classes(), valid.num_classes())
    if world.is_main and (shared := set(train.tars) & set(valid.tars)):
        log.warning("%s is both a training and a validation shard; validation scores what the network has seen", min(shared))
    if world.is_main and (warning := order_warning(train, config, num_classes)):
        log.warning("%s", warning)
    # Without names, the labels have been read to count the classes.
    if world.is_main and train.classes is None and (warning := no_class_zero(train.used_classes())):
        log.warning("%s: %s", config.train, warning)
    return Shards(train, valid, num_classes)


def require_same_classes(one: str, classes: Sequence[str] | None, other: str, others: Sequence[str] | None) -> None:
    """Raises a `ValueError` about two things if both list their classes, and the lists differ. It says which has which."""
    if not classes or not others or list(classes) == list(others):
        return
    only, only_others = sorted(set(classes) - set(others)), sorted(set(others) - set(classes))
    if sorted(classes) == sorted(others):
        place = [mine == theirs for mine, theirs in zip(classes, others, strict=True)].index(False)
        at = f"class {place} is {printable(classes[place])} in {one}, and {printable(others[place])} in {other}"
        raise ValueError(f"{one} and {other} have their classes in another order: {at}")
    if sorted(map(str.casefold, classes)) == sorted(map(str.casefold, others)):
        pairs = f"{_few(only)} in {one}, and {_few(only_others)} in {other}"
        raise ValueError(f"{one} and {other} have classes that differ in capital letters: {pairs}")
    sides = [f"only in {where}: {_few(names)}" for where, names in ((one, only), (other, only_others)) if names]
    counts = f"{len(classes):,} and {len(others):,}"
    raise ValueError(f"{one} and {other} have different classes, {counts}; {'; '.join(sides) or 'some are listed twice'}")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable, names[:NAMED_CLASSES]))
    return f"{shown} and {len(names) - NAMED_CLASSES:,} more" if len(names) > NAMED_CLASSES else shown


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
        raise ValueError(
            f"an epoch has {counted(num_batches, 'batch', 'batches')}, too few for a step of --accumulate-steps "
            f"{accumulate_steps}; lower it or --batch-size"
        )
    return num_batches // accumulate_steps


def preprocessing(image_size: int) -> dict[str, Any]:
    """Returns the preprocessing of validation, which checkpoints store for prediction."""
    return {"image_size": image_size, "resize_shorter": resize_shorter_for(image_size), "mean": MEAN, "std": STD}
