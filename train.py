"""WebDataset shards in, a trained GoogLeNet out: `python train.py --help`.

Read it from top to bottom: `main`, the run, one epoch, what is said of it. The settings are in tools/run/config.py, the step in
model/job.py, validation in model/evaluation.py, the run's folder in tools/run/run_folder.py.
"""

import argparse
import contextlib
import dataclasses
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from model.distributed import World, join_world
from model.evaluation import Evaluation, evaluate
from model.init_from import read_initial_weights
from model.job import HEADS, Job, build_job, global_batch_size, train_step
from pipelines.bad_samples.quarantine import FILE_NAME as QUARANTINE
from pipelines.build import build_loader
from pipelines.loader import Loader
from pipelines.meter import WARM_UP_BATCHES, Meter, Rates, verdict
from pipelines.mix import mix
from pipelines.shards.shard_set import ShardSet, open_shards
from pipelines.shards.sorted_shards import order_warning
from tools.evaluate.evaluate import evaluate_only
from tools.run.config import Config, apply_tuned, choose_autocast_dtype, choose_batch_size, image_dtype, share_threads
from tools.run.preemption import EXIT_CODE, Leave, Left
from tools.run.profile import profiled
from tools.run.recipes import DEMO_DATA, RECIPES
from tools.run.run_folder import RunFolder

log = logging.getLogger("train")

# Steps between two times that the ranks agree on whether to save or to leave: each is a round trip of the hosts.
AGREE_EVERY = 10
SAVE, LEAVE = 1, 2


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        config = parse(arguments)
        stream = sys.stderr if config.json else sys.stdout
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=stream, force=True)
        with join_world(config.device) as world:
            if not world.is_main:
                log.setLevel(logging.WARNING)
            config = apply_tuned(config, world.device, world.local_size, is_main=world.is_main)
            is_left = False
            try:
                (train if config.evaluate is None else evaluate_only)(config, world)
            except Left:
                is_left = True
        if is_left:
            sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted; states saved before are whole, and --resume auto goes on from the newest", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output, `head` for one, has gone
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def parse(arguments: Sequence[str] | None) -> Config:
    """The configuration that the command line asks for; its flags override the settings of the recipe."""
    recipes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipes.add_argument("--recipe")
    recipe = recipes.parse_known_args(arguments)[0].recipe or "None"  # as tyro writes it
    config = tyro.cli(Config, args=arguments, prog="train.py", default=RECIPES.get(recipe, Config()))
    if config.evaluate is not None:
        if not config.data.valid:
            raise ValueError("--evaluate needs --data.valid, the shards to score the checkpoint on")
        return config
    is_given = {split: getattr(config.data, split) not in ("", str(DEMO_DATA)) for split in ("train", "valid")}
    if is_given["train"] != is_given["valid"]:
        given, missing = ("train", "valid") if is_given["train"] else ("valid", "train")
        raise ValueError(f"--data.{given} is given and --data.{missing} is not; training needs both")
    if recipe == "finetune" and config.init_from is None:
        raise ValueError("--recipe finetune needs --init-from, the weights to begin with")
    if config.data.train:
        return config
    if recipe != "None":
        raise ValueError(f"--recipe {recipe} needs --data.train and --data.valid")
    return tyro.cli(Config, args=arguments, prog="train.py", default=RECIPES["demo"])


def make_demo_data() -> None:
    """Draws and converts the demo's images with the `shards` command, unless an earlier run has."""
    try:
        open_shards(str(DEMO_DATA), "train"), open_shards(str(DEMO_DATA), "valid")
        return
    except ValueError:  # there are none, or not all of them
        pass
    log.info("drawing the demo's images into %s", DEMO_DATA)
    command = [sys.executable, "-m", "tools.shards", "demo", str(DEMO_DATA), "--overwrite"]
    if subprocess.run(command, check=False, cwd=Path(__file__).parent).returncode:
        raise ValueError("the demo's images could not be made; the line above says why")


