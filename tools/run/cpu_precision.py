"""The precision of a run on a CPU: bfloat16 where the CPU computes much faster with it."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from model.distributed import World
from pipelines.machine import has_bf16
from tools.run.config import Config

log = logging.getLogger("train")

# Each step converts the weights. For images of 32 pixels that costs what the faster arithmetic saves (docs/performance.md).
SMALLEST_IMAGE = 64
ENOUGH = 1.3  # CPUs with such instructions reach 1.5 and more
TURNS = 3


def with_precision(config: Config, world: World, saved: Mapping[str, Any] | None = None) -> Config:
    """Returns the settings of a run with the precision of a CPU chosen if it is left open.

    Args:
        config: The settings.
        world: This process and the others; rank 0 measures.
        saved: The state of a run that goes on, or `None` for a new run.
    """
    if config.precision != "auto" or world.device.type != "cpu":
        return config
    is_able = all_have_bf16(world)
    if saved is not None:
        is_chosen = is_able and saved["autocast_dtype"] == str(torch.bfloat16)
    else:
        is_chosen = is_able and _is_worth_measuring(config) and world.from_main(world.is_main and _is_faster())
    return dataclasses.replace(config, precision="bf16" if is_chosen else "fp32")


def all_have_bf16(world: World) -> bool:
    """Returns whether the CPUs of all processes have instructions for bfloat16."""
    return all(world.gather(has_bf16()))


def _is_worth_measuring(config: Config) -> bool:
    # Other networks may gain nothing. And a measurement must not decide what --deterministic computes.
    return not config.model.arch and not config.deterministic and config.largest_image_size >= SMALLEST_IMAGE


def _is_faster() -> bool:
    speed = speed_of_bf16()
    if speed >= ENOUGH:
        log.info("--precision bf16, chosen because this CPU computes %.1f times as fast with it as with fp32", speed)
    return speed >= ENOUGH


def speed_of_bf16() -> float:
    """Returns how many times as fast as with float32 a core of this CPU computes with bfloat16. This takes half a second.

    It measures a convolution of GoogLeNet, forward and backward.
    """
    weight = torch.ones(192, 64, 3, 3, requires_grad=True)
    images = torch.ones(4, 64, 56, 56).to(memory_format=torch.channels_last).requires_grad_()
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a core has the same instructions as all of them, and more threads would wait for each other
    try:
        for _ in range(1 + TURNS):
            for dtype, turns in seconds.items():
                started = time.thread_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    nn.functional.conv2d(images, weight, padding=1).sum().backward()
                turns.append(time.thread_time() - started)
    finally:
        torch.set_num_threads(before)
    # Each first turn prepares the kernels.
    return min(seconds[torch.float32][1:]) / min(seconds[torch.bfloat16][1:])
