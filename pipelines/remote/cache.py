"""Local copies of remote shards, made ahead of the reader.

A request per sample would wait for each one. Whole shards arrive as fast as the network allows.
"""

import concurrent.futures
import contextlib
import errno
import logging
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from pipelines.bad_samples.limits import TIMEOUT_SECONDS
from pipelines.remote.cache_folder import Busy, CacheFolder, Full, object_key, writer_of
from pipelines.remote.object_store import RemoteFile, stat
from pipelines.remote.retrying import Stopped, warn_once
from pipelines.remote.transfer import Changed, Transfer

log = logging.getLogger(__name__)

BUSY_SECONDS, FULL_SECONDS = 0.2, 0.5  # until the next attempt


@dataclass(eq=False)
class _Task:
    """One shard to copy: for a caller that waits (`held`), or ahead of time."""

    url: str
    size: int
    held: bool
    not_before: float = 0.0
    running: bool = False
    transfer: Transfer | None = None
    waits_for: tuple[Path, tuple[int, int]] | None = None  # a copy that others are writing, and when that showed life
    waited: float = 0.0  # seconds in which it has not grown
    result: "concurrent.futures.Future[Path]" = field(default_factory=concurrent.futures.Future)


class ShardCache:
    """Copies of remote shards in a folder, which later runs and other processes can reuse.

    Each shard is copied once, even if several processes ask for it. If room is needed, the least recently used copies are
    deleted first. One cache serves one reader; several caches may share a folder.

    Args:
        folder: Folder for the copies; created if missing.
        max_bytes: Limit for all copies in the folder, including partial ones.
        num_threads: Shards to copy at the same time.
        timeout: Longest wait for room while nobody copies, reads or releases anything, or for another process's copy that does
            not grow, in seconds.

    Raises:
        ValueError: The folder is not writable.
    """

    def __init__(self, folder: Path, max_bytes: int, num_threads: int = 8, timeout: float = TIMEOUT_SECONDS) -> None:
        self._folder, self._timeout = CacheFolder(folder, max_bytes), timeout
        self._num_threads = num_threads
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._files: dict[str, RemoteFile] = {}
        # The condition protects everything below.
        self._condition = threading.Condition()
        self._tasks: dict[str, _Task] = {}  # unfinished tasks, in the order in which to start them
        self._ahead: set[str] = set()  # keys of objects copied ahead; copying further ahead must not evict them
        self._ahead_not_before = 0.0

    def prefetch(self, shards: Iterable[tuple[str, int]]) -> None:
        """Starts to copy shards in the background, in this order, as far as there is room. Does not wait.

        It cancels what an earlier call requested but has not started, and may evict that call's copies, so `hold` the shards
        to read now first. Errors are ignored here, because `hold` tries again. For the arguments see `hold`.
        """
        shards = list(shards)
        with self._condition:
            self._ahead = {object_key(url) for url, _ in shards}
            self._tasks = {url: task for url, task in self._tasks.items() if task.held or task.running}
            for url, size in shards:
                self._add(url, size, held=False)

    @contextlib.contextmanager
    def hold(self, shards: Iterable[tuple[str, int]]) -> Iterator[list[Path]]:
        """Waits until all shards are copied, and keeps the copies until the context ends.

        If other readers use all the room, it waits for them as well, as long as they show life. Do not hold a second set of
        shards while holding the first: two such readers could deadlock.

        Args:
            shards: URLs and their sizes in bytes. The context yields their copies in the same order.

        Raises:
            ValueError: The shards do not fit into the cache, or have changed size.
            OSError: A shard cannot be copied; the message names it. Or others hold the room without using it, or are copying a
                shard and do not go on.
        """
        shards = list(shards)
        try:
            with contextlib.ExitStack() as lease:
                self._wait_for_room(shards, lease)
                yield self._wait_for(shards)
        finally:
            with self._condition:
                self._ahead_not_before = 0.0
                self._condition.notify_all()

    def show_life(self) -> None:
        """Call this while reading copies that are held, so that others know that they may wait for their room."""
        self._folder.show_life()

    def close(self) -> None:
        """Ends the background work. Partial copies stay, and are completed when they are needed again."""
        self._stop.set()
        with self._condition:
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()
        for task in self._tasks.values():
            task.result.set_exception(Stopped())
        self._tasks.clear()

    def _wait_for_room(self, shards: list[tuple[str, int]], lease: contextlib.ExitStack) -> None:
        before, waited = None, 0.0  # seconds without any activity
        while True:
            try:
                lease.enter_context(self._folder.lease(shards))
                return
            except Full as error:
                why = f"held by {self._folder.holders()}: {error}"
            if before is None:
                log.warning("waiting for room, %s", why)
            now = self._folder.activity()
            before, waited = now, (waited + FULL_SECONDS if now == before else 0.0)
            if waited >= self._timeout:
                raise OSError(f"waited {self._timeout:g} s (--data.timeout) for room that nobody uses, {why}")
            if self._stop.wait(FULL_SECONDS):
                raise Stopped

    def _wait_for(self, shards: list[tuple[str, int]]) -> list[Path]:
        with self._condition:
            tasks = [self._add(url, size, held=True) for url, size in shards]
        sizes = {task.result: task.size for task in tasks}
        pending = set(sizes)
        try:
            with tqdm(
                desc="copying shards", total=sum(sizes.values()), unit="B", unit_scale=True, delay=2, leave=False, disable=None
            ) as bar:
                while pending:
                    done, pending = concurrent.futures.wait(pending, 0.2, concurrent.futures.FIRST_COMPLETED)
                    for result in done:
                        result.result()
                    here = sum(sizes[result] for result in sizes if result not in pending)
                    here += sum(transfer.num_bytes for task in tasks if (transfer := task.transfer) and task.result in pending)
                    bar.update(here - bar.n)
        finally:
            with self._condition:
                for task in tasks:
                    task.held = False  # after an error the other shards continue ahead of time
        return [task.result.result() for task in tasks]

    def _add(self, url: str, size: int, held: bool) -> _Task:
        """Returns a new or the existing task of a shard. The caller holds the condition."""
        assert not self._stop.is_set(), "the cache is closed"
        if not self._threads:
            # Daemon threads, so that a cache that nobody closes cannot block the end of the process.
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._num_threads)]
            for thread in self._threads:
                thread.start()
        task = self._tasks.setdefault(url, _Task(url, size, held))
        if held and not task.held:
            task.held, task.not_before = True, 0.0
        self._condition.notify_all()
        return task

    def _work(self) -> None:
        while (task := self._next_task()) is not None:
            path: Path | None = None
            error: Exception | None = None
            try:
                path = self._copy(task)
            except Changed:
                self._files.pop(task.url, None)
            except Busy as raised:
                task.not_before = time.monotonic() + BUSY_SECONDS
                error = self._overdue(task, raised) if task.held else None
            except Full:
                self._ahead_not_before = time.monotonic() + FULL_SECONDS
            except Exception as raised:  # whoever waits for the shard raises it
                error = raised
            with self._condition:
                task.running, task.transfer = False, None
                if path or error:
                    del self._tasks[task.url]
                self._condition.notify_all()
            if path:
                task.result.set_result(path)
            elif error:
                task.result.set_exception(error)

    def _next_task(self) -> _Task | None:
        """Waits for the next task to work on; held tasks come first. Returns `None` when the cache is closed."""
        with self._condition:
            while not self._stop.is_set():
                now = time.monotonic()
                ready = [task for task in self._tasks.values() if not task.running and task.not_before <= now]
                task = next((task for task in ready if task.held), None)
                # Copies ahead start one after the other, so that a later one cannot take the room an earlier one waits for.
                starting = any(task.running and not task.held and not task.transfer for task in self._tasks.values())
                if task is None and ready and not starting and self._ahead_not_before <= now:
                    task = ready[0]
                if task is not None:
                    task.running = True
                    return task
                self._condition.wait(BUSY_SECONDS if self._tasks else None)
            return None

    def _overdue(self, task: _Task, busy: Busy) -> OSError | None:
        """Returns an error if those who write the copy for which a task waits have shown no life for long."""
        found = busy.copy, busy.activity
        task.waited = task.waited + BUSY_SECONDS if task.waits_for == found else 0.0
        task.waits_for = found
        if task.waited < self._timeout:
            return None
        return OSError(
            f"{busy.copy}: {writer_of(busy.copy)} is writing it, but it has stood still for {self._timeout:g} s "
            "(in training --data.timeout); end that process"
        )

    def _copy(self, task: _Task) -> Path:
        """Returns the complete copy of a shard, after making it if necessary."""
        on_fault = warn_once(task.url)
        file = self._files.get(task.url) or stat(task.url, stop=self._stop, on_fault=on_fault)
        if file.size != task.size:
            raise ValueError(f"{task.url}: had {task.size:,} bytes when the run began and has {file.size:,} now; start again")
        self._files[task.url] = file
        path = self._folder.find(file)
        if path:
            return path
        with self._folder.begin(file, leased=task.held, keep=self._ahead) as part:
            with self._condition:
                task.transfer = Transfer(file, self._stop, on_fault)
                self._condition.notify_all()
            try:
                task.transfer.run(part)
            except Changed:
                self._folder.discard(file)
                raise
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise ValueError(
                        f"{part.name}: {error.strerror}; lower --data.cache-gigabytes, or name another --data.cache-dir "
                        "(in evaluate without data.; TMPDIR moves the folder of predict)"
                    ) from error
                raise
            return self._folder.publish(file)


@contextlib.contextmanager
def open_cache(cache_dir: str, gigabytes: float, timeout: float = TIMEOUT_SECONDS) -> Iterator[ShardCache]:
    """Opens a cache in `cache_dir`; if it is empty, in a temporary folder that is deleted at the end. See `ShardCache`.

    Raises:
        ValueError: The folder cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = cache_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="googlenet-dali-"))
        except OSError as error:
            raise ValueError(
                f"no temporary folder for copies of shards ({error.strerror}); name one with --data.cache-dir (in evaluate "
                "--cache-dir), or set TMPDIR"
            ) from error
        yield stack.enter_context(contextlib.closing(ShardCache(Path(folder), int(gigabytes * 1e9), timeout=timeout)))
