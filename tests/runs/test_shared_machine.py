"""Runs on a machine whose CPUs other programs use, too."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.distributed import alone
from tools import cli
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


def settings_of_openmp(variables: dict[str, str]) -> dict[str, str]:
    """Returns the settings that OpenMP prints when a command imports torch."""
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "train.py", "--data.train", "x", "--data.valid", "x"]
    environment = {**clean, **variables, "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    return dict(re.findall(r"(\w+) = '(\w+)'", done.stderr))


def test_threads_sleep_while_they_wait_on_a_busy_machine() -> None:
    with strangers(2 * len(os.sched_getaffinity(0))):
        time.sleep(1)
        assert settings_of_openmp({})["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_users_setting_comes_first() -> None:
    with strangers(2 * len(os.sched_getaffinity(0))):
        time.sleep(1)
        assert settings_of_openmp({"OMP_WAIT_POLICY": "active"})["OMP_WAIT_POLICY"] == "ACTIVE"
        assert settings_of_openmp({"GOMP_SPINCOUNT": "77"})["GOMP_SPINCOUNT"] == "77"


def test_threads_spin_for_a_short_time_on_a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "others_are_busy", lambda: False)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit):
        cli.run_command(lambda: 0)
    assert (os.environ.get("OMP_WAIT_POLICY"), os.environ["GOMP_SPINCOUNT"]) == (None, cli.SHORT_SPIN)
