"""Checkpoints of a run: which are kept, damage, writing in the background, killed writers, full disks."""

import copy
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import ModelConfig, StepConfig
from model.distributed import alone as alone_on
from model.job import build_job
from tests.helpers.command import run_main
from tests.helpers.runs import alone, arguments, assert_same, environment, finish, is_equal, metrics, start
from tools.run import checkpoints
from tools.run.checkpoints import Checkpoints, newest_checkpoint
from train import train_step

STATE = {"weights": torch.arange(24, dtype=torch.float32), "step": 3, "class": "ant"}


def state(step: int) -> dict[str, Any]:
    return {**STATE, "step": step}


def save(run: Path, *steps: int, keep: int = 3, best: int = 0) -> None:
    """Saves these steps, one after the other."""
    saved = Checkpoints(run, keep)
    for step in steps:
        saved.save(state(step), step, is_best=step == best)
    saved.wait()
    saved.close()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def step_of(path: Path) -> int:
    return int(load_checkpoint(path)["step"])


def newest_step(run: Path) -> int:
    path, state = newest_checkpoint(run)
    assert path is not None
    assert state is not None
    assert is_equal(state, load_checkpoint(path))
    return int(state["step"])


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("has_links", [True, False])
def test_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, has_links: bool) -> None:
    def no_links(*arguments: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    assert newest_checkpoint(tmp_path) == (None, None)
    save(tmp_path, *(1, 2, 3, 5, 8, 13), keep=keep, best=3)
    kept = [f"step-{step:09d}.pt" for step in (5, 8, 13)[-keep:]]
    assert names(tmp_path) == kept
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "checkpoints" / kept[-1]
    assert (step_of(tmp_path / "last.pt"), step_of(tmp_path / "best.pt")) == (13, 3)
    assert (tmp_path / "last.pt").samefile(tmp_path / "checkpoints" / kept[-1]) == has_links
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "checkpoints", "last.pt"]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        content = content[: len(content) // 2]
    if how == "flipped":
        middle = len(content) // 2
        content = content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 8]) + content[middle + 8 :]
    path.write_bytes(b"" if how == "empty" else content)


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    save(tmp_path, 1, 2, 3)
    for step in (3, 2):
        damage(tmp_path / "checkpoints" / f"step-{step:09d}.pt", how)
    assert newest_step(tmp_path) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert caplog.messages[0].startswith(f"{tmp_path / 'checkpoints' / 'step-000000003.pt'} is damaged")
    assert names(tmp_path) == ["step-000000001.pt", "step-000000002.pt.damaged", "step-000000003.pt.damaged"]
    caplog.clear()
    assert newest_step(tmp_path) == 1
    assert not caplog.records


def test_when_all_are_damaged_the_run_does_not_begin_anew(shards: Path, tmp_path: Path) -> None:
    """A scheduler may start the run again and again."""
    save(tmp_path, 1, 2)
    for path in (tmp_path / "checkpoints").iterdir():
        damage(path, "truncated")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"step-000000002.pt is damaged.*the run has no checkpoint that can be read"
        ) as caught:
            newest_checkpoint(tmp_path)
        assert "\n" not in str(caught.value)
    status, printed, output = run_main(train.main, *arguments(shards, tmp_path))
    assert (status, printed) == (2, "")
    assert output.startswith("error: ")
    assert output.endswith("; start in another --run-dir\n")
    assert output.count("\n") == 1
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_no_damage_is_overlooked(tmp_path: Path) -> None:
    """Wherever a byte changes or the file ends, the checkpoint is refused or its content is unchanged."""
    save_checkpoint(tmp_path / "whole.pt", STATE)
    content, changed = (tmp_path / "whole.pt").read_bytes(), tmp_path / "changed.pt"

    def is_refused(damaged: bytes) -> bool:
        changed.write_bytes(damaged)
        try:
            loaded = load_checkpoint(changed)
        except ValueError as error:
            message = str(error)
        else:
            message = ""
        assert re.fullmatch(rf"{changed} is .+", message) if message else is_equal(loaded, STATE)
        return bool(message)

    assert not is_refused(content)
    assert all(is_refused(content[:end]) for end in range(0, len(content), 37))
    refused = [is_refused(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :]) for i in range(len(content))]
    assert sum(refused) > len(content) / 2  # the rest is padding


