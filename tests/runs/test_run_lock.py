"""A run folder has one run at a time."""

import errno
import fcntl
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model.distributed import World, alone
from pipelines.files import close_locked, open_locked
from tests.helpers.command import run_main
from tests.helpers.runs import arguments
from tools.run import run_lock
from tools.run.run_lock import FILE_NAME, sole_run

WORLD = alone(torch.device("cpu"))


def entries(folder: Path) -> list[tuple[str, bytes]]:
    return sorted((path.name, path.read_bytes()) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_a_second_run_is_refused_in_one_line_and_touches_nothing(
    shards: Path, tmp_path: Path, resume: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.3)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / ".step-000000001.pt.tmp").write_bytes(b"the other run writes it")
    (run / "checkpoints" / "step-000000000.pt").write_bytes(b"damaged")
    with sole_run(run, WORLD, waits=False):
        before = entries(run)
        done = run_main(train.main, *arguments(shards, run, "--resume", resume))
        assert entries(run) == before
    assert done.status == 2
    assert done.stderr == (
        f"error: --run-dir {run}: another run (process {os.getpid()} on {os.uname().nodename}) writes there; "
        "wait for it, end it, or name another folder\n"
    )
    assert ("waiting up to 0 s for its end" in done.stdout) == (resume == "auto")


def test_the_lock_falls_with_its_process(tmp_path: Path) -> None:
    """A resumed run waits for the old process, which is still dying."""
    run = tmp_path / "run"
    run.mkdir()
    holder = subprocess.Popen(["flock", run / FILE_NAME, "sleep", "0.5"])
    while (lock := open_locked(run / FILE_NAME)) is not None:  # until it has the lock
        close_locked(lock)
    with sole_run(run, WORLD, waits=True):
        assert holder.wait() == 0
    assert not run.exists() or [*run.iterdir()] == []


def test_a_holder_that_has_just_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "open_locked", lambda path: None)  # and the file is removed before it can be read
    refused = pytest.raises(ValueError, match=r"another run \(it has just ended\) writes there; wait for it")
    with refused, sole_run(tmp_path, WORLD, waits=False):
        pass


@pytest.mark.parametrize("folder", ["", "x", "x/" * 3, "y" * 300])
def test_a_folder_that_cannot_be_written_to_is_named_with_its_flag(folder: str) -> None:
    refused = pytest.raises(
        ValueError, match=rf"^{Path('/proc', folder)}: cannot be written to \(.*\); name another folder with --run-dir$"
    )
    with refused, sole_run(Path("/proc", folder), WORLD, waits=False):
        pass


def test_an_empty_folder_is_not_left(tmp_path: Path) -> None:
    with sole_run(tmp_path / "runs" / "a", WORLD, waits=False):
        assert (tmp_path / "runs" / "a" / FILE_NAME).exists()
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "mine").mkdir()
    with sole_run(tmp_path / "mine", WORLD, waits=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # it was there before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_run(tmp_path, WORLD, waits=True):
        pass
    assert f"{tmp_path}: the file system has no locks ({os.strerror(number)}); make sure" in caplog.text


def test_another_error_of_the_lock_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), sole_run(tmp_path, WORLD, waits=False):
        pass


class Informed(World):
    """Another rank, to which rank 0 says that the folder is taken."""

    def from_main(self, value: Any) -> Any:
        return "process 1 on host"


def test_other_ranks_leave_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = Informed(rank=1, size=2, local_rank=1, local_size=2, device=WORLD.device)
    with pytest.raises(SystemExit) as exit_, sole_run(tmp_path / "run", other, waits=True):
        pass
    assert exit_.value.code == 2
    assert capfd.readouterr() == ("", "")
    assert [*tmp_path.iterdir()] == []
