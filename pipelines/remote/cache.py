"""Local copies of remote shards, made ahead of the reader.

A request for each sample would wait for each; whole shards come as fast as the network can carry them.
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

from pipelines.remote.cache_folder import Busy, CacheFolder, Full, object_key
from pipelines.remote.object_store import RemoteFile, Stopped, stat, warn_once
from pipelines.remote.transfer import Changed, Transfer

log = logging.getLogger(__name__)

BUSY_SECONDS, FULL_SECONDS = 0.2, 0.5  # until it is tried again


@dataclass(eq=False)
class _Task:
    """One shard to be copied, for someone who waits (`held`) or in advance."""

    url: str
    size: int
    held: bool
    not_before: float = 0.0
    running: bool = False
    transfer: Transfer | None = None
    result: "concurrent.futures.Future[Path]" = field(default_factory=concurrent.futures.Future)


class ShardCache:
    """Copies of remote shards in a folder, which stay there for later and for other processes.

    Each shard is copied once, whichever processes ask for it. Copies not in use are deleted when room is needed, those first
    that were not used for longest. One cache serves one reader; several may work on one folder.

    Args:
        folder: For the copies; made where it is not there.
        max_bytes: Of all copies in the folder, parts of copies included.
        num_threads: Shards that are copied at the same time.

    Raises:
        ValueError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, max_bytes: int, num_threads: int = 8) -> None:
        self._folder = CacheFolder(folder, max_bytes)
        self._num_threads = num_threads
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._files: dict[str, RemoteFile] = {}
        # What follows is changed under the condition alone.
        self._condition = threading.Condition()
        self._tasks: dict[str, _Task] = {}  # neither done nor failed, in the order in which they are to be begun
        self._ahead: set[str] = set()  # keys of what is copied in advance, which must not give way to more of it
        self._ahead_not_before = 0.0

    def prefetch(self, shards: Iterable[tuple[str, int]]) -> None:
        """Begins to copy in the background, in this order, as far as there is room; does not wait.

        What an earlier call asked for and has not begun is left, unless this one asks for it too, and what it copied may give
        way to this one's; so first `hold` what is to be read now. Errors are no matter here: `hold` tries again.

        Args:
            shards: URLs and their sizes in bytes.
        """
        shards = list(shards)
        with self._condition:
            self._ahead = {object_key(url) for url, _ in shards}
            self._tasks = {url: task for url, task in self._tasks.items() if task.held or task.running}
            for url, size in shards:
                self._add(url, size, held=False)

    @contextlib.contextmanager
    def hold(self, shards: Iterable[tuple[str, int]]) -> Iterator[list[Path]]:
        """Waits until all of these shards are here, and keeps them here until the block ends.

        Where others read so much that there is no room it waits for that, too. A holder should not wait for a second set of
        shards while it holds the first: two such would wait for each other.

        Args:
            shards: URLs and their sizes in bytes.

        Yields:
            The copies, in the order of the shards.

        Raises:
            ValueError: They are too large for the cache, or are not what they were when their sizes were looked up.
            OSError: A shard cannot be copied; names it.
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

    def close(self) -> None:
        """Ends what goes on in the background. Parts of copies stay, and are completed when they are needed again."""
        self._stop.set()
        with self._condition:
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()
        for task in self._tasks.values():
            task.result.set_exception(Stopped())
        self._tasks.clear()

    def _wait_for_room(self, shards: list[tuple[str, int]], lease: contextlib.ExitStack) -> None:
        told = False
        while True:
            try:
                lease.enter_context(self._folder.lease(shards))
                return
            except Full as error:
                if not told:
                    log.warning("waiting for room: %s", error)
                told = True
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
                    task.held = False  # after an error the others go on in advance
        return [task.result.result() for task in tasks]

    def _add(self, url: str, size: int, held: bool) -> _Task:
        """The task for a shard, with the condition held; one that is there already is taken over."""
        assert not self._stop.is_set(), "the cache is closed"
        if not self._threads:
            # Daemons, lest a cache that nobody closes keep the process from ending.
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
            path, error = None, None
            try:
                path = self._copy(task)
            except Changed:
                self._files.pop(task.url, None)
            except Busy:
                task.not_before = time.monotonic() + BUSY_SECONDS
            except Full:
                if task.held:
                    task.not_before = time.monotonic() + BUSY_SECONDS
                else:
                    self._ahead_not_before = time.monotonic() + FULL_SECONDS
            except Exception as raised:  # it is raised where the shard is waited for
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
        """The next one to work on, waiting for it; what someone waits for comes first. None when the cache is closed."""
        with self._condition:
            while not self._stop.is_set():
                now = time.monotonic()
                ready = (task for task in self._tasks.values() if not task.running and task.not_before <= now)
                first_ahead = None
                for task in ready:
                    if task.held:
                        task.running = True
                        return task
                    first_ahead = first_ahead or task
                # One after the other, lest a later one get the room that an earlier one waits for.
                beginning = any(task.running and not task.held and not task.transfer for task in self._tasks.values())
                if first_ahead and not beginning and self._ahead_not_before <= now:
                    first_ahead.running = True
                    return first_ahead
                self._condition.wait(BUSY_SECONDS if self._tasks else None)
            return None

    def _copy(self, task: _Task) -> Path:
        """The whole copy of a shard, which is made where it is not there."""
        on_fault = warn_once(task.url)
        file = self._files.get(task.url) or stat(task.url, stop=self._stop, on_fault=on_fault)
        if file.size != task.size:
            raise ValueError(
                f"{task.url}: had {task.size:,} bytes when it was looked up and has {file.size:,} now; begin again"
            )
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
                        f"{part.name}: {error.strerror}; lower --data.cache-gigabytes, or name another --data.cache-dir"
                    ) from error
                raise
            return self._folder.publish(file)


@contextlib.contextmanager
def open_cache(cache_dir: str, gigabytes: float) -> Iterator[ShardCache]:
    """A cache in a folder, or in a temporary one that is deleted at the end where none is named."""
    with contextlib.ExitStack() as stack:
        folder = cache_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="googlenet-dali-"))
        yield stack.enter_context(contextlib.closing(ShardCache(Path(folder), int(gigabytes * 1e9))))
