"""A trace of a few steps for chrome://tracing or Perfetto."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from training.config import Config
from training.world import World

log = logging.getLogger("train")

SKIPPED_STEPS = 10  # in which caches fill and kernels are chosen; the last of them warms the profiler up
FILE_NAME = "trace.json"


@contextmanager
def profiled(config: Config, run_path: Path, world: World) -> Iterator[Callable[[], None]]:
    """Traces steps of rank 0 where `--profile` asks for it; gives what is to be called after each step."""
    if config.profile is None or not world.is_main:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    num_traced = 0

    def write(profiler: profile) -> None:  # called at the end of a run that is too short, too
        nonlocal num_traced
        profiler.export_chrome_trace(str(run_path / FILE_NAME))
        num_traced = profiler.step_num - SKIPPED_STEPS
        log.info("the trace of %d steps is in %s", num_traced, run_path / FILE_NAME)

    steps = schedule(skip_first=SKIPPED_STEPS - 1, wait=0, warmup=1, active=config.profile, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
    if num_traced < config.profile:
        needed = SKIPPED_STEPS + config.profile
        log.warning("--profile %d needs %d steps; %d were traced", config.profile, needed, num_traced)
