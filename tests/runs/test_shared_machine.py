"""Runs on a machine whose CPUs other programs use, too."""

import contextlib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import train
from model.distributed import alone
from pipelines.machine import cpu_seconds
from tools import cli, considerate
from tools.run import sharing
from tools.run.cli import parse

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def strangers(number: int) -> Iterator[None]:
    """Context with busy processes that are no descendants of this one."""
    # They end by themselves if this process is killed.
    script = "import time; end = time.monotonic() + 120\nwhile time.monotonic() < end: pass"
    busy = shlex.join([sys.executable, "-c", script])
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
            with contextlib.suppress(ProcessLookupError):
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


def test_threads_spin_for_a_short_time_and_the_users_setting_comes_first() -> None:
    assert settings_of_openmp({})["GOMP_SPINCOUNT"] == cli.SHORT_SPIN
    assert settings_of_openmp({"OMP_WAIT_POLICY": "active"})["OMP_WAIT_POLICY"] == "ACTIVE"
    assert settings_of_openmp({"GOMP_SPINCOUNT": "77"})["GOMP_SPINCOUNT"] == "77"


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Context in which torch uses so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def uses(threads: considerate.Threads, number: int) -> bool:
    """Whether torch uses so many threads in the next step."""
    threads.adapt()
    return torch.get_num_threads() == number


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_threads_sleep_while_others_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do from when others come to when they go. OpenMP's own threads are then more than there are CPUs.

    Meanwhile there are fewer of them.
    """
    monkeypatch.setenv("GOMP_SPINCOUNT", cli.SHORT_SPIN)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(considerate, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(considerate, "TRIAL_SECONDS", 0.1)
    laps, usage = [0], (1.0, 1.0, 1.0, 1.0)  # seconds; CPU seconds of the run, busy, idle

    def lap(clock: considerate.Clock) -> tuple[float, float, float, float]:
        laps[0] += 1
        return usage

    def count() -> int:
        return len(os.listdir("/proc/self/task"))

    def wait_for_laps(number: int) -> None:
        start = laps[0]
        wait_until(lambda: laps[0] >= start + number)

    monkeypatch.setattr(considerate.Clock, "lap", lap)
    monkeypatch.setattr(considerate, "num_cpus", lambda: len(os.sched_getaffinity(0)))
    with torch_threads(2), considerate.considerate_threads(torch.device("cpu"), is_fixed=False) as threads:
        before = count()
        threads.adapt()
        assert torch.get_num_threads() == 2
        usage = (1.0, 1.0, 2.0, 0.0)
        wait_until(lambda: count() >= before + 2)
        wait_for_laps(2)
        wait_until(lambda: uses(threads, 1))
        usage = (1.0, 1.0, 1.35, 0.5)  # less than before, and not yet gone
        wait_for_laps(3)
        assert "hold threads of OpenMP" in names()
        usage = (1.0, 1.0, 1.0, 1.0)
        wait_until(lambda: "hold threads of OpenMP" not in names() and count() <= before)
        wait_for_laps(2)
        threads.adapt()
        assert torch.get_num_threads() == 2
        usage = (1.0, 1.0, 2.0, 0.0)
        wait_until(lambda: "hold threads of OpenMP" in names())
    assert not {"hold threads of OpenMP", "watch other programs"} & {*names()}


@pytest.mark.parametrize(
    ("device", "num_processes", "variables"),
    [
        ("cuda", 1, {"GOMP_SPINCOUNT": cli.SHORT_SPIN}),
        ("cpu", 2, {"GOMP_SPINCOUNT": cli.SHORT_SPIN}),
        ("cpu", 1, {"GOMP_SPINCOUNT": "77"}),
        ("cpu", 1, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_nobody_watches_where_nothing_is_to_be_changed(
    monkeypatch: pytest.MonkeyPatch, device: str, num_processes: int, variables: dict[str, str]
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with considerate.considerate_threads(torch.device(device), num_processes):
        assert "watch other programs" not in names()


@pytest.mark.parametrize(
    ("run", "others", "idle", "expected"),
    [
        (1.6, 0.4, 0.0, True),
        (1.7, 0.3, 0.0, False),
        (1.0, 0.7, 0.3, False),  # cores are free
        (94.0, 1.0, 1.0, False),  # a hundredth of many cores
        (85.0, 10.0, 1.0, True),
    ],
)
def test_what_disturbs(run: float, others: float, idle: float, expected: bool) -> None:
    assert considerate.Cores(run, others, idle).is_shared == expected


class Steps:
    """Steps of a run that take as long as `seconds_of` says for a number of threads, by a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, threads: considerate.Threads, seconds_of: dict[int, float]) -> None:
        self.now, self._threads, self._seconds_of = 0.0, threads, seconds_of
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def take(self, number: int) -> list[int]:
        """Takes some steps; returns the number of threads of each."""
        used = []
        for _ in range(number):
            self._threads.adapt()
            used.append(torch.get_num_threads())
            self.now += self._seconds_of[used[-1]]
        return used


