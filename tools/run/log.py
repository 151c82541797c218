"""What a run reports: log lines for people, metrics for programs."""

import dataclasses
import logging
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from model.distributed import World
from model.evaluation import Evaluation
from model.factory import describe_statistics
from model.job import HEADS, Job
from pipelines.bad_samples.quarantine import FILE_NAME as QUARANTINE
from pipelines.loader import Loader
from pipelines.meter import WARM_UP_BATCHES, Meter, Rates, verdict
from pipelines.printable import counted, printable
from pipelines.shards.labels import class_names
from pipelines.shards.shard_set import ShardSet
from tools.cli import log_to
from tools.run.config import Config
from tools.run.data import Shards
from tools.run.recipes import DEMO_DATA
from tools.run.run_folder import RunFolder
from tools.run.sharing import Sharing

log = logging.getLogger("train")

FEW_STEPS = 1000  # a judgment


def configure_logging(world: World) -> None:
    """Sends log lines to stdout. Ranks other than 0 report only warnings."""
    log_to(sys.stdout)
    if not world.is_main:
        log.setLevel(logging.WARNING)


def log_start(job: Job, shards: Shards, path: Path, torch_threads: int, loader_threads: int) -> None:
    """Reports the data, the device, the batch size, and the learning rate."""
    device = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "CPU"
    log.info(
        "%s, %s training and %s validation samples; %d torch and %d data threads, %s, %s; writing to %s",
        *(counted(shards.num_classes, "class", "classes"), f"{shards.train.num_samples:,}", f"{shards.valid.num_samples:,}"),
        *(torch_threads, loader_threads, device, job.precision, path),
    )
    log.info("%s", describe_steps(job))
    if job.class_weights is not None:
        log.info("%s", describe_class_weights(job.class_weights.tolist(), job.classes))


def describe_class_weights(weights: Sequence[float], classes: Sequence[str] | None) -> str:
    """Names the smallest and the largest weight of a class."""
    pairs = [*zip(weights, map(printable, class_names(classes, len(weights))), strict=True)]
    (smallest, common), (largest, rare) = min(pairs), max(pairs)
    return f"class weights in the loss from {smallest:.3g} ({common}) to {largest:.3g} ({rare})"


def describe_steps(job: Job) -> str:
    """Describes the global batch size and the learning rate scaled to it."""
    config, optim = job.config, job.config.optim
    images = config.global_batch_size(job.world.size)
    batches, processes = counted(config.accumulate_steps, "batch", "batches"), counted(job.world.size, "process", "processes")
    parts = f"{counted(config.batch_size, 'image')} x {batches} x {processes}"
    scaled, reference = optim.scaled(optim.peak_lr, images), optim.reference_batch_size
    lr = f"{optim.peak_lr:g} x {images} / {reference} = {scaled:g}" if reference else f"{scaled:g}, not scaled"
    return f"global batch size {images} ({parts}); learning rate {lr}"


def log_schedule(job: Job, config: Config) -> None:
    """Reports the settings that depend on the number of steps, and warns of a run with few steps."""
    steps, num_steps = job.steps_per_epoch, config.epochs * job.steps_per_epoch
    log.info(
        "%s an epoch, %s in all: warm-up over %s, a log line every %s, %s",
        *(counted(steps, "step"), f"{num_steps:,}"),
        counted(config.optim.warmup_steps(epochs=config.epochs, steps_per_epoch=steps), "step"),
        *("step" if config.log_every == 1 else f"{config.log_every} steps", describe_statistics(job.model)),
    )
    is_random = job.step == 0 and config.init_from is None  # a resumed run has weights
    if num_steps < FEW_STEPS and is_random and config.recipe != "demo":
        log.info(
            "%s few for training from random weights; with published ones, a small data set usually ends better: "
            "--recipe finetune --init-from torchvision (see docs/recipes.md)",
            counted(num_steps, "step is", "steps are"),
        )


