"""Scores a checkpoint on the validation split."""

import json
import logging
import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch

from model.config import Arch
from model.distributed import join_world
from model.evaluation import COUNTS, Evaluation, evaluate
from model.load_model import load_both
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.printable import printable
from tools.considerate import considerate_threads
from tools.run.cpu_precision import all_have_bf16
from tools.run.data import require_same_classes
from tools.run.resources import choose_autocast_dtype, choose_batch_size, image_dtype, share_threads


def evaluate_checkpoint(
    checkpoint: Path,
    data: DataConfig,
    *,
    arch: Arch,
    batch_size: int,
    device: Literal["auto", "cpu", "cuda"],
    precision: str,
    torch_threads: int | None,
    as_json: bool,
) -> None:
    """Scores the raw and the averaged weights of a checkpoint, and prints the result on rank 0.

    The arguments are the options of `Evaluate` in cli.py. `data.valid` names the shards.

    Raises:
        ValueError: The checkpoint, the shards, or the settings cannot be used.
    """
    with join_world(device) as world, considerate_threads(world.device, world.size):
        if not world.is_main:
            logging.getLogger("train").setLevel(logging.WARNING)
        raw, ema, chosen = load_both(checkpoint, world.device, arch)
        torch_threads, loader_threads = share_threads(torch_threads, data.threads, world.device, world.local_size)
        torch.set_num_threads(torch_threads)
        if precision == "auto" and world.device.type == "cpu" and ema.is_bf16 and all_have_bf16(world):
            precision = "bf16"  # the scores are those of training
        autocast_dtype = choose_autocast_dtype(precision, world.device)
        shards = data.open_shards("valid")
        require_same_classes(str(checkpoint), ema.classes, "the shards", shards.classes)
        image_size = ema.preprocessing.image_size
        spec = LoaderSpec(
            split="valid",
            batch_size=choose_batch_size(batch_size, world, image_size=image_size, num_samples=shards.num_samples),
            image_size=image_size,
            device=world.device,
            dtype=image_dtype(autocast_dtype, world.device),
            num_classes=ema.num_classes,
            num_threads=loader_threads,
            rank=world.rank,
            world_size=world.size,
        )
        with build_loader(data, spec, shards=shards) as loader:
            evaluation = evaluate(
                raw.model,
                ema.model,
                loader,
                num_classes=ema.num_classes,
                world=world,
                autocast=lambda: torch.autocast(world.device.type, autocast_dtype, enabled=autocast_dtype is not None),
            )
        assert evaluation is not None
        if world.is_main:
            print(describe_evaluation(evaluation, ema.classes or shards.classes, as_json=as_json))
            print(f"predict and export-model take these weights: {chosen}", file=sys.stderr)


def describe_evaluation(evaluation: Evaluation, classes: tuple[str, ...] | None, *, as_json: bool) -> str:
    """Returns the scores of each class, over all samples, and as the mean of the classes: a table, or one JSON object."""
    rows, scores = evaluation.of_classes(classes), evaluation.scores()
    samples = sum(row["samples"] for row in rows)
    if as_json:
        loss = scores["loss"] if math.isfinite(scores["loss"]) else None  # JSON has neither NaN nor infinity
        return json.dumps({**scores, "loss": loss, "samples": samples, "classes": rows})
    means = {name: fmean(row[name] for row in rows) for name in COUNTS[1:]}
    names = [*(printable(row["class"]) for row in rows), "all", "mean"]
    width = max(5, *map(len, names))
    lines = [f"{'class':{width}}  samples   top-1     EMA   top-5     EMA"]
    for name, row in zip(names, (*rows, {"samples": samples, **scores}, means), strict=True):
        columns = "".join(f"{row[score]:6.1f} %" for score in ("top1", "ema_top1", "top5", "ema_top5"))
        count = f"{row['samples']:,}" if "samples" in row else ""
        lines.append(f"{name:{width}} {count:>8}{columns}")
    return "\n".join(lines)
