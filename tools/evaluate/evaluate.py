"""`--evaluate`: what a checkpoint scores, over all and class by class."""

import json
import logging
import math

import torch

from model.distributed import World
from model.evaluation import Evaluation, evaluate
from model.load_model import load_trained
from pipelines.build import build_loader
from tools.run.config import Config, choose_autocast_dtype, choose_batch_size, image_dtype, share_threads

log = logging.getLogger("train")


def evaluate_only(config: Config, world: World) -> None:
    """`--evaluate`: scores a checkpoint, and says how it does on each class."""
    assert config.evaluate is not None
    raw, ema = (load_trained(config.evaluate, weights, device=world.device) for weights in ("raw", "ema"))
    if world.is_main and config.image_size not in (Config().image_size, ema.preprocessing.image_size):
        log.warning("scored at %d pixels, as the checkpoint says, and not at --image-size", ema.preprocessing.image_size)
    torch_threads, loader_threads = share_threads(config, world.device, world.local_size)
    torch.set_num_threads(torch_threads)
    autocast_dtype = choose_autocast_dtype(config.precision, world.device)
    shards = config.data.open_shards("valid")
    config = choose_batch_size(config, world, shards.num_samples)
    if shards.classes and ema.classes and shards.classes != ema.classes:
        only = sorted(set(shards.classes) ^ set(ema.classes))
        raise ValueError(f"{config.evaluate} and the shards have different classes: {', '.join(only[:20]) or 'another order'}")
    with build_loader(
        config.data,
        "valid",
        shards=shards,
        batch_size=config.batch_size,
        image_size=ema.preprocessing.image_size,
        device=world.device,
        dtype=image_dtype(autocast_dtype, world.device),
        num_classes=ema.num_classes,
        num_threads=loader_threads,
        rank=world.rank,
        world_size=world.size,
    ) as loader:
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
        print(describe_evaluation(evaluation, ema.classes or shards.classes, as_json=config.json))


def describe_evaluation(evaluation: Evaluation, classes: tuple[str, ...] | None, *, as_json: bool) -> str:
    """The scores, over all and of each class: a table, or one JSON object."""
    rows, scores = evaluation.of_classes(classes), evaluation.scores()
    if as_json:
        loss = scores["loss"] if math.isfinite(scores["loss"]) else None  # JSON has neither NaN nor infinity
        return json.dumps({**scores, "loss": loss, "samples": sum(row["samples"] for row in rows), "classes": rows})
    width = max(5, *(len(row["class"]) for row in rows))
    lines = [f"{'class':{width}}  samples   top-1     EMA   top-5     EMA"]
    total = {"class": "all", "samples": sum(row["samples"] for row in rows), **scores}
    for row in (*rows, total):
        columns = "".join(f"{row[name]:6.1f} %" for name in ("top1", "ema_top1", "top5", "ema_top5"))
        lines.append(f"{row['class']:{width}} {row['samples']:8,}{columns}")
    return "\n".join(lines)
