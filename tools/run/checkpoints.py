"""The checkpoints of a run: the newest few and the best. A thread writes them while training continues."""

import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import load_checkpoint, write_checkpoint
from tools.cli import reason_of

log = logging.getLogger("train")

FOLDER = "checkpoints"


def newest_checkpoint(run_path: Path) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
    """Returns the newest checkpoint of a run that can be read, and its content; `(None, None)` if the run has none.

    A damaged checkpoint is reported. It is renamed if an older one takes its place, so it is not the newest again.

    Raises:
        ValueError: The run has checkpoints, but none can be read, or the folder of checkpoints has been removed.
    """
    damaged: dict[Path, str] = {}
    for path in sorted((run_path / FOLDER).glob("step-*.pt"), reverse=True):
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            damaged[path] = str(error)
            continue
        for newer, what in damaged.items():
            aside = newer.with_name(f"{newer.name}.damaged")
            log.warning("%s; falling back to the one before (it is kept as %s)", what, aside.name)
            newer.replace(aside)
        return path, state
    if damaged:  # all keep their names: without any, the next start would begin from scratch
        [what, *_] = damaged.values()
        raise ValueError(f"{what}; the run has no checkpoint that can be read; start in another --run-dir")
    if (run_path / "last.pt").exists():
        raise ValueError(
            f"{run_path / FOLDER} has no checkpoint; to resume from {run_path / 'last.pt'}, copy it to "
            f"{run_path / FOLDER / 'step-000000000.pt'}"
        )
    return None, None


class Checkpoints:
    """Writes `RUN/checkpoints/step-STEP.pt`, `RUN/last.pt`, and `RUN/best.pt` in a thread.

    `last.pt` and `best.pt` are hard links, or copies if the file system has no links.

    Args:
        run_path: The folder of the run.
        keep: Number of recent checkpoints to keep.
    """

    def __init__(self, run_path: Path, keep: int) -> None:
        self._run_path, self._keep = run_path, keep
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None

    def save(self, state: dict[str, Any], step: int, *, is_best: bool) -> None:
        """Copies a state and writes the copy in the thread. Waits only if the thread is still writing the previous one.

        Raises:
            OSError: The previous checkpoint could not be written. Older ones are intact.
        """
        self.wait()
        snapshot, copied = take_snapshot(state)
        self._pending = self._writer.submit(self._write, snapshot, copied, step, is_best)

    def wait(self) -> None:
        """Waits until everything is on the disk.

        Raises:
            OSError: A checkpoint could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Ends the thread after its last checkpoint."""
        self._writer.shutdown()

    def _write(self, state: dict[str, Any], copied: torch.cuda.Event | None, step: int, is_best: bool) -> None:
        if copied is not None:
            copied.synchronize()
        folder = self._run_path / FOLDER
        path = folder / f"step-{step:09d}.pt"
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            folder.mkdir(exist_ok=True)
            for stale in folder.glob(".*.tmp"):  # left by a killed run: this run alone writes here, see run_lock.py
                stale.unlink(missing_ok=True)
            write_checkpoint(temporary, state)
            try:
                if is_best:  # first: a run killed in between validates again and finds the same best
                    _link(temporary, self._run_path / "best.pt")
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise OSError(f"{path}: the checkpoint could not be saved ({reason_of(error)}); earlier ones are intact") from error
        self.tidy()

    def tidy(self) -> None:
        """Lets `last.pt` be the newest checkpoint, and deletes old ones. A killed run may not have come to it.

        Raises:
            OSError: A file cannot be replaced or deleted.
        """
        found, last = sorted((self._run_path / FOLDER).glob("step-*.pt")), self._run_path / "last.pt"
        if not found:
            return
        try:
            if not last.exists() or not last.samefile(found[-1]):
                _link(found[-1], last)
            for old in found[: -self._keep]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(f"{found[-1]} is saved, but the run cannot go on ({reason_of(error)})") from error


def take_snapshot(state: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
    """Copies a state to the CPU. Tensors of a GPU are copied asynchronously; wait for the event before reading the copy."""
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
    """Gives a file another name, replacing what had it. Copies the file if the file system has no hard links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
