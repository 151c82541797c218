"""Work that lasts, and several processes that work at once or wait for each other."""

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from tests.conftest import write_tree
from tests.faults import soak, subjects
from tests.faults.campaign import LONG, Outcomes, seeds, size
from tests.faults.children import Child, command
from tests.faults.whole import Whole
from tests.helpers.runs import arguments, assert_same, finish, start, torchrun, wait_for_step, workers

MINUTES = float(os.environ.get("SOAK_MINUTES", "120" if LONG else "0.15"))
RANKS = ("--batch-size", 4)  # 7 steps an epoch on each of two ranks


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def load_on_and_on(shards: str) -> None:
    """Loads epochs, and opens a new loader after every ten."""
    torch.set_num_threads(1)
    config = DataConfig(train=shards, valid=shards)
    spec = LoaderSpec(split="train", batch_size=8, image_size=32, device=torch.device("cpu"), num_threads=1, num_classes=3)
    while True:
        with build_loader(config, spec) as loader:
            for _ in range(10):
                for _ in loader:
                    pass


def work(kind: str, shards: Path, folder: Path) -> tuple[Any, ...]:
    if kind == "loading":
        return load_on_and_on, str(shards)
    return command("train:main", *arguments(shards, folder / "run", "--epochs", 100_000))


def watch(children: dict[str, Child], seconds: float) -> dict[str, list[soak.Sample]]:
    """Measures processes until this time is over, and kills them."""
    started, samples = time.monotonic(), {kind: list[soak.Sample]() for kind in children}
    while time.monotonic() - started < seconds:
        time.sleep(min(5, seconds / 100))
        for kind, child in children.items():
            assert child.runs(), child.wait().output
            samples[kind].append(soak.sample(child.pid, started))
    for child in children.values():
        child.kill()
        child.wait()
    return samples


def test_soak(shards: Path, tmp_path: Path) -> None:
    """Memory, threads and files of loading, and in the long form of training, stay flat."""
    kinds = ("loading", "training") if LONG else ("loading",)
    children = {kind: Child(*work(kind, shards, tmp_path), log=tmp_path / kind) for kind in kinds}
    folder = Path(os.environ["FAULTS_OUT"]).parent if "FAULTS_OUT" in os.environ else tmp_path
    for kind, samples in watch(children, 60 * MINUTES).items():
        soak.save(samples, folder, f"soak-{kind}")
        grown, outcomes = soak.growth(samples), Outcomes()
        for name, most in soak.MOST_GROWTH.items():
            if grown[name] > (most if LONG else 10 * most):  # a few seconds are mostly the beginning
                outcomes.fail("grows", f"{grown[name]:.1f} {name} in {MINUTES} minutes")
        outcomes["flat"] += not outcomes
        rounded = {name: round(value, 1) for name, value in grown.items()}
        largest = max(sample.megabytes for sample in samples)
        outcomes.finish("long", f"soak: {kind}", minutes=MINUTES, growth=rounded, megabytes=round(largest))


def run_of_two(shards: Path, run: Path, folder: Path) -> Any:
    return start([*torchrun(2), *arguments(shards, run, *RANKS)], folder)


def disturb(how: str, pid: int) -> None:
    """Stops a rank for a while, or slows it down by stopping it again and again."""
    pauses: Sequence[tuple[float, float]] = (
        [(0.3, 0.1)] * (200 if LONG else 10) if how == "slowed" else [(60.0 if LONG else 4.0, 0.0)]
    )
    for stopped, running in pauses:
        try:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(stopped)
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            return
        time.sleep(running)


@pytest.mark.parametrize("how", ["stopped", "slowed"] if LONG else ["stopped"])
def test_a_rank_that_is_late(how: str, shards: Path, tmp_path: Path) -> None:
    """The other rank waits for it, and the run ends as if undisturbed."""
    finish(run_of_two(shards, tmp_path / "whole", tmp_path))
    outcomes = Outcomes()
    for seed in seeds(size(1, 5)):
        run_folder = tmp_path / f"run-{seed}"
        process = run_of_two(shards, run_folder, tmp_path)
        wait_for_step(process, run_folder, 1 + seed % 5)
        disturb(how, workers(process)[seed % 2])
        try:
            finish(process)
            assert_same(run_folder, tmp_path / "whole")
        except AssertionError as error:
            outcomes.fail("wrong", f"seed {seed}: {str(error)[-1000:]}")
        else:
            outcomes["the run ended as if undisturbed"] += 1
    outcomes.finish("long", f"one of two ranks {how}")


@pytest.mark.skipif(not LONG, reason="tests/runs/test_distributed.py has one")
def test_a_rank_that_is_killed(shards: Path, tmp_path: Path) -> None:
    """Torchrun ends the other one, and names the rank that died."""
    outcomes = Outcomes()
    for seed in seeds(10):
        process = run_of_two(shards, tmp_path / f"run-{seed}", tmp_path)
        wait_for_step(process, tmp_path / f"run-{seed}", 1 + seed % 5)
        os.kill(workers(process)[seed % 2], signal.SIGKILL)
        try:
            output = finish(process, 1)
            assert f"rank      : {seed % 2} " in output, output[-2000:]
        except AssertionError as error:
            outcomes.fail("wrong", f"seed {seed}: {str(error)[-1000:]}")
        else:
            outcomes["the others end, and the rank is named"] += 1
    outcomes.finish("long", "one of two ranks killed")


def test_two_conversions_into_one_folder(tmp_path: Path) -> None:
    """At every distance in time: one of them is refused in one line, or finds the work done. The result is that of one."""
    images = write_tree(tmp_path / "images", 14)
    whole = Whole(subjects.conversion(images, "--workers", 1), tmp_path / "tries")
    outcomes = Outcomes()
    for seed in seeds(size(5, 100)):
        folder, draw = whole.new_folder(), random.Random(seed)
        first = Child(*whole.subject.work(folder), log=tmp_path / "first")
        time.sleep(draw.uniform(0, 0.4))
        second = Child(*whole.subject.work(folder), log=tmp_path / "second")
        _judge(whole, folder, [first.wait(), second.wait()], outcomes, seed)
    outcomes.finish("long", "two conversions into one folder")


def test_two_runs_into_one_folder(shards: Path, tmp_path: Path) -> None:
    """The second waits for the first, and finds its work done, or it is refused."""
    whole = Whole(subjects.training(shards, "--epochs", 1), tmp_path / "tries")
    outcomes = Outcomes()
    for seed in seeds(size(1, 20)):
        folder = whole.new_folder()
        first = Child(*whole.subject.work(folder), log=tmp_path / "first")
        time.sleep(random.Random(seed).uniform(0, 2))
        second = Child(*whole.subject.work(folder), log=tmp_path / "second")
        _judge(whole, folder, [first.wait(), second.wait()], outcomes, seed)
    outcomes.finish("long", "two runs into one folder")


def _judge(whole: Whole, folder: Path, ended: Sequence[Any], outcomes: Outcomes, seed: int) -> None:
    statuses = sorted(-1 if one.status is None else one.status for one in ended)
    refused = [one for one in ended if one.status == 2]
    if statuses not in ([0, 0], [0, 2]) or any("another " not in one.error for one in refused):
        outcomes.fail("wrong", f"seed {seed}: {[(one.status, one.output[-300:]) for one in ended]}")
        return
    try:
        whole.compare(folder)
    except (AssertionError, ValueError, OSError) as error:
        outcomes.fail("the folder is not as by one", f"seed {seed}: {str(error)[:500]}")
        return
    outcomes["one is refused" if refused else "the second finds the work done"] += 1
    shutil.rmtree(folder)
