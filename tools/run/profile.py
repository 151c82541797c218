"""A trace of a few steps for chrome://tracing or Perfetto, and a table of what took longest in them."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from model.distributed import World
from pipelines.printable import counted

log = logging.getLogger("train")

SKIPPED_STEPS = 10  # caches fill, and kernels are chosen; the last of these steps warms up the profiler
FILE_NAME, TABLE_NAME = "trace.json", "profile.txt"
TABLE_ROWS = 30


@contextmanager
def profiled(num_steps: int | None, run_path: Path, world: World) -> Iterator[Callable[[], None]]:
    """Traces this many steps of rank 0, if any. Yields a function to call after each step."""
    if num_steps is None or not world.is_main:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    num_traced = 0

    def write(profiler: profile) -> None:  # also called at the end of a run that is too short
        nonlocal num_traced
        profiler.export_chrome_trace(str(run_path / FILE_NAME))
        order = "self_device_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=80)
        (run_path / TABLE_NAME).write_text(table)
        num_traced = profiler.step_num - SKIPPED_STEPS
        steps = counted(num_traced, "step")
        log.info("the trace of %s is in %s, and a summary in %s", steps, run_path / FILE_NAME, TABLE_NAME)

    steps = schedule(skip_first=SKIPPED_STEPS - 1, wait=0, warmup=1, active=num_steps, repeat=1)
    # There is only one cycle, so no events accumulate. Without acc_events, torch 2.11 warns about that.
    with profile(activities=activities, schedule=steps, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
    if num_traced < num_steps:
        needed = SKIPPED_STEPS + num_steps
        log.warning("--profile %d needs %d steps; %s traced", num_steps, needed, counted(num_traced, "was", "were"))
