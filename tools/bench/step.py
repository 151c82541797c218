"""`python -m tools.bench.step` compares the trainer's step with the barest loop that does the same arithmetic."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.optim import SGD

from model.distributed import World, alone, choose_device
from model.googlenet import GoogLeNet
from model.loss import training_loss
from model.optim import build_scheduler
from tools.bench.command import check_json, run_measurement
from tools.run.config import Config
from tools.run.cpu_precision import with_precision
from tools.run.resources import choose_autocast_dtype, with_batch_size
from tools.shards.parallel import require_positive
from tools.throughput.hardware import versions
from tools.throughput.loops import NUM_CLASSES, device_name, make_loader, make_trainer, measured
from tools.throughput.report import Column, Report, Row, Table
from tools.throughput.rounds import take_turns

MANY_SAMPLES = 1_281_167  # ImageNet's; the default batch size depends on it
COLUMNS = (
    Column("seconds", "ms", ",.2f", scale=1000),
    Column("ratio", "ratio", ".3f", interval=True, of="seconds"),
    Column("cpu_seconds", "CPU ms", ",.2f", scale=1000),
    Column("cpu_ratio", "ratio", ".3f", interval=True, of="cpu_seconds"),
)


def step(
    *,
    batch_size: int = 0,
    image_size: int = 224,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto",
    torch_threads: int | None = None,
    steps: int | None = None,
    rounds: int = 10,
    json: Path | None = None,
) -> int:
    """Compare the trainer's step with the barest loop that does the same arithmetic.

    Both take the same batch, which lies on the device. The difference is the trainer's bookkeeping.

    Args:
        batch_size: As --batch-size of train.py.
        image_size: Image side, in pixels.
        device: As --device of train.py.
        precision: As --precision of train.py.
        torch_threads: As --torch-threads of train.py. One thread is disturbed least by other processes.
        steps: Steps per turn; by default 20 on a GPU, 1 on a CPU.
        rounds: Turns of each loop.
        json: File for all figures.
    """
    require_positive("steps", steps)
    require_positive("rounds", rounds)
    check_json(json)
    chosen = choose_device(device)
    steps = steps or (20 if chosen.type == "cuda" else 1)
    # The epochs only matter for the schedule, which must not end.
    config = Config(epochs=1000, batch_size=batch_size, image_size=image_size, precision=precision, torch_threads=torch_threads)
    if torch_threads is not None:
        torch.set_num_threads(torch_threads)
    world = alone(chosen)
    config = with_precision(with_batch_size(config, world, MANY_SAMPLES), world)
    autocast_dtype = choose_autocast_dtype(config.precision, chosen)
    loops = [make(config, world, autocast_dtype, steps) for make in (make_barest, make_trainer)]
    barest, trainer = (measured(loop, steps, chosen) for loop in loops)
    outcomes = take_turns({"barest loop": barest, "trainer": trainer}, rounds)
    rows = [Row.of(name, outcome, COLUMNS, outcomes["barest loop"], name=name) for name, outcome in outcomes.items()]
    arithmetic, threads = str(autocast_dtype or torch.float32).removeprefix("torch."), torch.get_num_threads()
    settings = {"device": device_name(chosen), "arithmetic": arithmetic, "batch_size": config.batch_size}
    settings |= {"image_size": image_size, "steps": steps, "torch_threads": threads}
    Report(
        heading="{steps} steps of {batch_size} images of {image_size} pixels per turn; {arithmetic} on {device}, "
        "{torch_threads} threads".format(**settings),
        tables=[Table("", COLUMNS, rows)],
        settings=settings,
        versions=versions("torch"),
    ).publish(json)
    return 0


def make_barest(config: Config, world: World, autocast_dtype: torch.dtype | None, steps: int) -> Callable[[], None]:
    """Returns a loop of network, loss, optimizer, schedule, and weight average on one batch, and nothing else."""
    torch.manual_seed(config.seed)
    device_type = world.device.type
    model = GoogLeNet(NUM_CLASSES, config.model.aux_logits, dropout=config.model.dropout)
    model = model.to(world.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    parameters = [*model.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    lr = config.optim.scaled(config.optim.peak_lr, config.global_batch_size(world.size))
    optimizer = SGD(groups, lr=lr, momentum=config.optim.momentum, nesterov=config.optim.momentum > 0, fused=True)
    scheduler = build_scheduler(optimizer, config.optim, epochs=config.epochs, steps_per_epoch=steps)
    scaler = torch.amp.GradScaler(device_type, enabled=autocast_dtype == torch.float16)
    newest = [tensor.detach() for tensor in (*parameters, *model.buffers()) if tensor.is_floating_point()]
    averaged: list[Tensor] = copy.deepcopy(newest)
    [batch] = make_loader(config, world.device, autocast_dtype, 1)
    image, target = batch["image"], batch["target"]

    def run() -> None:
        for _ in range(steps):
            with torch.autocast(device_type, autocast_dtype, enabled=autocast_dtype is not None):
                outputs, smoothing = model(image), config.model.label_smoothing
                loss = training_loss(outputs, target, label_smoothing=smoothing, aux_weight=config.model.aux_weight).total
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
            torch._foreach_lerp_(averaged, newest, 1 - config.model.ema_decay)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    run_measurement(step, "step", arguments)


if __name__ == "__main__":
    main()