def train(config: Config, world: World) -> None:
    """Runs the training job that the configuration describes.

    Raises:
        Left: A signal asked it to end; its state is saved.
    """
    if config.data.train == str(DEMO_DATA):
        if world.local_rank == 0:
            make_demo_data()
        world.wait()
    run_path = world.from_main(config.run_dir or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    autocast_dtype = choose_autocast_dtype(config.precision, world.device)
    shards = config.data.open_shards("train"), config.data.open_shards("valid")
    config = choose_batch_size(config, world, shards[0].num_samples)
    with (
        contextlib.closing(RunFolder(run_path, config, world)) as run,
        open_data(config, shards, world, run_path, autocast_dtype) as data,
    ):
        initial = None
        if config.init_from and not run.is_resumed:
            initial = read_initial_weights(config.init_from, is_partial=config.init_from_partial)
        steps_per_epoch = len(data.train) // config.accumulate_steps
        if not steps_per_epoch:
            raise ValueError(f"{len(data.train)} batches an epoch make no step of --accumulate-steps {config.accumulate_steps}")
        job = build_job(
            config,
            world,
            num_classes=data.num_classes,
            classes=data.classes,
            autocast_dtype=autocast_dtype,
            steps_per_epoch=steps_per_epoch,
            initial=initial,
        )
        meter = Meter(world.device)
        run.begin(job, data.train, meter)
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        log.info("%s; %s, %s; writing to %s", data.summary, device, job.arithmetic, run_path)
        log.info("%s", describe_steps(config, world))
        with Leave() as leave, profiled(config, run_path, world) as next_step:
            train_epochs(job, data, meter, run, leave, next_step)
            run.write_results(job.scores)
            run.finish()
        rates = world.gather(meter.total)
        num_bad = sum(world.gather(data.train.num_bad_samples + data.valid.num_bad_samples))
    if num_bad:
        log.warning(
            "%d bad samples were left out, see %s; later runs leave them out from the start with --data.quarantine %s",
            *(num_bad, run_path / QUARANTINE, run_path),
        )
    if world.is_main:
        print(report(job.scores, rates, run_path, job.seconds))


@dataclass(frozen=True)
class Data:
    """What is trained on and validated with."""

    train: Loader
    valid: Loader
    classes: tuple[str, ...] | None
    num_classes: int
    summary: str


@contextlib.contextmanager
def open_data(
    config: Config, shards: tuple[ShardSet, ShardSet], world: World, run_path: Path, autocast_dtype: torch.dtype | None
) -> Iterator[Data]:
    """Both splits, each rank its share of them; shares out the CPU's threads."""
    train_shards, valid_shards = shards
    num_classes = agree_on_classes(train_shards, valid_shards)
    if world.is_main and (warning := order_warning(train_shards, config.data, num_classes)):
        log.warning("%s", warning)
    torch_threads, loader_threads = share_threads(config, world.device, world.local_size)
    torch.set_num_threads(torch_threads)

    def loader_of(split: Literal["train", "valid"], shards: ShardSet) -> Loader:
        return build_loader(
            config.data,
            split,
            shards=shards,
            batch_size=config.batch_size,
            image_size=config.image_size,
            device=world.device,
            dtype=image_dtype(autocast_dtype, world.device),
            num_classes=num_classes,
            num_threads=loader_threads,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            quarantine=run_path / QUARANTINE,
        )

    summary = (
        f"{num_classes} classes, {train_shards.num_samples:,} training and {valid_shards.num_samples:,} validation samples; "
        f"{torch_threads} torch and {loader_threads} data threads"
    )
    with loader_of("train", train_shards) as train_loader, loader_of("valid", valid_shards) as valid_loader:
        yield Data(train_loader, valid_loader, train_shards.classes, num_classes, summary)


def describe_steps(config: Config, world: World) -> str:
    """How many images make a step, and what that makes of the learning rate."""
    images, optim = global_batch_size(config, world), config.optim
    text = (
        f"global batch size {images} ({config.batch_size} images x {config.accumulate_steps} batches x {world.size} processes)"
    )
    lr = optim.scaled(optim.lr, images)
    if not optim.reference_batch_size:
        return f"{text}; learning rate {lr:g}, not scaled"
    return f"{text}; learning rate {optim.lr:g} x {images} / {optim.reference_batch_size} = {lr:g}"


def train_epochs(job: Job, data: Data, meter: Meter, run: RunFolder, leave: Leave, next_step: Callable[[], None]) -> None:
    """All epochs, or those that are left, each with its validation and its checkpoint.

    Raises:
        Left: A signal asked the run to end; its state is saved.
    """
    steps, epochs = job.steps_per_epoch, job.config.epochs
    is_shown = None if job.world.is_main else True
    with logging_redirect_tqdm(), tqdm(total=epochs * steps, initial=job.step, unit="step", disable=is_shown) as progress:
        for epoch in range(job.validated + 1, epochs + 1):
            job.epoch = epoch
            if job.step < epoch * steps:  # what is resumed may lack the validation alone
                for _ in train_epoch(job, data.train, meter, run):
                    progress.update()
                    next_step()
                    save_or_leave(job, data.train, meter, run, leave)
            evaluation = validate(job, data.valid, leave)
            if evaluation is None:
                run.save(job, data.train, meter)
                raise say_goodbye(job.world, run, leave)
            log_validation(job, evaluation, sum(job.world.gather(data.valid.num_bad_samples)), run)
            job.validated = epoch
            run.save(job, data.train, meter, best=max(job.scores["top1"], job.scores["ema_top1"]))
            if job.world.agree(leave.signal is not None) and epoch < epochs:
                raise say_goodbye(job.world, run, leave)


def train_epoch(job: Job, loader: Loader, meter: Meter, run: RunFolder) -> Iterator[None]:
    """One pass over the training split, or what is left of it, step by step; losses leave the device for log lines only."""
    config, world = job.config, job.world
    job.model.train()
    end = job.epoch * job.steps_per_epoch
    for batch in meter.batches(loader):
        if job.step == end:  # the batches left over are too few for a step
            continue
        number = (job.step * config.accumulate_steps + job.micro_step) * world.size + world.rank
        image, target = mix(
            config.mix, batch["image"], batch["target"], num_classes=job.num_classes, step=number, seed=config.seed
        )
        if number == 0:
            run.write_batch(image, target, job.classes)
        lr = job.lr
        if not train_step(job, image, target):
            continue
        i = job.step - (end - job.steps_per_epoch)
        if i % config.log_every == 0 or job.step == end:
            log_step(job, i, lr, loader, meter, run)
        if job.step < end:
            yield
        else:
            log_pace(job, meter)
    yield  # the epoch's last step, once the loader is at the beginning of the next epoch


def save_or_leave(job: Job, loader: Loader, meter: Meter, run: RunFolder, leave: Leave) -> None:
    """Between two steps: saves the state where it is time, and leaves where a signal has asked for it, on all ranks alike.

    Raises:
        Left: A signal asked for it.
    """
    every_steps = job.config.checkpoint.every_steps
    is_due = every_steps is not None and job.step % every_steps == 0
    wish = 0
    if job.world.size == 1 or job.step % AGREE_EVERY == 0:
        wish = job.world.agree(LEAVE if leave.signal else SAVE if run.is_time_to_save() else 0)
    if is_due or wish:
        run.save(job, loader, meter)
    if wish == LEAVE:
        raise say_goodbye(job.world, run, leave)


def say_goodbye(world: World, run: RunFolder, leave: Leave) -> Left:
    """Waits until the state is on the disk, on all ranks, as torchrun ends them when one has ended; gives what ends the run."""
    run.finish()
    world.wait()
    name = leave.signal.name if leave.signal else "a signal at another process"
    log.info("%s: the run's state is saved; the same command with --run-dir %s --resume auto goes on", name, run.path)
    return Left()


def log_step(job: Job, i: int, lr: float, loader: Loader, meter: Meter, run: RunFolder) -> None:
    """Says how training goes, over all ranks since the last time: to the log and to the run's folder.

    Raises:
        ValueError: Too many steps in a row had gradients that are not finite.
    """
    world, config, rates = job.world, job.config, meter.take()
    own = [rates.images, rates.wait_seconds, rates.launch_bound_images, loader.num_bad_samples]
    sums = torch.cat([job.sums.double(), torch.tensor(own, dtype=torch.float64, device=job.device)])
    of_all = world.sum(sums).tolist()  # here the host waits for the device
    *losses, norm, steps, images, wait_seconds, launch_bound_images, bad_samples = of_all
    job.sums.zero_()
    skipped, in_a_row = job.skipped.tolist()
    heads = dict(zip(HEADS, losses, strict=True)) if config.model.aux_logits else {"loss": losses[0], "main_loss": losses[1]}
    together = Rates(int(images), rates.seconds, wait_seconds / world.size, int(launch_bound_images))
    metrics = {
        "split": "train",
        "epoch": job.epoch,
        "step": job.step,
        **{name: value / steps if steps else None for name, value in heads.items()},
        "lr": lr,
        "gradient_norm": norm / steps if steps else None,
        "scale": float(job.scaler.get_scale()),
        "skipped_steps": int(skipped),
        "images_per_second": together.images_per_second,
        "data_wait_percent": together.data_wait_percent,
        "bad_samples": int(bad_samples),
    }
    if job.device.type == "cuda":
        metrics["launch_bound_percent"] = together.launch_bound_percent
        metrics["gpu_memory_gigabytes"] = torch.cuda.max_memory_allocated(job.device) / 1e9
    run.write(metrics, job.step)
    left = (config.epochs * job.steps_per_epoch - job.step) * meter.total.seconds
    left *= config.batch_size * config.accumulate_steps / meter.total.images
    log.info(
        "epoch %d/%d  step %d/%d  loss %.3f  lr %.4g  %.1f images/s  data wait %.1f %%  %s left%s",
        *(job.epoch, config.epochs, i, job.steps_per_epoch, losses[0] / steps if steps else math.nan, lr),
        *(together.images_per_second, together.data_wait_percent, f"{left // 60:.0f}m{left % 60:02.0f}s"),
        f"  {skipped:.0f} steps skipped" if skipped else "",
    )
    if in_a_row >= config.max_nonfinite_steps:
        raise ValueError(
            f"{in_a_row:.0f} steps in a row, up to step {job.step} at learning rate {lr:g}, had gradients that are not finite, "
            f"and were skipped; {run.path / 'last.pt'} has the last saved weights, if any were: begin anew with "
            "--init-from, and a lower --optim.lr or a --grad-clip"
        )


def log_pace(job: Job, meter: Meter) -> None:
    """Says at an epoch's end what set its pace, over all ranks; the first batches, which are slower, are told apart.

    Where ranks wait for each other, only those that wait for data count that time as such.
    """
    own = [dataclasses.astuple(rates) for rates in (meter.warm_up, meter.steady)]
    sums = job.world.sum(torch.tensor(own, dtype=torch.float64, device=job.device)).tolist()
    warm_up, steady = (
        Rates(int(images), seconds / job.world.size, wait_seconds / job.world.size, int(launch_bound_images))
        for images, seconds, wait_seconds, launch_bound_images in sums
    )
    pace = steady if steady.images else warm_up  # of an epoch that is no longer than that
    log.info(
        "epoch %d/%d  train: %.1f images/s  (first %d batches: %.1f s, %.1f s of them waiting)  %s",
        *(job.epoch, job.config.epochs, pace.images_per_second, WARM_UP_BATCHES, warm_up.seconds, warm_up.wait_seconds),
        verdict(job.device.type, pace.data_wait_percent, launch_bound_percent=pace.launch_bound_percent),
    )


def validate(job: Job, loader: Loader, leave: Leave) -> Evaluation | None:
    """Scores the weights as they are; None where a signal asks the run to leave, which several ranks do afterwards only."""
    return evaluate(
        job.model,
        job.ema,
        loader,
        num_classes=job.num_classes,
        world=job.world,
        autocast=job.autocast,
        is_interrupted=lambda: leave.signal is not None and job.world.size == 1,
    )


def log_validation(job: Job, evaluation: Evaluation, bad_samples: int, run: RunFolder) -> None:
    """Says how well the network does, to the log and to the run's folder."""
    job.scores = evaluation.scores()
    log.info(
        "epoch %d/%d  valid: top-1 %.1f %%, EMA %.1f %%  top-5 %.1f %%, EMA %.1f %%  loss %.3f",
        *(job.epoch, job.config.epochs, *(job.scores[name] for name in ("top1", "ema_top1", "top5", "ema_top5", "loss"))),
    )
    run.write({"split": "valid", "epoch": job.epoch, "step": job.step, **job.scores, "bad_samples": bad_samples}, job.step)
    run.write_evaluation(evaluation, job.classes, job.step)


def agree_on_classes(train_shards: ShardSet, valid_shards: ShardSet) -> int:
    """The number of classes.

    Raises:
        ValueError: Both splits name their classes, and not the same.
    """
    if train_shards.classes and valid_shards.classes and train_shards.classes != valid_shards.classes:
        only = sorted(set(train_shards.classes) ^ set(valid_shards.classes))
        raise ValueError(f"training and validation shards have different classes: {', '.join(only[:20]) or 'another order'}")
    return max(train_shards.num_classes(), valid_shards.num_classes())


def report(scores: dict[str, float], of_ranks: Sequence[Rates], run_path: Path, seconds: float) -> str:
    """What a person wants to know at the end."""
    wait_seconds = sum(rates.wait_seconds for rates in of_ranks) / len(of_ranks)
    rates = Rates(sum(rates.images for rates in of_ranks), of_ranks[0].seconds, wait_seconds)
    return f"""
        raw     EMA
top-1  {scores["top1"]:5.1f} % {scores["ema_top1"]:5.1f} %
top-5  {scores["top5"]:5.1f} % {scores["ema_top5"]:5.1f} %
training: {rates.images_per_second:.1f} images/s, {rates.data_wait_percent:.1f} % of the time spent waiting for data
in all:   {seconds:.0f} s
the run:  {run_path} (config.json, metrics.jsonl, TensorBoard events, last.pt, best.pt)
next:     tensorboard --logdir {run_path.parent}
          shards convert FOLDER_OF_CLASS_FOLDERS shards/mine --name train
          shards convert THE_SAME_FOR_VALIDATION shards/mine --name valid
          python train.py --data.train shards/mine --data.valid shards/mine"""


if __name__ == "__main__":
    main()
