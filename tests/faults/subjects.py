"""Work that is killed, disturbed and repeated: what does it, and what must be there in the end.

The functions run in processes of their own (`children.run`), so they and their arguments can be pickled.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import load_checkpoint
from pipelines.remote import transfer
from pipelines.remote.cache import ShardCache
from tests.faults import kill_switch
from tests.faults.children import command
from tests.helpers.runs import arguments
from tools.run.checkpoints import Checkpoints, newest_checkpoint

STEPS = 6
State = dict[str, str]


@dataclass(frozen=True)
class Subject:
    """Something that writes files into a folder.

    Attributes:
        name: What it is, in words.
        work: Function and arguments for `children.run`, given the folder.
        folder: Prepares a folder for the work.
        check: Raises `AssertionError` if a file that others may read is not whole; called after a kill.
        is_log: Whether a file, by name, is a log of this very process, which another one does not repeat.
    """

    name: str
    work: Callable[[Path], tuple[Any, ...]]
    folder: Callable[[Path], None]
    check: Callable[[Path, State], None]
    is_log: Callable[[str], bool] = lambda name: False

    def state(self, folder: Path) -> State:
        """Returns the digest of each file in the folder, hidden ones included, and "" for each folder."""
        return {name: digest for name, digest in files(folder).items() if not self.is_log(name)}


def files(folder: Path) -> State:
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*"))}


def whole_or_missing(*suffixes: str) -> Callable[[Path, State], None]:
    """Returns a check that files with these suffixes are as they will be in the end, if they are there."""

    def check(folder: Path, wanted: State) -> None:
        for name, digest in files(folder).items():
            if name.endswith(suffixes) and not Path(name).name.startswith("."):  # a temporary file is nobody's result
                assert wanted.get(name) == digest, name

    return check


def armed(folder: str, at: int, log: str, function: Callable[..., None], *rest: Any) -> None:
    """Runs a function that dies before change number `at` of a folder."""
    kill_switch.arm(folder, at, log)
    function(*rest)


def limited(num_bytes: int, function: Callable[..., None], *rest: Any) -> None:
    """Runs a function that dies when a file grows beyond a size."""
    kill_switch.end_at_size(num_bytes)
    function(*rest)


def conversion(images: Path, *more: object) -> Subject:
    def work(folder: Path) -> tuple[Any, ...]:
        return command("tools.shards.cli:main", "convert", images, folder, "--shard-samples", 5, *more)

    return Subject("convert", work, lambda folder: None, whole_or_missing(".tar", ".idx", "_info.json"))


def indexing(tars: Sequence[Path]) -> Subject:
    def prepare(folder: Path) -> None:
        for tar in tars:
            (folder / tar.name).symlink_to(tar)

    def work(folder: Path) -> tuple[Any, ...]:
        return command("tools.shards.cli:main", "index", folder, "--workers", 1)

    return Subject("index", work, prepare, whole_or_missing(".idx"))


def copy_all(folder: str, shards: Sequence[tuple[str, int]]) -> None:
    transfer.CHUNK_BYTES = 50_000
    with contextlib.closing(ShardCache(Path(folder), 10**8, 2)) as cache, cache.hold(shards):
        pass


def caching(shards: Sequence[tuple[str, int]]) -> Subject:
    return Subject("cache", lambda folder: (copy_all, str(folder), shards), lambda folder: None, whole_or_missing(".tar"))


def save_on(folder: str) -> None:
    """Saves the steps that a run has not saved yet."""
    _, state = newest_checkpoint(Path(folder))
    saved = Checkpoints(Path(folder), keep=2)
    saved.tidy()
    for step in range(1 if state is None else state["step"] + 1, STEPS + 1):
        state = {"step": step, "weights": torch.full((3000,), float(step)), "best": step - step % 2}
        saved.save(state, step, is_best=step % 2 == 0)
    saved.wait()
    saved.close()


def _check_checkpoints(folder: Path, wanted: State) -> None:
    for path in folder.rglob("[!.]*.pt"):
        state = load_checkpoint(path)
        assert state["weights"].eq(state["step"]).all(), path


SAVING = Subject("checkpoints", lambda folder: (save_on, str(folder)), lambda folder: None, _check_checkpoints)


def exporting(checkpoint: Path) -> Subject:
    def work(folder: Path) -> tuple[Any, ...]:
        return command("tools.export.cli:main", checkpoint, "-o", folder / "model.onnx")

    return Subject("export", work, lambda folder: None, whole_or_missing("model.onnx"))


def training(shards: Path, *more: object) -> Subject:
    def work(folder: Path) -> tuple[Any, ...]:
        words = arguments(shards, folder, "--checkpoint.every-steps", 3, "--checkpoint.keep", 2, *more)
        return command("train:main", *words)

    def check(folder: Path, wanted: State) -> None:
        for path in folder.rglob("[!.]*.pt"):
            load_checkpoint(path)

    return Subject("training", work, lambda folder: None, check, lambda name: "tfevents" in name)
