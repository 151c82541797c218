"""Trains GoogLeNet on WebDataset shards: `python train.py --help`.

Read this file from top to bottom: `main`, `run`, `train`, `train_epoch`, `train_step`, `validate`. The settings are in
tools/run/config.py and model/config.py. `Job` in model/job.py holds everything that a step changes.
"""

import gc

from tools.run.cli import check_arguments, parse

if __name__ == "__main__":
    check_arguments()  # answers --help and wrong flags before the imports below, which take seconds
    gc.disable()  # the imports make no garbage, and looking for some would take a tenth of their time

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from model.distributed import World, join_world
from model.evaluation import evaluate
from model.init_from import InitialWeights, read_initial_weights
from model.job import Job, build_job
from model.loss import training_loss
from model.published import is_published, published_weights
from pipelines.bad_samples.quarantine import FILE_NAME as QUARANTINE
from pipelines.build import LoaderSpec, build_loader
from pipelines.loader import Loader
from pipelines.meter import Meter
from pipelines.mix import MixConfig, mix
from tools.cli import run_command
from tools.considerate import Threads, considerate_threads
from tools.run.class_weights import read_class_weights
from tools.run.config import Config
from tools.run.cpu_precision import with_precision
from tools.run.data import count_steps, open_splits, preprocessing
from tools.run.log import TrainingLog, configure_logging, log_end, log_schedule, log_start, next_commands
from tools.run.preemption import EXIT_CODE, INTERRUPTED, Preemption
from tools.run.profile import profiled
from tools.run.resources import choose_autocast_dtype, image_dtype, share_threads, with_defaults
from tools.run.resume import find_saved_state, restore, settings_of_run
from tools.run.run_folder import RunFolder
from tools.run.run_lock import sole_run
from tools.run.saver import Saver


def main(arguments: Sequence[str] | None = None) -> None:
    # A script that calls this goes on after a successful run.
    run_command(lambda: run(parse(arguments)), INTERRUPTED, exits=False)