@pytest.mark.parametrize(
    ("seconds_of", "is_fixed", "expected"),
    [({16: 1.0, 12: 0.8}, False, 12), ({16: 1.0, 12: 1.2}, False, 16), ({16: 1.0, 12: 0.8}, True, 16)],
)
def test_torch_has_fewer_threads_beside_others_if_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds_of: dict[int, float],
    is_fixed: bool,
    expected: int,
) -> None:
    with torch_threads(16), caplog.at_level(logging.INFO):
        threads = considerate.Threads(is_fixed=is_fixed)
        steps = Steps(monkeypatch, threads, seconds_of)
        assert set(steps.take(5)) == {16}
        threads.free = 12.6
        used = steps.take(200)
        assert set(used) == ({16} if is_fixed else {12, 16})
        assert used.count(expected) > 170
        threads.free = None
        assert set(steps.take(5)) == {16}
    said = [record.getMessage() for record in caplog.records]
    assert said == ["beside other programs, torch is faster with 12 of its 16 threads; --torch-threads 16 would keep all"] * (
        expected == 12
    )


def test_work_between_steps_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has all threads until a smaller number has proved to be better."""
    with torch_threads(2):
        threads = considerate.Threads(is_fixed=False)
        steps = Steps(monkeypatch, threads, {1: 0.8, 2: 1.0})
        threads.free = 1.0
        for _ in range(30):
            assert steps.take(1) == [2]
            threads.settle()
            steps.now += 1000
        assert steps.take(60).count(1) > 50
        threads.settle()
        assert torch.get_num_threads() == 1
        threads.free = None
        threads.settle()
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("flags", "is_fixed"),
    [((), False), (("--torch-threads", "1"), True), (("--deterministic",), True), (("--compile", "default"), True)],
)
def test_which_runs_keep_their_threads(flags: tuple[str, ...], is_fixed: bool) -> None:
    assert parse(["--data.train", "x", "--data.valid", "y", *flags]).has_fixed_threads == is_fixed


def test_training_adapts_its_threads(monkeypatch: pytest.MonkeyPatch, shards: Path, tmp_path: Path) -> None:
    calls = list[str]()

    class Threads(considerate.Threads):
        def adapt(self) -> None:
            calls.append("step")

        def settle(self) -> None:
            calls.append("validation")

    monkeypatch.setattr(considerate, "Threads", Threads)
    words = ["--data.train", shards, "--data.valid", shards, "--run-dir", tmp_path / "run", "--device", "cpu", "--epochs", 2]
    words += ["--batch-size", 4, "--image-size", 32, "--torch-threads", 1, "--data.threads", 1, "--model.no-aux-logits"]
    train.main([*map(str, words)])
    steps = calls.index("validation")
    assert steps > 0
    assert calls == [*["step"] * steps, "validation"] * 2


def test_the_clock_tells_who_uses_the_cores() -> None:
    num_cpus = len(os.sched_getaffinity(0))
    with strangers(2 * num_cpus):
        time.sleep(1)
        clock = considerate.Clock()
        time.sleep(1.5)
        seconds, own, busy, idle = clock.lap()
    assert seconds >= 1.5
    assert busy - own > 0.5 * num_cpus * seconds
    assert idle < 0.25 * num_cpus * seconds
    assert 0 <= own < 0.5 * num_cpus * seconds


def test_the_cpu_time_of_children_that_have_ended_counts() -> None:
    before = cpu_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert cpu_seconds() - before >= 0.45