def test_writing_in_the_background_does_not_change_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training continues while the writer is delayed. The file holds the state at the time of `save`."""
    config = StepConfig(batch_size=4, model=ModelConfig(aux_logits=False))
    job = build_job(config, alone_on(torch.device("cpu")), num_classes=3, classes=None, autocast_dtype=None, steps_per_epoch=9)
    image, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    train_step(job, image, target)
    expected = copy.deepcopy(job.state_dict())
    may_write, real = threading.Event(), checkpoints.write_checkpoint

    def write_later(path: Path, state: dict[str, Any]) -> None:
        assert may_write.wait(60)
        real(path, state)

    monkeypatch.setattr(checkpoints, "write_checkpoint", write_later)
    saved = Checkpoints(tmp_path, 1)
    saved.save(job.state_dict(), job.step, is_best=False)
    job.scores["top1"] = 1.0
    for _ in range(2):
        train_step(job, image, target)
    may_write.set()
    saved.close()
    assert is_equal(load_checkpoint(tmp_path / "last.pt"), expected)
    assert not is_equal(job.state_dict(), expected)


@pytest.mark.parametrize(
    ("in_the_way", "message"),
    [
        ("checkpoints/step-000000002.pt", "checkpoints/step-000000002.pt: the checkpoint could not be saved"),
        ("checkpoints/.step-000000002.pt.tmp", "checkpoints/step-000000002.pt: the checkpoint could not be saved"),
        ("best.pt", "checkpoints/step-000000002.pt: the checkpoint could not be saved"),
        ("last.pt", "checkpoints/step-000000002.pt is saved, but the run cannot go on"),
        (".last.pt.tmp", "checkpoints/step-000000002.pt is saved, but the run cannot go on"),
    ],
)
def test_a_folder_in_the_way(tmp_path: Path, in_the_way: str, message: str) -> None:
    """The message is true, what was saved before is intact, and nothing is left over."""
    save(tmp_path, 1)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / in_the_way).mkdir()
    with pytest.raises(
        OSError, match=rf"^{tmp_path}/{re.escape(message)} \((\S+ -> )?{tmp_path}/{re.escape(in_the_way)}: [A-Z][\w ]+\)"
    ):
        save(tmp_path, 2, best=2)
    assert step_of(tmp_path / "checkpoints" / "step-000000001.pt") == 1
    saved = tmp_path / "checkpoints" / "step-000000002.pt"
    assert saved.is_file() == ("is saved" in message)
    assert not saved.is_file() or step_of(saved) == 2
    leftover = [path for path in tmp_path.rglob(".*") if path != tmp_path / in_the_way]
    assert leftover == []


def test_a_file_instead_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(OSError, match=r"step-000000001.pt: the checkpoint could not be saved \(\S+: (File exists|Not a)"):
        save(tmp_path, 1)


WRITE_ON_AND_ON = """
import sys
from pathlib import Path
import torch
from tools.run.checkpoints import Checkpoints
saved = Checkpoints(Path(sys.argv[1]), 3)
for step in range(1, 1000):
    saved.save({"step": step, "weights": torch.full((8_000_000,), float(step))}, step, is_best=True)
