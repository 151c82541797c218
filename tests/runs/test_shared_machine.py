"""Runs on a machine whose CPUs other programs use, too."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tools import cli, considerate
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
        measured = sharing.Sharing(1)
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


def test_threads_spin_for_a_short_time_and_the_users_setting_comes_first() -> None:
    assert settings_of_openmp({})["GOMP_SPINCOUNT"] == cli.SHORT_SPIN
    assert settings_of_openmp({"OMP_WAIT_POLICY": "active"})["OMP_WAIT_POLICY"] == "ACTIVE"
    assert settings_of_openmp({"GOMP_SPINCOUNT": "77"})["GOMP_SPINCOUNT"] == "77"


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_threads_sleep_while_others_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do from when others come to when they go. OpenMP's own threads are then more than there are CPUs."""
    monkeypatch.setenv("GOMP_SPINCOUNT", cli.SHORT_SPIN)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(considerate, "LOOK_SECONDS", 0.2)
    usage = considerate.Cores(run=1.0, others=0.0, idle=1.0)
    monkeypatch.setattr(considerate.Clock, "lap", lambda clock: (0.2, usage))
    count = lambda: len(os.listdir("/proc/self/task"))  # noqa: E731
    with considerate.considerate_threads(torch.device("cpu")):
        before = count()
        usage = considerate.Cores(run=1.0, others=1.0, idle=0.0)
        wait_until(lambda: count() >= before + len(os.sched_getaffinity(0)))
        usage = considerate.Cores(run=1.0, others=0.35, idle=0.5)
        time.sleep(0.5)
        assert "hold threads of OpenMP" in names()
        usage = considerate.Cores(run=1.0, others=0.0, idle=1.0)
        wait_until(lambda: "hold threads of OpenMP" not in names())
        wait_until(lambda: count() == before)
        usage = considerate.Cores(run=1.0, others=1.0, idle=0.0)
        wait_until(lambda: "hold threads of OpenMP" in names())
    assert not {"hold threads of OpenMP", "watch other programs"} & {*names()}


@pytest.mark.parametrize(
    ("device", "variables"),
    [("cuda", {"GOMP_SPINCOUNT": cli.SHORT_SPIN}), ("cpu", {"GOMP_SPINCOUNT": "77"}), ("cpu", {"OMP_WAIT_POLICY": "active"})],
)
def test_nobody_watches_where_nothing_is_to_be_changed(
    monkeypatch: pytest.MonkeyPatch, device: str, variables: dict[str, str]
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with considerate.considerate_threads(torch.device(device)):
        assert "watch other programs" not in names()


def test_the_clock_tells_who_uses_the_cores() -> None:
    num_cpus = len(os.sched_getaffinity(0))
    clock = considerate.Clock(1)
    with strangers(2 * num_cpus):
        time.sleep(1)
        clock.lap()
        time.sleep(1.5)
        seconds, cores = clock.lap()
    assert seconds == pytest.approx(1.5, abs=1)
    assert cores.others > 0.5 * num_cpus
    assert cores.idle < 0.25 * num_cpus
    assert cores.run < 0.5 * num_cpus
