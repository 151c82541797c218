"""Work spread over processes: the executor, and how its results come in."""

import concurrent.futures
import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def num_cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def check_workers(num_workers: int | None) -> int | None:
    """The number of workers that the user asked for, if any.

    Raises:
        ValueError: It is not one.
    """
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"--workers {num_workers}: at least 1 is needed")
    return num_workers


@contextlib.contextmanager
def process_pool(num_workers: int) -> Iterator[concurrent.futures.Executor]:
    """An executor of worker processes, which end when this one does, however it does.

    The processes are spawned, not forked: a fork of a process that runs threads can hang.
    """
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, context, _prepare_worker, (os.getpid(),))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()
        for child in children:
            child.join()
        raise
    pool.shutdown()


def _prepare_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends its workers
    # Without it the workers of a parent that was killed would go on, and then wait forever.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before it could be watched
        os._exit(1)


def as_completed(
    executor: concurrent.futures.Executor, function: Callable[[Task], Result], tasks: Iterable[Task], window: int
) -> Iterator[Result]:
    """The results of `function` for all tasks, in the order in which they finish.

    Args:
        executor: Any; the tasks, the results and `function` have to be picklable for one of other processes.
        function: What to do with a task.
        tasks: Taken one by one as results come in, so that the tasks need not fit into memory together.
        window: Tasks handed to the executor at a time.
    """
    tasks = iter(tasks)
    pending = {executor.submit(function, task) for task in itertools.islice(tasks, window)}
    while pending:
        done, pending = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            yield future.result()
            pending.update(executor.submit(function, task) for task in itertools.islice(tasks, 1))


def run(function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int) -> Iterator[Result]:
    """`as_completed` on `num_workers` processes of this machine; one is this process itself."""
    if num_workers == 1:
        yield from map(function, tasks)
        return
    with process_pool(num_workers) as pool:
        yield from as_completed(pool, function, tasks, window=2 * num_workers)