class TrainingLog:
    """Writes log lines and metrics. All ranks call its methods together.

    Args:
        job: The state of the run.
        meter: Rates of the training loader.
        folder: Receives the metrics.
        every: Steps between two log lines.
        max_nonfinite_steps: Consecutive skipped steps that end the run.
    """

    def __init__(self, job: Job, meter: Meter, folder: RunFolder, *, every: int, max_nonfinite_steps: int) -> None:
        self._job, self._meter, self._folder = job, meter, folder
        self._every, self._max_nonfinite_steps = every, max_nonfinite_steps
        self._sharing = Sharing(job.world)

    def step(self, loader: Loader, lr: float) -> None:
        """Reports the steps since the last log line, if one is due. The host waits for the device only then.

        Args:
            loader: The training loader.
            lr: Learning rate of the step.

        Raises:
            ValueError: Too many consecutive steps had non-finite gradients.
        """
        job = self._job
        i = job.step - (job.epoch - 1) * job.steps_per_epoch
        if i % self._every and i < job.steps_per_epoch:
            return
        rates = self._meter.take()
        own = [rates.images, rates.wait_seconds, rates.launch_bound_images, loader.num_bad_samples]
        sums = torch.cat([job.sums.double(), torch.tensor(own, dtype=torch.float64, device=job.device)])
        *losses, norm, steps, images, wait_seconds, launch_bound_images, bad_samples = job.world.sum(sums).tolist()
        job.sums.zero_()
        skipped, in_a_row = job.skipped.tolist()
        total = Rates(int(images), rates.seconds, wait_seconds / job.world.size, int(launch_bound_images))
        heads = HEADS if job.config.model.aux_logits and not job.config.model.arch else HEADS[:2]
        metrics = {
            "split": "train",
            "epoch": job.epoch,
            "step": job.step,
            **{name: value / steps if steps else None for name, value in zip(heads, losses, strict=False)},
            "lr": lr,
            "gradient_norm": norm / steps if steps else None,
            "scale": float(job.scaler.get_scale()),
            "skipped_steps": int(skipped),
            "images_per_second": total.images_per_second,
            "data_wait_percent": total.data_wait_percent,
            "bad_samples": int(bad_samples),
        }
        if job.device.type == "cuda":
            metrics["launch_bound_percent"] = total.launch_bound_percent
            metrics["gpu_memory_gigabytes"] = torch.cuda.max_memory_allocated(job.device) / 1e9
        self._folder.write(metrics, job.step)
        log.info(
            "epoch %d/%d  step %d/%d  loss %.3f  lr %.4g  %.1f images/s  data wait %.1f %%  %s left%s",
            *(job.epoch, job.config.epochs, i, job.steps_per_epoch, losses[0] / steps if steps else math.nan, lr),
            *(total.images_per_second, total.data_wait_percent, self._time_left()),
            f"  {counted(int(skipped), 'step')} skipped" if skipped else "",
        )
        if in_a_row >= self._max_nonfinite_steps:
            raise ValueError(
                f"{counted(int(in_a_row), 'step')} in a row had non-finite gradients, up to step {job.step} at learning rate "
                f"{lr:g}; start again with a lower --optim.lr or a --grad-clip, and with --init-from "
                f"{self._folder.path / 'last.pt'} if that exists"
            )

    def _time_left(self) -> str:
        job, total = self._job, self._meter.total
        images = (job.config.epochs * job.steps_per_epoch - job.step) * job.config.batch_size * job.config.accumulate_steps
        seconds = round(images * total.seconds / total.images)
        return f"{seconds // 60}m{seconds % 60:02}s"

    def pace(self) -> None:
        """Reports what limited the epoch, over all ranks. The first batches are slower and are reported separately.

        Ranks wait for each other. Only a rank that itself waits for data counts that time as data wait.
        """
        job = self._job
        own = [dataclasses.astuple(rates) for rates in (self._meter.warm_up, self._meter.steady)]
        sums = job.world.sum(torch.tensor(own, dtype=torch.float64, device=job.device)).tolist()
        warm_up, steady = (
            Rates(int(images), seconds / job.world.size, wait_seconds / job.world.size, int(launch_bound_images))
            for images, seconds, wait_seconds, launch_bound_images in sums
        )
        pace = steady if steady.images else warm_up  # a short epoch has only these
        log.info(
            "epoch %d/%d  train: %.1f images/s  (first %d batches: %.1f s, %.1f s of them waiting)  %s",
            *(job.epoch, job.config.epochs, pace.images_per_second, WARM_UP_BATCHES, warm_up.seconds, warm_up.wait_seconds),
            verdict(job.device.type, pace.data_wait_percent, launch_bound_percent=pace.launch_bound_percent),
        )
        self._sharing.epoch()

    def validation(self, evaluation: Evaluation, bad_samples: int) -> None:
        """Reports the scores, and writes images of mistakes."""
        job, scores = self._job, evaluation.scores()
        mean_recall = f"  mean recall {scores['mean_recall']:.1f} %, EMA {scores['ema_mean_recall']:.1f} %"
        log.info(
            "epoch %d/%d  valid: top-1 %.1f %%, EMA %.1f %%  top-5 %.1f %%, EMA %.1f %%  loss %.3f%s",
            *(job.epoch, job.config.epochs, *(scores[name] for name in ("top1", "ema_top1", "top5", "ema_top5", "loss"))),
            mean_recall if job.class_weights is not None or evaluation.is_imbalanced else "",
        )
        recall = [value if value is None else round(value, 2) for value in evaluation.recall("ema_top1")]
        metrics = {"split": "valid", "epoch": job.epoch, "step": job.step, **scores, "bad_samples": bad_samples}
        self._folder.write(metrics | {"ema_recall": recall}, job.step)
        self._folder.write_evaluation(evaluation, job.classes, job.step)


