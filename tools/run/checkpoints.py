"""The saved states of a run: the newest few, the best, written while training goes on."""

import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import load_checkpoint, write_checkpoint

log = logging.getLogger("train")

FOLDER = "checkpoints"


def newest_checkpoint(run_path: Path) -> Path | None:
    """The newest saved state of a run that can be read, or None where there is none at all.

    What cannot be read is said, and renamed once an older one is there to take its place: it is not to be the newest again.

    Raises:
        ValueError: There are some, and not one can be read, or they have been taken away.
    """
    damaged: dict[Path, str] = {}
    for path in sorted((run_path / FOLDER).glob("step-*.pt"), reverse=True):
        try:
            load_checkpoint(path)
        except ValueError as error:
            damaged[path] = str(error)
            continue
        for newer, what in damaged.items():
            aside = newer.with_name(f"{newer.name}.damaged")
            log.warning("%s; taking the one before (it is kept as %s)", what, aside.name)
            newer.replace(aside)
        return path
    if damaged:  # all stay as they are: without any, the run would begin anew when it is started again
        [what, *_] = damaged.values()
        raise ValueError(f"{what}; not one of {len(damaged)} saved states can be read; begin in another --run-dir")
    if (run_path / "last.pt").exists():
        raise ValueError(
            f"{run_path} has a last.pt and no saved states in {FOLDER}/; to go on from it, copy it to "
            f"{FOLDER}/step-000000000.pt"
        )
    return None


class Checkpoints:
    """Writes states to `RUN/checkpoints/step-STEP.pt`, `RUN/last.pt` and `RUN/best.pt`, in a thread of its own.

    `last.pt` and `best.pt` are hard links, so they cost no space of their own; copies where the file system has no links.

    Args:
        run_path: The run's folder.
        keep: How many of the newest stay.
    """

    def __init__(self, run_path: Path, keep: int) -> None:
        self._run_path, self._keep = run_path, keep
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None

    def save(self, state: dict[str, Any], step: int, *, is_best: bool) -> None:
        """Copies a state and has the copy written; waits only if the one before is still being written.

        Raises:
            OSError: The one before could not be written; those before that are as they were.
        """
        self.wait()
        snapshot, copied = take_snapshot(state)
        self._pending = self._writer.submit(self._write, snapshot, copied, step, is_best)

    def wait(self) -> None:
        """Until everything is on the disk.

        Raises:
            OSError: It could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Ends the thread once it has written what it has."""
        self._writer.shutdown()

    def _write(self, state: dict[str, Any], copied: torch.cuda.Event | None, step: int, is_best: bool) -> None:
        if copied is not None:
            copied.synchronize()
        folder = self._run_path / FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:09d}.pt"
        temporary = path.with_name(f".{path.name}.tmp")
        for stale in folder.glob(".*.tmp"):  # of a run that was killed
            stale.unlink(missing_ok=True)
        try:
            write_checkpoint(temporary, state)
            if is_best:  # first: a run that is killed in between validates again, and finds it the best again
                _link(temporary, self._run_path / "best.pt")
            temporary.replace(path)
            _link(path, self._run_path / "last.pt")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(f"{path}: the run's state could not be saved ({error}); those saved before are whole") from error
        for old in sorted(folder.glob("step-*.pt"))[: -self._keep]:
            old.unlink(missing_ok=True)


def take_snapshot(state: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
    """A copy of a state on the CPU, and what to wait for before it can be read: from a GPU it is copied while that goes on."""
    on_gpu = False

    def copy(value: Any) -> Any:
        nonlocal on_gpu
        if isinstance(value, Tensor):
            if value.device.type != "cuda":
                return value.clone()
            on_gpu = True
            return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copy(item) for item in value)
        return value

    snapshot = copy(state)
    if not on_gpu:
        return snapshot, None
    copied = torch.cuda.Event()
    copied.record()
    return snapshot, copied


def _link(source: Path, target: Path) -> None:
    """Another name for a file, in place of what had that name; a copy where the file system knows no hard links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        try:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    temporary.replace(target)
