"""The command line of a measurement."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from tools.cli import check_output, run_command
from tools.parse import parse


def run_measurement(measure: Callable[..., int], name: str, arguments: Sequence[str] | None) -> None:
    """Calls a function with the options of `python -m tools.bench.NAME`, and ends the process; see `run_command`."""

    @functools.wraps(measure)
    def bind(*positional: object, **options: object) -> Callable[[], int]:
        return functools.partial(measure, *positional, **options)

    run_command(lambda: parse(lambda words: tyro.cli(bind, prog=f"python -m tools.bench.{name}", args=words), arguments)())


def check_latency(milliseconds: float) -> None:
    """Raises a `ValueError` if --latency is no time."""
    if not 0 <= milliseconds < math.inf:
        raise ValueError(f"--latency {milliseconds:g}: a number of milliseconds from 0 on is needed")


def check_json(path: Path | None) -> None:
    """Raises a `ValueError` if --json names no file that can be written, because the measurement takes long."""
    if path is not None:
        check_output("--json", path)
