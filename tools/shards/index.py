"""`shards index`: writes index files for tars from other tools, local or on remote storage."""

import concurrent.futures
import contextlib
import errno
import functools
import json
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand
from tqdm import tqdm

from pipelines.printable import counted, printable
from pipelines.remote.object_store import THREADS, glob_files, is_url, list_folder
from pipelines.shards.find_tars import find_splits, tars_of_folder
from pipelines.shards.index import Sample, as_field, read_index, scan_tar, write_index
from pipelines.shards.members import IMAGE_EXTENSIONS, first_of, key_of, lacks
from tools.shards.parallel import Result, Task, as_completed, choose_workers, run

LABELS = ("cls", "json")  # extensions
FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # of the disk, not of the folder
Action = Literal["written", "replaced", "kept", "refused"]


@dataclass(frozen=True)
class Outcome:
    """What happened to one index file. `error` says why it was refused, and `note` why training cannot use it as it is."""

    index: str
    action: Action
    num_samples: int = 0
    error: str = ""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The result of `shards index`, in the order of the tars."""

    outcomes: tuple[Outcome, ...]

    @property
    def errors(self) -> list[str]:
        """One line for each tar that has no valid index."""
        return [outcome.error for outcome in self.outcomes if outcome.error]

    @property
    def notes(self) -> list[str]:
        """One line for each tar whose samples training cannot read as they are."""
        return [outcome.note for outcome in self.outcomes if outcome.note]

    @property
    def num_samples(self) -> int:
        """The number of samples, without those of refused tars."""
        return sum(outcome.num_samples for outcome in self.outcomes)

    def files(self, action: Action) -> list[str]:
        """Returns the index files with this outcome."""
        return [outcome.index for outcome in self.outcomes if outcome.action == action]

    def __str__(self) -> str:
        texts: dict[Action, str] = {"written": "written", "replaced": "replaced", "kept": "kept (up to date)"}
        counts = [f"{len(self.files(action)):,} {text}" for action, text in texts.items() if self.files(action)]
        tars, samples = counted(len(self.outcomes), "tar"), counted(self.num_samples, "sample")
        summary = f"index files of {tars}: {', '.join(counts) or 'none written'}; {samples}"
        return "\n".join([summary, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> str:
        """Returns one JSON object: `written`, `replaced`, `kept` (lists of index files), `errors`, `notes`, `num_samples`."""
        actions: tuple[Action, ...] = ("written", "replaced", "kept")
        files = {action: self.files(action) for action in actions}
        return json.dumps({**files, "errors": self.errors, "notes": self.notes, "num_samples": self.num_samples})


def index_shards(
    pattern: str, *, index_dir: Path | None = None, overwrite: bool = False, num_workers: int | None = None
) -> Report:
    """Writes the index file of each tar. The arguments are the options of `shards index`.

    Raises:
        ValueError: Nothing matches, or the index files cannot be written.
        OSError: The storage fails.
    """
    remote = is_url(pattern)
    if remote and index_dir is None:
        raise ValueError(f"{pattern}: an index cannot be written beside a remote tar; name a local folder with --index-dir")
    tars = _find_remote_tars(pattern) if remote else _find_local_tars(pattern)
    paths = index_paths(tars, index_dir)
    num_workers = min(choose_workers(num_workers, THREADS if remote else None), len(tars))
    index_tar = functools.partial(_index_tar, overwrite=overwrite)
    # Without `closing`, the workers would finish their tasks before an interruption ends the command.
    with contextlib.closing(
        (_run_threads if remote else run)(index_tar, list(zip(tars, paths, strict=True)), num_workers)
    ) as done:
        by_path = {outcome.index: outcome for outcome in tqdm(done, total=len(tars), unit="tar", disable=None)}
    return Report(tuple(by_path[str(path)] for path in paths))


def index_paths(tars: list[str], index_dir: Path | None) -> list[Path]:
    """Returns the path of each tar's index file.

    Raises:
        ValueError: Two files in `index_dir` would have the same name.
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
    """Writes an index file, and creates its folder if needed.

    Raises:
        ValueError: The folder cannot be created, or is not writable.
    """
    with _writing_to(index_path.parent):
        write_index(index_path, samples)


def require_writable(folder: Path) -> None:
    """Creates a folder for index files if needed; raises like `save_index`. Call it before long work."""
    with _writing_to(folder), tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in FAULTS:
            raise
        raise ValueError(
            f"{folder}: no index file can be written there ({error.strerror}); name another folder with --index-dir"
        ) from error


def _run_threads(function: Callable[[Task], Result], tasks: list[Task], num_workers: int) -> Generator[Result, None, None]:
    """Runs tasks that mostly wait. Threads start faster than processes, which import the storage library first."""
    pool = concurrent.futures.ThreadPoolExecutor(num_workers)
    try:
        yield from as_completed(pool, function, tasks, window=2 * num_workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _index_tar(task: tuple[str, Path], overwrite: bool) -> Outcome:
    tar, index_path = task
    try:
        samples = scan_tar(tar)
    except ValueError as error:
        return Outcome(str(index_path), "refused", error=str(error))
    action: Action = "written"
    note = _note(tar, samples)
    if index_path.exists():
        if _lists(index_path, samples):
            return Outcome(str(index_path), "kept", len(samples), note=note)
        if not overwrite:
            differs = f"{index_path}: differs from the contents of {tar}, and was not changed; --overwrite replaces it"
            return Outcome(str(index_path), "refused", error=differs)
        action = "replaced"
    save_index(index_path, samples)
    return Outcome(str(index_path), action, len(samples), note=note)


def _note(tar: str, samples: list[Sample]) -> str:
    """Says what the first sample lacks, if no sample has an image and a label."""
    if not samples or any(first_of(sample, IMAGE_EXTENSIONS) and first_of(sample, LABELS) for sample in samples):
        return ""
    first = samples[0]
    same_key = [sample for sample in samples if key_of(sample) == key_of(first)]
    what = lacks(first, IMAGE_EXTENSIONS, LABELS, same_key)
    return f"{tar}: no sample has an image and a label; the first, {printable(key_of(first))}: {what}"


def _lists(index_path: Path, samples: list[Sample]) -> bool:
    """Returns whether the index has exactly these samples. Names are not compared: tools write them in different ways."""
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
    return list(map(str, tars_of_folder(Path(pattern))))


def _find_remote_tars(pattern: str) -> list[str]:
    tars: list[str] = []
    for url in braceexpand(pattern):
        found = glob_files(url) or [file for file in list_folder(url.rstrip("/")) if file.url.endswith(".tar")]
        if not found:
            raise ValueError(f"no such shard: {url!r}")
        tars += [file.url for file in found]
    return list(dict.fromkeys(tars))
