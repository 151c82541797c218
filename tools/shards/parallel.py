"""Work on several processes of this machine, or on the workers of a Dask cluster."""

import concurrent.futures
import ctypes
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from pipelines.machine import num_cpus

Task = TypeVar("Task")
Result = TypeVar("Result")

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def require_positive(option: str, value: int | None) -> None:
    """Raises ValueError if the value of an option is given and is below 1."""
    if value is not None and value < 1:
        raise ValueError(f"--{option} {value}: at least 1 is needed")


def choose_workers(requested: int | None, default: int | None = None) -> int:
    """Returns the number of workers: the requested one, or else `default`, or else one per CPU.

    Raises:
        ValueError: Fewer than one are requested.
    """
    require_positive("workers", requested)
    return requested or default or num_cpus()


def _prepare_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    # Without this, the workers of a killed parent would finish their tasks and then wait forever.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent was killed before the call above
        os._exit(1)


def as_completed(
    executor: concurrent.futures.Executor, function: Callable[[Task], Result], tasks: Iterable[Task], window: int
) -> Iterator[Result]:
    """Yields the results of `function` for all tasks, in the order in which they finish.

    Args:
        executor: Any executor. One with other processes needs picklable tasks, results and `function`.
        function: Processes one task.
        tasks: Consumed one by one as results arrive, so the tasks need not fit into memory together.
        window: Number of tasks that are submitted at a time.
    """
    tasks = iter(tasks)
    pending = {executor.submit(function, task) for task in itertools.islice(tasks, window)}
    while pending:
        done, pending = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            yield future.result()
            pending.update(executor.submit(function, task) for task in itertools.islice(tasks, 1))


def run(function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int) -> Generator[Result, None, None]:
    """Yields the results of `as_completed` on worker processes. A single worker is this process itself.

    The processes end when this process ends, for whatever reason. They are spawned, not forked: a fork of a process that runs
    threads can hang.
    """
    if num_workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, context, _prepare_worker, (os.getpid(),))
    try:
        yield from as_completed(pool, function, tasks, window=2 * num_workers)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()
        for child in children:
            child.join()
        raise
    pool.shutdown()


def run_on_dask(address: str, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
    """Yields the results of `as_completed` on the workers of a Dask scheduler.

    If a worker is lost, another one repeats its tasks.

    Raises:
        ValueError: distributed is not installed, or no scheduler answers at the address, or it has no workers.
        OSError: A task was lost together with several workers.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise ValueError(f"--executor {address}: a package is missing ({error}); pip install -e '.[dask]'") from error
    try:
        client = Client(address, timeout=5)
    except (OSError, ValueError) as error:  # includes TimeoutError
        raise ValueError(f"--executor {address}: no Dask scheduler answers there ({error})") from error
    with client:
        num_threads = sum(client.ncores().values())
        if not num_threads:
            raise ValueError(f"--executor {address}: the scheduler has no workers; start some with `dask worker {address}`")
        try:
            with client.get_executor(pure=False, retries=2) as executor:
                yield from as_completed(executor, function, tasks, window=2 * num_threads)
        except KilledWorker as error:
            raise OSError(f"--executor {address}: {error}") from error
