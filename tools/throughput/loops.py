"""Loops of training steps on a batch that lies on the device, as competitors."""

import time
from collections.abc import Callable

import torch

from model.distributed import World
from model.job import Job, build_job
from pipelines.build import LoaderSpec
from pipelines.loader import Batch
from pipelines.meter import Meter
from pipelines.mix import mix
from pipelines.synthetic import SyntheticLoader
from tools.run.config import Config
from tools.run.resources import image_dtype
from tools.throughput.rounds import Turn
from train import train_step

NUM_CLASSES = 1000
WARM_UP_STEPS = 3  # they allocate memory and choose kernels


def make_loader(config: Config, device: torch.device, autocast_dtype: torch.dtype | None, steps: int) -> SyntheticLoader:
    """Returns a loader that repeats one synthetic batch on the device, as many times as there are steps."""
    spec = LoaderSpec(
        split="train",
        batch_size=config.batch_size,
        image_size=config.image_size,
        device=device,
        dtype=image_dtype(autocast_dtype, device),
        num_classes=NUM_CLASSES,
    )
    return SyntheticLoader(steps * config.batch_size, spec)


def make_trainer(config: Config, world: World, autocast_dtype: torch.dtype | None, steps: int) -> Callable[[], None]:
    """Returns what train.py does in an epoch of that many steps with one log line, without writing the line."""
    loader = make_loader(config, world.device, autocast_dtype, steps)
    job = build_job(config, world, num_classes=NUM_CLASSES, classes=None, autocast_dtype=autocast_dtype, steps_per_epoch=steps)
    job.model.train()
    meter = Meter(world.device)

    def run() -> None:
        for batch in meter.batches(loader):
            take_step(job, config, batch)
        meter.take()
        job.sums.tolist()
        job.sums.zero_()

    return run


def take_step(job: Job, config: Config, batch: Batch) -> None:
    """Mixes a batch and trains on it, as train.py does."""
    options = {"num_classes": job.num_classes, "step": job.step, "seed": config.seed}
    train_step(job, *mix(config.mix, batch["image"], batch["target"], **options))


def measured(loop: Callable[[], None], steps: int, device: torch.device) -> Callable[[], Turn]:
    """Warms the loop up and returns it as a competitor.

    Its "seconds" on the clock and "cpu_seconds" of all threads of this process are means over the steps of a turn.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def turn() -> Turn:
        wait()
        clock, cpu = time.perf_counter(), time.process_time()
        loop()
        wait()
        return {"seconds": (time.perf_counter() - clock) / steps, "cpu_seconds": (time.process_time() - cpu) / steps}

    for _ in range(-(-WARM_UP_STEPS // steps)):
        loop()
    return turn


def device_name(device: torch.device) -> str:
    """Returns the name of a device for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
