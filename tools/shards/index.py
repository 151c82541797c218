"""`shards index`: index files for tars that something else has written, also for those on remote storage."""

import concurrent.futures
import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand
from tqdm import tqdm

from pipelines.remote.object_store import THREADS, glob_files, is_url, list_folder
from pipelines.shards.index import Sample, as_field, read_index, scan_tar, write_index
from pipelines.shards.shard_set import find_splits
from tools.shards.parallel import as_completed, check_workers, num_cpus, run

Action = Literal["written", "replaced", "kept", "refused"]


@dataclass(frozen=True)
class Outcome:
    """What became of one index file; `error` says why it was refused."""

    index: str
    action: Action
    num_samples: int = 0
    error: str = ""


@dataclass(frozen=True)
class Report:
    """What `shards index` did, in the order of the tars."""

    outcomes: tuple[Outcome, ...]

    @property
    def errors(self) -> list[str]:
        """A line for each tar that got no index."""
        return [outcome.error for outcome in self.outcomes if outcome.error]

    def files(self, action: Action) -> list[str]:
        """The index files of which that became."""
        return [outcome.index for outcome in self.outcomes if outcome.action == action]

    def __str__(self) -> str:
        texts: dict[Action, str] = {"written": "written", "replaced": "replaced", "kept": "kept, being up to date"}
        counts = [f"{len(self.files(action)):,} {text}" for action, text in texts.items() if self.files(action)]
        samples = sum(outcome.num_samples for outcome in self.outcomes)
        return f"index files of {len(self.outcomes):,} tars: {', '.join(counts) or 'none written'}; {samples:,} samples"

    def as_json(self) -> str:
        """One JSON object.

        Its keys: `written`, `replaced` and `kept`, each a list of index files; `errors`, a line for each tar without an index
        of its own; `num_samples`, over all tars but those.
        """
        samples = sum(outcome.num_samples for outcome in self.outcomes)
        actions: tuple[Action, ...] = ("written", "replaced", "kept")
        return json.dumps({**{action: self.files(action) for action in actions}, "errors": self.errors, "num_samples": samples})


@dataclass(frozen=True)
class _Task:
    tar: str
    index_path: Path
    overwrite: bool


def index_shards(
    pattern: str, *, index_dir: Path | None = None, overwrite: bool = False, num_workers: int | None = None
) -> Report:
    """Writes the index of each tar.

    Args:
        pattern: A folder, a glob, a brace pattern, one tar; or the URL of one of these.
        index_dir: Folder for the index files; made where it is not there. By default each lies beside its tar.
        overwrite: Replace index files that differ from what their tar holds.
        num_workers: Processes; by default one a CPU. For remote tars threads; by default 16.

    Raises:
        ValueError: Nothing matches, or the index files cannot be put where they should be.
        OSError: The storage does not answer as it should.
    """
    remote = is_url(pattern)
    if remote and index_dir is None:
        raise ValueError(f"{pattern}: an index cannot be written beside a remote tar; name a local folder with --index-dir")
    tars = _find_remote_tars(pattern) if remote else _find_local_tars(pattern)
    paths = index_paths(tars, index_dir)
    tasks = [_Task(tar, path, overwrite) for tar, path in zip(tars, paths, strict=True)]
    num_workers = min(check_workers(num_workers) or (THREADS if remote else num_cpus()), len(tasks))
    outcomes = (_run_threads if remote else run)(_index_tar, tasks, num_workers)
    by_path = {outcome.index: outcome for outcome in tqdm(outcomes, total=len(tasks), unit="tar", disable=None)}
    return Report(tuple(by_path[str(path)] for path in paths))


def index_paths(tars: list[str], index_dir: Path | None) -> list[Path]:
    """Where the index of each tar belongs.

    Raises:
        ValueError: In `index_dir` two would have one name.
    """
    if index_dir is None:
        return [Path(tar).with_suffix(".idx") for tar in tars]
    first: dict[str, str] = {}
    for tar in tars:
        other = first.setdefault(Path(tar).stem, tar)
        if other != tar:
            raise ValueError(f"{other} and {tar} would share {index_dir / Path(tar).stem}.idx; give each its own --index-dir")
    return [index_dir / f"{Path(tar).stem}.idx" for tar in tars]


def save_index(index_path: Path, samples: list[Sample]) -> None:
    """Writes an index, and the folder for it.

    Raises:
        ValueError: Nothing can be written there.
    """
    try:
        index_path.parent.mkdir(parents=True, exist_ok=True)
        write_index(index_path, samples)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ValueError(
            f"{index_path.parent}: no index file can be written there ({error.strerror}); name another folder with --index-dir"
        ) from error


def _run_threads(function: Callable[[_Task], Outcome], tasks: list[_Task], num_workers: int) -> Iterator[Outcome]:
    """`parallel.run` for work that is waiting: a thread starts at once, a process has to import the storage's library first."""
    pool = concurrent.futures.ThreadPoolExecutor(num_workers)
    try:
        yield from as_completed(pool, function, tasks, window=2 * num_workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _index_tar(task: _Task) -> Outcome:
    try:
        samples = scan_tar(task.tar)
    except ValueError as error:
        return Outcome(str(task.index_path), "refused", error=str(error))
    action: Action = "written"
    if task.index_path.exists():
        if _lists(task.index_path, samples):
            return Outcome(str(task.index_path), "kept", len(samples))
        if not task.overwrite:
            differs = f"{task.index_path}: differs from what {task.tar} holds, and was left as it is; --overwrite replaces it"
            return Outcome(str(task.index_path), "refused", error=differs)
        action = "replaced"
    save_index(task.index_path, samples)
    return Outcome(str(task.index_path), action, len(samples))


def _lists(index_path: Path, samples: list[Sample]) -> bool:
    """Whether the index has exactly these samples; names in it are for people, and may be written in other ways."""
    try:
        listed = read_index(index_path)
    except ValueError:
        return False

    def layout(samples: list[Sample]) -> list[list[tuple[str, int, int]]]:
        return [[(as_field(c.extension), c.offset, c.size) for c in sample] for sample in samples]

    return layout(listed) == layout(samples)


def _find_local_tars(pattern: str) -> list[str]:
    if not os.path.isdir(pattern):
        return list(dict.fromkeys(str(tar) for tars in find_splits(pattern).values() for tar in tars))
    found = sorted(map(str, Path(pattern).glob("*.tar")))
    if not found:
        raise ValueError(f"no .tar files in folder {pattern}")
    return found


def _find_remote_tars(pattern: str) -> list[str]:
    tars = list(itertools.chain.from_iterable(map(_list_storage, braceexpand(pattern))))
    return list(dict.fromkeys(tars))


def _list_storage(url: str) -> list[str]:
    """The tars that a URL without braces names, as URLs."""
    found = glob_files(url) or [file for file in list_folder(url.rstrip("/")) if file.url.endswith(".tar")]
    if not found:
        raise ValueError(f"no such shard: {url!r}")
    return [file.url for file in found]
