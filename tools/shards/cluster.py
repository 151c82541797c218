"""Work on other machines: the workers of a Dask cluster."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from tools.shards import parallel
from tools.shards.parallel import Result, Task


@contextlib.contextmanager
def dask_results(address: str, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Iterator[Result]]:
    """The results of `function` for all tasks, from the workers of a Dask scheduler, as they finish.

    A task of a worker that was lost is done by another.

    Raises:
        ValueError: distributed is not installed, or no scheduler answers there, or it has no workers.
        OSError: Tasks took several workers with them.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise ValueError(f"--executor {address}: pip install 'googlenet-dali[dask]'") from error
    try:
        client = Client(address, timeout=5)
    except (OSError, ValueError) as error:  # TimeoutError among them
        raise ValueError(f"--executor {address}: no Dask scheduler answers there ({error})") from error
    with client:
        num_threads = sum(client.ncores().values())
        if not num_threads:
            raise ValueError(f"--executor {address}: the scheduler has no workers; start some with `dask worker {address}`")
        try:
            with client.get_executor(pure=False, retries=2) as executor:
                yield parallel.as_completed(executor, function, tasks, window=2 * num_threads)
        except KilledWorker as error:
            raise OSError(f"--executor {address}: {error}") from error
