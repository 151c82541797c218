"""Killed anywhere, and run again: the same bytes as without a kill, and nothing left over."""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import write_tree
from tests.faults import subjects
from tests.faults.campaign import LONG, Outcomes, seeds, size, some
from tests.faults.children import Child, kill_after, run
from tests.faults.kill_switch import environment
from tests.faults.subjects import armed, limited
from tests.faults.whole import NAMES, Whole, make_subject
from tests.helpers.runs import arguments, assert_same, finish, start, torchrun, workers

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 images, one of them damaged, for 3 shards."""
    folder = write_tree(tmp_path_factory.mktemp("images") / "images", 14)
    damaged = folder / "ant" / "000.jpg"
    damaged.write_bytes(damaged.read_bytes()[:900])
    return folder


_made: dict[str, Whole] = {}


@pytest.fixture
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """One for all tests of this process, by the subject's name."""
    name = request.param
    if name not in _made:
        _made[name] = Whole(make_subject(name, request), tmp_path_factory.mktemp(name) / "tries")
    return _made[name]


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    _made.clear()


MOST = {"convert": 12, "index": 20, "cache": 6, "checkpoints": 40, "training": 1}
# An export takes 15 s, almost all of it before it writes anything.
each_subject = pytest.mark.parametrize("whole", NAMES if LONG else [*MOST], indirect=True)


@each_subject
def test_before_a_change_of_the_file_system(whole: Whole) -> None:
    """Before each file that is opened for writing, renamed, linked, deleted or flushed, and each folder made or deleted."""
    outcomes = Outcomes()
    for at in some(where_it_matters(whole), MOST.get(whole.subject.name, 0)):
        folder = whole.new_folder()
        ended = run(armed, str(folder), at, "", *whole.subject.work(folder), log=whole.log)
        whole.try_one(folder, ended, f"change {at}", outcomes)
    outcomes.finish("kill", f"{whole.subject.name}: before a change of the file system", changes=len(whole.changes))


def where_it_matters(whole: Whole) -> list[int]:
    """Returns the numbers of all changes; in the short campaign, of a run only those that name the last checkpoint."""
    numbers = [*range(1, len(whole.changes) + 1)]
    if LONG or whole.subject.name != "training":
        return numbers
    return [number for number in numbers if "last.pt" in whole.changes[number - 1]][-1:]


@each_subject
def test_within_a_write(whole: Whole) -> None:
    """The process dies when the first file grows beyond a size, so in the middle of a write."""
    outcomes = Outcomes()
    for seed in seeds(size(1 if whole.subject.name == "training" else 3, 5 if whole.subject.name == "export" else 30)):
        num_bytes = random.Random(seed).randrange(whole.largest)
        folder = whole.new_folder()
        ended = run(limited, num_bytes, *whole.subject.work(folder), log=whole.log)
        whole.try_one(folder, ended, f"at {num_bytes} bytes", outcomes)
    outcomes.finish("kill", f"{whole.subject.name}: within a write")


TRIES = {
    "convert": (6, 60),
    "index": (2, 20),
    "cache": (4, 40),
    "checkpoints": (10, 100),
    "export": (0, 10),
    "training": (0, 60),
}


@each_subject
def test_at_a_random_instant(whole: Whole) -> None:
    outcomes = Outcomes()
    tries = size(*TRIES[whole.subject.name])
    seconds = duration(whole) if tries else 0.0
    for seed in seeds(tries):
        after = random.Random(seed).uniform(0, seconds)
        folder = whole.new_folder()
        child = Child(*whole.subject.work(folder), log=whole.log)
        ended = kill_after(child, after)
        whole.try_one(folder, ended, f"after {after:.3f} of {seconds:.3f} s (seed {seed})", outcomes)
    outcomes.finish("kill", f"{whole.subject.name}: at a random instant")


def duration(whole: Whole) -> float:
    started = time.monotonic()
    folder = whole.new_folder()
    assert run(*whole.subject.work(folder), log=whole.log).status == 0
    shutil.rmtree(folder)
    return time.monotonic() - started


@pytest.mark.skipif(not LONG, reason="each try takes a minute; tests/runs/test_distributed.py has one")
def test_two_ranks(shards: Path, tmp_path: Path) -> None:
    """Torchrun and both ranks are killed together, at a random instant."""
    outcomes = Outcomes()
    words = ("--batch-size", 4, "--checkpoint.every-steps", 3)
    started = time.monotonic()
    finish(start([*torchrun(2), *arguments(shards, tmp_path / "whole", *words)], tmp_path))
    seconds = time.monotonic() - started
    for seed in seeds(40):
        run_folder = tmp_path / f"run-{seed}"
        process = start([*torchrun(2), *arguments(shards, run_folder, *words)], tmp_path)
        time.sleep(random.Random(seed).uniform(0, seconds))
        for pid in (process.pid, *(workers(process).values() if process.poll() is None else ())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        try:
            finish(start([*torchrun(2), *arguments(shards, run_folder, *words)], tmp_path))
            assert_same(run_folder, tmp_path / "whole")
        except (AssertionError, ValueError, OSError) as error:
            outcomes.fail("wrong", f"seed {seed}: {str(error)[:1000]}")
        else:
            outcomes["the same as without a kill"] += 1
            shutil.rmtree(run_folder)
    outcomes.finish("kill", "training on two ranks: at a random instant")


def test_a_conversion_with_workers(images: Path, tmp_path: Path) -> None:
    """A worker kills the whole group before its N-th change; other conversions are killed at a random instant."""
    subject = subjects.conversion(images, "--workers", 2)
    whole = Whole(subject, tmp_path / "tries")
    outcomes = Outcomes()
    for seed in seeds(size(1, 20)):
        folder = whole.new_folder()
        child = Child(*subject.work(folder), log=whole.log, env=environment(str(folder), 1 + seed % 8, ""))
        ended = kill_after(child, 60 if seed % 2 == 0 else random.Random(seed).uniform(0, 4))
        whole.try_one(folder, ended, f"seed {seed}", outcomes)
    outcomes.finish("kill", "convert with two workers: before a change of a worker, and at a random instant")
