"""Runs on a machine whose CPUs other programs use, too."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.distributed import alone
from tools.run import sharing

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def strangers(number: int) -> Iterator[None]:
    """Context with busy processes that are no descendants of this one."""
    busy = f"{sys.executable} -c 'while True: pass'"
    started = subprocess.run(
        ["sh", "-c", " ".join(f"{busy} > /dev/null 2>&1 & echo $!;" for _ in range(number))],
        capture_output=True,
        text=True,
        check=True,
    )
    try:
        yield
    finally:
        for pid in started.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


def test_others_are_reported_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sharing, "FEWEST_SECONDS", 1.0)
    num_cpus = len(os.sched_getaffinity(0))
    with strangers(2 * num_cpus), caplog.at_level(logging.WARNING):
        time.sleep(1)  # until they are busy
        measured = sharing.Sharing(alone(torch.device("cpu")))
        for _ in range(2):
            time.sleep(1.5)
            measured.epoch()
    [line] = [record.getMessage() for record in caplog.records]
    used, _, rest = line.removeprefix("other programs used ").partition(
        f" of the {num_cpus} CPUs during this epoch, and this run 0."
    )
    assert float(used) == pytest.approx(num_cpus, abs=0.25 * num_cpus)
    assert rest.endswith("times as fast")


@pytest.mark.parametrize(
    ("variables", "policy"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "1000"}, None)],
)
@pytest.mark.parametrize("command", [["train.py", "--data.train", "x", "--data.valid", "x"], ["-m", "tools.predict", "x", "x"]])
def test_threads_sleep_while_they_wait(command: list[str], variables: dict[str, str], policy: str | None) -> None:
    """OpenMP prints its settings when torch loads it. Those of the user come first."""
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = {**clean, **variables, "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    shown = done.stderr.count(f"OMP_WAIT_POLICY = '{policy}'") if policy else done.stderr.count("GOMP_SPINCOUNT = '1000'")
    assert shown == 1, done.stderr
