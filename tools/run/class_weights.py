"""Weights of the classes in the loss, from the training labels or from a file."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from model.distributed import World
from pipelines.json_file import parse_json, read_limited, shown
from pipelines.printable import printable
from pipelines.shards.labels import LabelReader, check_range, class_names
from pipelines.shards.shard_set import ShardSet
from tools.run.config import Config
from tools.run.data import Shards

BALANCED = "balanced"
FLAG = "--model.class-weights"
SEPARATORS = " \t,"  # in a line: the last one is between class and weight


def read_class_weights(config: Config, shards: Shards, world: World) -> list[float] | None:
    """Returns the weight of each class for --model.class-weights, or `None` without that setting. Rank 0 reads them for all.

    The mean over the training samples is 1, so the setting does not change how large the loss and its gradients are. Classes
    without training samples have a weight of 1, which nothing depends on.

    Raises:
        ValueError: The file has no weight for each class, or the labels cannot be read.
    """
    if not config.model.class_weights:
        return None
    weights: list[float] = world.from_main(_weights(config, shards) if world.is_main else None)
    return weights


def _weights(config: Config, shards: Shards) -> list[float]:
    setting, train = config.model.class_weights, shards.train
    given = None if setting == BALANCED else _read_file(setting, train, shards.num_classes)
    if train.is_remote:
        if given is None:
            raise ValueError(
                f"{FLAG} {BALANCED}: {train.tars[0]} is remote, where each label would take a request; copy the shards to a "
                "local disk, or name a file of weights"
            )
        return given
    labels = train.label_array()
    counts = np.bincount(labels[(labels >= 0) & (labels < shards.num_classes)], minlength=shards.num_classes).tolist()
    if not any(counts):
        raise ValueError(f"{FLAG}: no training sample has a readable label")
    if config.data.sampler == "balanced":  # it shows all classes equally often
        counts = [min(count, 1) for count in counts]
    return scaled(given, counts)


def scaled(given: list[float] | None, counts: list[int]) -> list[float]:
    """Scales weights to a mean of 1 over the training samples.

    Args:
        given: Positive weights of the classes, or `None` for those in inverse proportion to the counts. These are the ones of
            `compute_class_weight("balanced", ...)` of scikit-learn: samples / (classes * samples of the class).
        counts: Training samples of each class.
    """
    if given is None:
        given = [1 / count if count else 1.0 for count in counts]
    largest = max(weight for weight, count in zip(given, counts, strict=True) if count)
    relative = [weight / largest for weight in given]  # otherwise the sum could overflow
    mean = math.fsum(weight * count for weight, count in zip(relative, counts, strict=True) if count) / sum(counts)
    return [weight / mean if count else 1.0 for weight, count in zip(relative, counts, strict=True)]


def _read_file(path: str, train: ShardSet, num_classes: int) -> list[float]:
    """Reads a file with a weight for each class."""
    names, weights = [*map(printable, class_names(train.classes, num_classes))], dict[int, float]()
    for place, label, value in _entries(path):
        number = _class_of(label, train.label_reader, num_classes, place)
        if number in weights:
            raise ValueError(f"{place}: class {names[number]} has a weight already")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(
                f"{place}: the weight of class {names[number]} is {shown(value)}; a finite number above 0 is needed"
            )
        weights[number] = float(value)
    if missing := [name for number, name in enumerate(names) if number not in weights]:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ValueError(f"{path}: no weight for class {missing[0]}{more}; each class needs one")
    return [weights[number] for number in range(num_classes)]


def _class_of(label: str, reader: LabelReader, num_classes: int, place: str) -> int:
    try:
        number = reader.number(label)
        check_range(number, num_classes)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return number


def _entries(path: str) -> Iterator[tuple[str, str, Any]]:
    """Yields (place, class, weight) for each entry of a file: a JSON object, or lines of a class and its weight."""
    try:
        content = read_limited(Path(path))
    except OSError as error:
        why = "a local file is needed" if "://" in path else error.strerror
        raise ValueError(f"{FLAG} {path}: cannot be read ({why}); name a file of weights, or {BALANCED}") from None
    if path.lower().endswith(".json"):
        pairs = parse_json(content, path, objects=tuple)
        if not isinstance(pairs, tuple):
            raise ValueError(f"{path}: an object is needed, not {shown(pairs)}")
        yield from ((path, label, value) for label, value in pairs)
        return
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    for number, line in enumerate(map(str.strip, lines), start=1):
        place, end = f"{path}, line {number}", max(line.rfind(separator) for separator in SEPARATORS)
        label = line[: max(end, 0)].rstrip(SEPARATORS)
        if label:
            yield place, label, _number(line[end + 1 :])
        elif line:
            raise ValueError(f"{place}: {shown(line)} is not a class and its weight, such as `cat 2.5`")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
