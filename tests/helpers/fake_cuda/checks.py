"""The checks: training steps, the validation loop, and operations that are known to make the host wait or not."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from model.config import ModelConfig, StepConfig
from model.distributed import alone
from model.evaluation import evaluate
from model.job import Job, build_job
from pipelines.loader import Batch
from pipelines.mix import MixConfig, mix
from tests.helpers.fake_cuda.device import DEVICE
from tests.helpers.fake_cuda.watch import Watch
from train import train_step

Report = dict[str, Any]

# Raised if an operation needs the values of a fake tensor. The wait has been recorded by then.
VALUE_NEEDED = (DataDependentOutputException, DynamicOutputShapeException)

BATCH_SIZE, SIZE = 8, 64
WORLD = alone(DEVICE)


def make_job(
    autocast_dtype: torch.dtype | None, num_classes: int = 1000, class_weights: Sequence[float] | None = None, **options: Any
) -> Job:
    job = build_job(
        StepConfig(
            epochs=2,
            batch_size=BATCH_SIZE,
            image_size=SIZE,
            grad_clip=1.0,
            model=ModelConfig(transform_input=True),
            **options,
        ),
        WORLD,
        num_classes=num_classes,
        classes=None,
        class_weights=class_weights,
        autocast_dtype=autocast_dtype,
        steps_per_epoch=10,
    )
    job.model.train()
    return job


def make_batch(job: Job, batch_size: int = BATCH_SIZE) -> Batch:
    """Returns a batch as a loader does: channels_last, in half precision if the step computes in it."""
    dtype = torch.float32 if job.autocast_dtype is None else torch.float16
    image = torch.empty(batch_size, 3, SIZE, SIZE, device=DEVICE, dtype=dtype)
    target = torch.zeros(batch_size, device=DEVICE, dtype=torch.int64)
    return {"image": image.to(memory_format=torch.channels_last), "target": target}


def check_steps() -> dict[str, Report]:
    """Returns the report of each kind of step. All clip gradients and renormalize the input."""
    return {
        "bf16": check_step(torch.bfloat16),
        "fp16": check_step(torch.float16),
        "fp32": check_step(None),
        "mixup": check_step(torch.bfloat16, MixConfig(mixup_alpha=0.2)),
        "cutmix": check_step(torch.bfloat16, MixConfig(cutmix_alpha=1.0)),
        "two batches": check_step(torch.bfloat16, accumulate_steps=2),
        "deterministic": check_step(torch.bfloat16, deterministic=True),
        "weighted": check_step(torch.bfloat16, class_weights=[1.0] * 1000),
        "weighted mixup": check_step(torch.bfloat16, MixConfig(mixup_alpha=0.2), class_weights=[1.0] * 1000),
    }


def check_step(autocast_dtype: torch.dtype | None, mixing: MixConfig | None = None, **options: Any) -> Report:
    """Returns the report of two steps. The first creates state; launches are counted in the second alone."""
    job = make_job(autocast_dtype, **options)
    batch = make_batch(job)
    with Watch() as watch, contextlib.suppress(*VALUE_NEEDED):
        take_step(job, batch, mixing or MixConfig())
        watch.launches.clear()
        take_step(job, batch, mixing or MixConfig())
    return {**watch.report(), "is_over": job.step == 2}


def take_step(job: Job, batch: Batch, mixing: MixConfig) -> None:
    count = job.config.accumulate_steps
    for number in range(1, count + 1):
        image, target = mix(mixing, batch["image"], batch["target"], num_classes=job.num_classes, step=job.step, seed=0)
        assert train_step(job, image, target) == (number == count)


def check_evaluation() -> Report:
    """Returns the report of the loop over the validation split. The code after it reads values, so it is not watched."""
    job = make_job(torch.bfloat16, num_classes=10)  # few enough for a confusion matrix
    batches = [make_batch(job, batch_size) for batch_size in (BATCH_SIZE, BATCH_SIZE, BATCH_SIZE - 3)]
    with Watch() as watch, contextlib.suppress(*VALUE_NEEDED):
        loader: Any = watched(batches, watch)
        evaluate(job.model, job.ema, loader, num_classes=job.num_classes, world=WORLD, autocast=job.autocast)
    return {**watch.report(), "is_over": not watch.is_on}


def watched(batches: Iterable[Batch], watch: Watch) -> Iterator[Batch]:
    """Yields the batches, then ends the watch."""
    yield from batches
    watch.is_on = False


def check_waiting() -> dict[str, list[str]]:
    """Returns the waits of operations that make the host wait."""
    x, host = torch.zeros(8, 3, device=DEVICE), torch.zeros(8)
    number, mask = torch.zeros((), device=DEVICE), torch.ones(8, dtype=torch.bool, device=DEVICE)
    return {
        "item": waits(lambda: number.item()),
        "bool": waits(lambda: bool(number > 0)),
        "to the host": waits(lambda: x.to("cpu")),
        "to the device": waits(lambda: host.to(DEVICE)),
        "copy": waits(lambda: x[:, 0].copy_(host)),
        "list": waits(lambda: torch.tensor([1.0, 2.0], device=DEVICE)),
        "mask": waits(lambda: x[mask]),
        "indices in a list": waits(lambda: x[[0, 2]]),
        "indices on the host": waits(lambda: x[torch.zeros(2, dtype=torch.int64)]),
        "nonzero": waits(lambda: mask.nonzero()),
        "unique": waits(lambda: x.unique()),
        "repeat": waits(lambda: x.repeat_interleave(mask.long(), dim=0)),
        "filled with a tensor": waits(lambda: x.masked_fill(mask[:, None], number)),
        "number on the host": waits(lambda: torch.where(mask, x[:, 0], torch.tensor(0.0))),
    }


def check_not_waiting() -> dict[str, list[str]]:
    """Returns the waits of similar operations that do not make the host wait."""
    x, host = torch.zeros(8, 3, device=DEVICE), torch.zeros(8)
    mask, indices = torch.ones(8, dtype=torch.bool, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    return {
        "to the device": waits(lambda: host.to(DEVICE, non_blocking=True)),
        "on the device": waits(lambda: x.to(torch.float16)),
        "filled by a mask": waits(lambda: x.index_put_((mask,), torch.tensor(0.0))),
        "filled with a number": waits(lambda: x.masked_fill(mask[:, None], 0)),
        "mask on the host": waits(lambda: x[torch.ones(8, dtype=torch.bool)]),
        "indices": waits(lambda: x[indices]),
        "number": waits(lambda: torch.where(mask, x[:, 0], 0.0)),
        "repeat": waits(lambda: x.repeat_interleave(mask.long(), dim=0, output_size=8)),
    }


def waits(operation: Callable[[], Any]) -> list[str]:
    """Returns the waits of an operation."""
    with Watch() as watch, contextlib.suppress(*VALUE_NEEDED):
        operation()
    return watch.waits


def check_gradients() -> dict[str, list[str]]:
    """Returns the mismatches of a fused optimizer whose weight is channels_last, by the memory format of its gradient."""
    weight = torch.empty(4, 3, 3, 3, device=DEVICE)
    return {
        name: mismatches(weight.to(memory_format=torch.channels_last), weight.to(memory_format=memory_format))
        for name, memory_format in (("first", torch.contiguous_format), ("last", torch.channels_last))
    }


def mismatches(weight: Tensor, gradient: Tensor) -> list[str]:
    parameter = nn.Parameter(weight)
    parameter.grad = gradient
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    with Watch() as watch:
        optimizer.step()
    return watch.mismatches


def check_all() -> dict[str, Any]:
    return {
        "steps": check_steps(),
        "evaluation": check_evaluation(),
        "waiting": check_waiting(),
        "not waiting": check_not_waiting(),
        "gradients": check_gradients(),
    }