def log_end(job: Job, num_bad: int, meter: Meter, path: Path, commands: Sequence[str]) -> None:
    """Prints the final scores and rates and the commands that may come next, and warns of bad samples."""
    rates = job.world.gather(meter.total)
    num_bad = sum(job.world.gather(num_bad))
    if num_bad:
        log.warning(
            "%s left out, see %s; --data.quarantine %s leaves them out of later runs from the start",
            *(counted(num_bad, "bad sample was", "bad samples were"), path / QUARANTINE, path),
        )
    if job.world.is_main:
        print(report(job.scores, rates, path, job.seconds, commands))


def next_commands(config: Config, valid: ShardSet, path: Path) -> list[str]:
    """Returns the commands that may come after a run: those for its result, or after the demo those for one's own images."""
    data, board = config.data, f"tensorboard --logdir {shlex.quote(str(path.parent))}"
    if data.train == str(DEMO_DATA):
        return [
            board,
            "shards convert FOLDER_OF_CLASS_FOLDERS shards/mine --name train",
            "shards convert THE_SAME_FOR_VALIDATION shards/mine --name valid",
            "python train.py --data.train shards/mine --data.valid shards/mine",
        ]
    given = {name: getattr(data, name) for name in ("image_key", "label_key", "class_file", "index_dir", "cache_dir")}
    options = [word for name, value in given.items() if value for word in (f"--{name.replace('_', '-')}", value)]
    best = str(path / "best.pt")
    arch = f" {config.model.named.flags('--arch')}" if config.model.arch else ""
    keys = [word for name in ("image_key", "label_key") if given[name] for word in (f"--{name.replace('_', '-')}", given[name])]
    return [
        shlex.join(["evaluate", best, data.valid, *options]) + arch,
        shlex.join(["predict", best, valid.tars[0], *keys]) + arch,
        shlex.join(["export-model", best, "-o", str(path / "model.pt2")]) + arch,
        shlex.join(["report", str(path)]),
        board,
    ]


def report(scores: dict[str, float], of_ranks: Sequence[Rates], path: Path, seconds: float, commands: Sequence[str]) -> str:
    """Returns the summary at the end of a run."""
    wait_seconds = sum(rates.wait_seconds for rates in of_ranks) / len(of_ranks)
    rates = Rates(sum(rates.images for rates in of_ranks), of_ranks[0].seconds, wait_seconds)
    separator = "\n          "
    return f"""
        raw     EMA
top-1  {scores["top1"]:5.1f} % {scores["ema_top1"]:5.1f} %
top-5  {scores["top5"]:5.1f} % {scores["ema_top5"]:5.1f} %
training: {rates.images_per_second:.1f} images/s, {rates.data_wait_percent:.1f} % of the time spent waiting for data
in total: {seconds:.0f} s
the run:  {path} (config.json, metrics.jsonl, TensorBoard events, last.pt, best.pt)
next:     {separator.join(commands)}"""
