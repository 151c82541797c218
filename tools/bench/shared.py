"""`python -m tools.bench.shared` measures training steps while other processes use the CPUs."""

import functools
import itertools
import json as json_module
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipelines.machine import num_cpus
from tools.bench.command import check_json, run_measurement
from tools.cli import SHORT_SPIN
from tools.shards.parallel import require_positive
from tools.throughput.hardware import versions
from tools.throughput.process import run_measured
from tools.throughput.report import RATE, Column, Report, Row, Table
from tools.throughput.rounds import Turn, take_turns

# How threads of OpenMP wait for each other: as in train.py, and by OpenMP's default.
WAITS = {"as train.py": {"GOMP_SPINCOUNT": SHORT_SPIN}, "spinning": {"GOMP_SPINCOUNT": "300000"}}
COLUMNS = (
    RATE,
    Column("ratio", "of the quiet rate", ".3f", interval=True, of="images_per_second"),
    Column("cpu_milliseconds", "CPU ms an image", ",.1f"),
)


def shared(
    *,
    busy: tuple[int, ...] = (0, 1, 2, 4),
    batch_size: int = 16,
    image_size: int = 64,
    torch_threads: int | None = None,
    seconds: float = 10.0,
    rounds: int = 8,
    json: Path | None = None,
) -> int:
    """Measure training steps in float32 on a CPU while other processes are busy.

    While others use the CPUs, torch's threads sleep in train.py when they wait for each other, and there may be fewer of them.
    OpenMP's default is that they spin. Ratios are to that default without busy processes. A fair share is CPUs / (CPUs + busy
    processes).

    Args:
        busy: Numbers of busy processes.
        batch_size: Images per step.
        image_size: Image side, in pixels.
        torch_threads: Threads of torch; by default one per CPU.
        seconds: Time of a turn, after train.py has seen the others and tried numbers of threads.
        rounds: Turns of each row.
        json: File for all figures.
    """
    threads = torch_threads or num_cpus()
    for option, value in (("batch-size", batch_size), ("torch-threads", torch_threads), ("rounds", rounds)):
        require_positive(option, value)
    if not seconds > 0 or min(busy, default=-1) < 0 or image_size < 32:
        raise ValueError("--seconds above 0, --busy with numbers of at least 0, and --image-size of at least 32 are needed")
    check_json(json)
    task = json_module.dumps([batch_size, image_size, threads, seconds])
    names = {(wait, number): f"{wait}, {number} busy" for wait, number in itertools.product(WAITS, busy)}
    outcomes = take_turns({name: functools.partial(_turn, task, *case) for case, name in names.items()}, rounds)
    quiet = outcomes.get(names.get(("spinning", 0), ""))
    rows = [Row.of(name, outcomes[name], COLUMNS, quiet, name=name) for name in names.values()]
    settings = {"batch_size": batch_size, "image_size": image_size, "torch_threads": threads, "seconds": seconds}
    Report(
        heading="training steps of {batch_size} images of {image_size} pixels, {torch_threads} threads, "
        "{seconds:g} s a turn".format(**settings),
        tables=[Table("threads that wait", COLUMNS, rows)],
        settings=settings,
        versions=versions("torch"),
    ).publish(json)
    return 0


def _turn(task: str, wait: str, number: int) -> Turn:
    """Measures the steps in a process of their own, beside busy processes."""
    with tempfile.TemporaryDirectory() as logs:
        said = run_measured([sys.executable, "-m", "tools.bench.steps", task, str(number)], Path(logs), WAITS[wait]).said
    return {name: said[name] for name in ("images_per_second", "cpu_milliseconds")}


def main(arguments: Sequence[str] | None = None) -> None:
    run_measurement(shared, "shared", arguments)


if __name__ == "__main__":
    main()
