"""`throughput step`: the trainer's step against the barest loop that does the same arithmetic."""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import SGD

from model.distributed import World, alone, choose_device
from model.googlenet import googlenet
from model.job import build_job, global_batch_size, train_step
from model.loss import googlenet_loss
from model.optim import build_scheduler
from pipelines.meter import Meter
from pipelines.mix import mix
from pipelines.shards.order import Deal, InOrder
from pipelines.synthetic import SyntheticLoader
from tools.run.config import Config, choose_autocast_dtype, choose_batch_size, image_dtype
from tools.throughput.hardware import versions
from tools.throughput.report import Bar, Report
from tools.throughput.rounds import Statistic, summarize, take_turns

NUM_CLASSES = 1000
MANY_SAMPLES = 1_281_167  # ImageNet's, where the batch size is chosen
WARM_UP_STEPS = 3  # in which memory is found and kernels are chosen
TRAINER, BAREST = "trainer", "barest loop"


@dataclass(frozen=True)
class Turn:
    """Of one step, a mean over those of the turn: time on the clock, and of this process's threads on the CPU."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Result:
    """Of one loop, over the rounds; the ratios are to the barest loop in the same round."""

    name: str
    seconds: Statistic
    ratio: Statistic
    cpu_seconds: Statistic
    cpu_ratio: Statistic


@dataclass(frozen=True)
class StepReport(Report):
    """All that was measured."""

    device: str
    arithmetic: str
    batch_size: int
    image_size: int
    steps: int
    torch_threads: int
    results: tuple[Result, ...]
    unit: ClassVar[str] = "seconds a step"

    def bars(self) -> Iterable[Bar]:
        return [Bar("", result.name, result.seconds) for result in self.results]

    def __str__(self) -> str:
        lines = [
            f"steps of {self.batch_size} images of {self.image_size} pixels, {self.steps} a turn; {self.arithmetic} on "
            f"{self.device}, {self.torch_threads} threads; {self.hardware}",
            f"{'':<14}{'ms':>10}{'ratio':>8}{'':>16}{'CPU ms':>10}{'ratio':>8}",
        ]
        for result in self.results:
            cells = "".join(
                f"{1000 * seconds.median:>10,.2f}{ratio.median:>8.3f}{f'({ratio.low:.3f}-{ratio.high:.3f})':>16}"
                for seconds, ratio in ((result.seconds, result.ratio), (result.cpu_seconds, result.cpu_ratio))
            )
            lines.append(f"{result.name:<14}{cells}")
        return "\n".join(lines)


def benchmark(config: Config, *, steps: int, rounds: int) -> StepReport:
    """Takes turns of so many steps with both loops, on the same batch, which lies on the device.

    Args:
        config: Of its settings those count that make a step.
        steps: Of a turn.
        rounds: Turns of each loop.

    Raises:
        ValueError: A setting that this device does not have.
    """
    if config.torch_threads is not None:
        torch.set_num_threads(config.torch_threads)
    device = choose_device(config.device)
    world = alone(device)
    config = choose_batch_size(config, world, MANY_SAMPLES)
    autocast_dtype = choose_autocast_dtype(config.precision, device)
    loader = make_loader(config, device, autocast_dtype, steps)
    loops = {
        BAREST: make_barest(config, world, autocast_dtype, loader, steps),
        TRAINER: make_trainer(config, world, autocast_dtype, loader, steps),
    }
    outcomes = take_turns({name: measured(loop, steps, device) for name, loop in loops.items()}, rounds)
    base = outcomes[BAREST].turns
    results = [
        Result(
            name,
            summarize([turn.seconds for turn in outcome.turns]),
            summarize([turn.seconds / other.seconds for turn, other in zip(outcome.turns, base, strict=True)]),
            summarize([turn.cpu_seconds for turn in outcome.turns]),
            summarize([turn.cpu_seconds / other.cpu_seconds for turn, other in zip(outcome.turns, base, strict=True)]),
        )
        for name, outcome in outcomes.items()
    ]
    return StepReport(
        torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        str(autocast_dtype or torch.float32).removeprefix("torch."),
        config.batch_size,
        config.image_size,
        steps,
        torch.get_num_threads(),
        tuple(results),
        versions=versions(("torch",)),
    )


def make_loader(config: Config, device: torch.device, autocast_dtype: torch.dtype | None, steps: int) -> SyntheticLoader:
    """Of as many batches as steps, which lie on the device."""
    return SyntheticLoader(
        Deal(InOrder([steps * config.batch_size], 1), True, config.batch_size, 0, 1),
        image_size=config.image_size,
        device=device,
        dtype=image_dtype(autocast_dtype, device),
        num_classes=NUM_CLASSES,
    )


def make_trainer(
    config: Config, world: World, autocast_dtype: torch.dtype | None, loader: SyntheticLoader, steps: int
) -> Callable[[], None]:
    """What train.py does in an epoch of `steps` steps and one log line, but for writing that."""
    job = build_job(config, world, num_classes=NUM_CLASSES, classes=None, autocast_dtype=autocast_dtype, steps_per_epoch=steps)
    job.model.train()
    meter = Meter(world.device)

    def run() -> None:
        for batch in meter.batches(loader):
            options = {"num_classes": NUM_CLASSES, "step": job.step, "seed": config.seed}
            train_step(job, *mix(config.mix, batch["image"], batch["target"], **options))
        meter.take()
        job.sums.tolist()
        job.sums.zero_()

    return run


def make_barest(
    config: Config, world: World, autocast_dtype: torch.dtype | None, loader: SyntheticLoader, steps: int
) -> Callable[[], None]:
    """The network, the loss, the optimizer, the schedule and the average, on a batch that is at hand, and nothing else."""
    torch.manual_seed(config.seed)
    device_type = world.device.type
    model = googlenet(NUM_CLASSES, config.model.aux_logits, dropout=config.model.dropout)
    model = model.to(world.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    parameters = [*model.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    lr = config.optim.scaled(config.optim.lr, global_batch_size(config, world))
    optimizer = SGD(groups, lr=lr, momentum=config.optim.momentum, nesterov=config.optim.momentum > 0, fused=True)
    scheduler = build_scheduler(optimizer, config.optim, epochs=config.epochs, steps_per_epoch=steps)
    scaler = torch.amp.GradScaler(device_type, enabled=autocast_dtype == torch.float16)
    newest = [tensor.detach() for tensor in (*parameters, *model.buffers()) if tensor.is_floating_point()]
    averaged: list[Tensor] = copy.deepcopy(newest)
    batch = loader.next()
    assert batch is not None
    image, target = batch["image"], batch["target"]

    def run() -> None:
        for _ in range(steps):
            with torch.autocast(device_type, autocast_dtype, enabled=autocast_dtype is not None):
                options = {"label_smoothing": config.model.label_smoothing, "aux_weight": config.model.aux_weight}
                loss = googlenet_loss(model(image), target, **options).total
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
            torch._foreach_lerp_(averaged, newest, 1 - config.model.ema_decay)

    return run


def measured(loop: Callable[[], None], steps: int, device: torch.device) -> Callable[[], Turn]:
    """The loop as a competitor, warm."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def turn() -> Turn:
        wait()
        clock, cpu = time.perf_counter(), time.process_time()
        loop()
        wait()
        return Turn((time.perf_counter() - clock) / steps, (time.process_time() - cpu) / steps)

    for _ in range(-(-WARM_UP_STEPS // steps)):
        loop()
    return turn