"""


def test_killed_while_one_is_being_written(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITE_ON_AND_ON, tmp_path], env=environment())
    halfway: list[Path] = []
    deadline = time.monotonic() + 60
    while not halfway:
        assert process.poll() is None
        assert time.monotonic() < deadline
        process.send_signal(signal.SIGSTOP)  # otherwise it might finish before it is killed
        if len(list(tmp_path.glob("checkpoints/step-*.pt"))) == 3:
            halfway = [path for path in tmp_path.glob("checkpoints/.*.tmp") if path.stat().st_size]
        if not halfway:
            process.send_signal(signal.SIGCONT)
            time.sleep(0.005)
    process.kill()
    process.wait()
    kept = [path for path in (tmp_path / "checkpoints").iterdir() if path not in halfway]
    assert len(kept) >= 3
    for path in (*kept, tmp_path / "last.pt", tmp_path / "best.pt"):
        loaded = load_checkpoint(path)
        assert loaded["weights"].eq(loaded["step"]).all()
    assert newest_checkpoint(tmp_path)[0] == max(kept)
    save(tmp_path, 1000)  # another step has another temporary file
    assert names(tmp_path) == [*sorted(path.name for path in kept)[-2:], "step-000001000.pt"]


def test_a_run_goes_on_before_the_damage_and_ends_the_same(shards: Path, whole: Path, tmp_path: Path) -> None:
    """Three checkpoints are damaged. `--checkpoint.every-minutes` is so short that each step is saved."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in (10, 12, 14):
        (run / "checkpoints" / f"step-{step:09d}.pt").unlink()
    for step, how in ((8, "truncated"), (7, "flipped"), (6, "empty")):
        damage(run / "checkpoints" / f"step-{step:09d}.pt", how)
    more = ("--checkpoint.every-minutes", 1e-6, "--checkpoint.keep", 4)
    output = finish(start([*alone(), *arguments(shards, run, *more)], tmp_path))
    assert output.count("falling back to the one before") == 3
    assert "resuming after step 4\n" in output
    assert_same(run, whole)
    assert names(run)[-7:] == [
        *("step-000000006.pt.damaged", "step-000000007.pt.damaged", "step-000000008.pt.damaged"),
        *(f"step-{step:09d}.pt" for step in (11, 12, 13, 14)),
    ]


FILES_STAY_SMALL = """
import resource
import train

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

real = train.train_step

def train_step(job, image, target):
    limit({SIZES}.get(job.step, resource.RLIM_INFINITY))
    return real(job, image, target)

train.train_step = train_step
train.main()
"""


def test_metrics_that_find_no_space_are_a_warning(shards: Path, whole: Path, tmp_path: Path) -> None:
    """A limit on the size of files simulates a full disk. At steps 3 and 4, half a line fits."""
    script = FILES_STAY_SMALL.replace("{SIZES}", "{2: 750, 3: 750}")
    output = finish(start([*alone(script), *arguments(shards, tmp_path / "run")], tmp_path))
    assert output.count("metrics cannot be written to") == 1
    assert "File too large" in output
    assert metrics(tmp_path / "run") == [line for line in metrics(whole) if line["step"] not in (3, 4)]
    ours, theirs = (load_checkpoint(run / "last.pt") for run in (tmp_path / "run", whole))
    assert is_equal(ours["model"], theirs["model"])


def test_a_state_that_finds_no_space_ends_the_run(shards: Path, whole: Path, tmp_path: Path) -> None:
    """The message names the file, no part of it is left, and the checkpoint before is intact."""
    run = tmp_path / "run"
    script = FILES_STAY_SMALL.replace("{SIZES}", "{step: 1_000_000 for step in range(9, 99)}")
    output = finish(start([*alone(script), *arguments(shards, run)], tmp_path), 1)
    assert output.splitlines()[-1] == (
        f"error: {run}/checkpoints/step-000000014.pt: the checkpoint could not be saved (File too large); "
        "earlier ones are intact"
    )
    assert "Traceback" not in output
    assert names(run) == ["step-000000007.pt"]
    [before, after] = (load_checkpoint(folder / "checkpoints" / "step-000000007.pt") for folder in (whole, run))
    assert is_equal(before["model"], after["model"])