def run(config: Config) -> int:
    """Runs a training job. Returns the exit status: 0, or `EXIT_CODE` if a signal stopped the run."""
    with join_world(config.device) as world, contextlib.ExitStack() as stack:
        configure_logging(world)
        path = world.from_main(config.run_dir or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        stack.enter_context(sole_run(path, world, waits=config.resume == "auto"))
        shards = open_splits(config.data, world)
        config = with_defaults(config, world, shards.train.num_samples)
        saved = find_saved_state(path, config, world)
        started = time.monotonic()
        config = with_precision(config, world, saved)
        autocast_dtype = choose_autocast_dtype(config.precision, world.device)
        torch_threads, loader_threads = share_threads(config.torch_threads, config.data.threads, world.device, world.local_size)
        torch.set_num_threads(torch_threads)
        spec = LoaderSpec(
            split="train",
            batch_size=config.batch_size,
            image_size=config.image_size,
            device=world.device,
            dtype=image_dtype(autocast_dtype, world.device),
            num_classes=shards.num_classes,
            num_threads=loader_threads,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            quarantine=path / QUARANTINE,
        )
        train_loader = stack.enter_context(build_loader(config.data, spec, shards=shards.train))
        spec = dataclasses.replace(spec, split="valid")
        valid_loader = stack.enter_context(build_loader(config.data, spec, shards=shards.valid))
        job = build_job(
            config,
            world,
            num_classes=shards.num_classes,
            classes=shards.train.classes,
            class_weights=read_class_weights(config, shards, world),
            autocast_dtype=autocast_dtype,
            steps_per_epoch=count_steps(len(train_loader), config.accumulate_steps),
            initial=None if saved else initial_weights(config, world),
            preprocessing=preprocessing(config.image_size),
        )
        meter = Meter(world.device)
        if saved:
            restore(saved, job, train_loader, meter)
        settings = settings_of_run(config, job)
        folder = stack.enter_context(RunFolder(path, settings, world, resumed=saved))
        del saved  # otherwise its tensors would stay in memory during the run
        preemption = stack.enter_context(Preemption(world.size))
        saver = stack.enter_context(Saver(config.checkpoint, job, train_loader, meter, folder, preemption, started))
        log_start(job, shards, path, torch_threads, loader_threads)
        log_schedule(job, config)
        log = TrainingLog(job, meter, folder, every=config.log_every or 1, max_nonfinite_steps=config.max_nonfinite_steps)
        threads = stack.enter_context(considerate_threads(world.device, world.size, is_fixed=config.has_fixed_threads))
        with profiled(config.profile, path, world) as profiler_step:
            train(Run(job, train_loader, valid_loader, meter, folder, saver, log, config.mix, profiler_step, threads))
        if saver.must_stop:
            return EXIT_CODE
        num_bad = train_loader.num_bad_samples + valid_loader.num_bad_samples
        log_end(job, num_bad, meter, path, next_commands(config, shards.valid, path))
        return 0


def initial_weights(config: Config, world: World) -> InitialWeights | None:
    """Reads the weights that a new run starts from, if they are not random."""
    arch, partial, weights = config.model.named, config.init_from_partial, config.init_from_weights
    path = published_weights(arch, world) if is_published(config.init_from) else config.init_from
    return read_initial_weights(path, is_partial=partial, weights=weights, arch=arch)


@dataclass(frozen=True)
class Run:
    """The parts of a training run."""

    job: Job
    train_loader: Loader
    valid_loader: Loader
    meter: Meter
    folder: RunFolder
    saver: Saver
    log: TrainingLog
    mix: MixConfig
    profiler_step: Callable[[], None]
    threads: Threads


def train(run: Run) -> None:
    """Trains the remaining epochs. If a signal asks the run to stop, saves a checkpoint and returns early."""
    job, saver = run.job, run.saver
    total = job.config.epochs * job.steps_per_epoch
    is_hidden = None if job.world.is_main else True  # None: hidden unless stderr is a terminal
    with logging_redirect_tqdm(), tqdm(total=total, initial=job.step, unit="step", disable=is_hidden) as progress:
        for epoch in range(job.validated + 1, job.config.epochs + 1):
            job.epoch = epoch
            if job.step < epoch * job.steps_per_epoch:  # otherwise the resumed checkpoint lacks only the validation
                train_epoch(run, progress)
            if not saver.must_stop:
                validate(run)
            if saver.must_stop:
                break
        else:
            run.folder.write_results(job.scores)
        saver.finish()


def train_epoch(run: Run, progress: "tqdm[None]") -> None:
    """Trains one epoch, or the rest of it after resuming."""
    job, saver = run.job, run.saver
    job.model.train()
    end = job.epoch * job.steps_per_epoch
    for batch in run.meter.batches(run.train_loader):
        if job.step == end:  # the remaining batches are too few for a step
            continue
        run.threads.adapt()
        number = (job.step * job.config.accumulate_steps + job.micro_step) * job.world.size + job.world.rank
        image, target = mix(
            run.mix, batch["image"], batch["target"], num_classes=job.num_classes, step=number, seed=job.config.seed
        )
        if number == 0:
            run.folder.write_batch(image, target, job.classes)
        lr = job.lr
        if not train_step(job, image, target):
            continue
        progress.update()
        run.profiler_step()
        run.log.step(run.train_loader, lr)
        if job.step < end and saver.due():
            saver.save()
            if saver.must_stop:
                return
    run.log.pace()
    # Only now is the loader at the start of the next epoch, so a checkpoint of the last step has to wait until here.
    if saver.due():
        saver.save()


def train_step(job: Job, image: Tensor, target: Tensor) -> bool:
    """Runs forward and backward passes for one batch, and updates the weights if it completes the step.

    The host does not wait for the device. A step with non-finite gradients leaves weights, momentum, and batch
    normalization statistics unchanged. The learning rate schedule still advances, and the average is still updated.

    Args:
        job: The state, which changes.
        image: `(N, 3, H, W)` on the device, normalized.
        target: `(N,)` int64 class numbers, or `(N, num_classes)` float32 probabilities.

    Returns:
        Whether the step is complete.
    """
    config = job.config
    # cuDNN times its kernels once per shape. For the few smaller batches, the timing would cost more than it saves.
    torch.backends.cudnn.benchmark = len(image) == config.batch_size and not config.deterministic
    if job.micro_step == 0:
        job.keep_statistics()
    job.micro_step += 1
    is_last = job.micro_step == config.accumulate_steps
    if isinstance(job.forward, DistributedDataParallel):
        job.forward.require_backward_grad_sync = is_last  # like its `no_sync`: gradients are reduced once per step
    with job.autocast(), record_function("forward"):
        losses = training_loss(
            job.forward(image),
            target,
            label_smoothing=config.model.label_smoothing,
            aux_weight=config.model.aux_weight,
            class_weights=job.class_weights,
        )
    with record_function("backward"):
        job.scaler.scale(losses.total / config.accumulate_steps).backward()
    parts = torch.stack([torch.zeros_like(losses.total) if part is None else part.detach() for part in losses])
    job.parts += parts / config.accumulate_steps
    if is_last:
        with record_function("update"):
            update(job)
    return is_last


def update(job: Job) -> None:
    """Updates the weights, their average, and the learning rate."""
    job.scaler.unscale_(job.optimizer)
    gradients = [parameter.grad for parameter in job.parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    skip = 1 - norm.isfinite().float()
    if job.config.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(job.parameters, job.config.grad_clip, norm)
    job.optimizer.found_inf = skip  # type: ignore[attr-defined]  # as `scaler.step` does; if 1, the fused kernel changes nothing
    job.optimizer.step()
    job.scaler.update()
    job.optimizer.zero_grad()
    job.scheduler.step()
    job.restore_statistics(skip)
    job.ema.update_parameters(job.model)
    job.count_step(norm, skip)


def validate(run: Run) -> None:
    """Scores the raw and the averaged weights, and saves a checkpoint. In a single process, a signal interrupts the scoring."""
    job, saver, valid = run.job, run.saver, run.valid_loader
    run.threads.settle()
    evaluation = evaluate(
        job.model,
        job.ema,
        valid,
        num_classes=job.num_classes,
        world=job.world,
        autocast=job.autocast,
        is_interrupted=lambda: job.world.size == 1 and saver.is_signalled,
    )
    if evaluation is not None:
        run.log.validation(evaluation, sum(job.world.gather(valid.num_bad_samples)))
        job.scores, job.validated = evaluation.scores(), job.epoch
    saver.save(best=max(job.scores["top1"], job.scores["ema_top1"]) if evaluation is not None else None)
    saver.agree_to_stop(job.epoch < job.config.epochs or evaluation is None)


if __name__ == "__main__":
    gc.freeze()  # later collections skip what was imported, which would take them a tenth of a second
    gc.enable()
    main()
