"""The graphs of an `ImagePipeline`: on a GPU one for whole batches, on a CPU one for each part of a batch, with a thread."""

import atexit
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from nvidia.dali.pipeline import Pipeline

from pipelines.dali.cpu_resize import Resize
from pipelines.dali.draws import draws_from_outside
from pipelines.dali.graph import ENCODED, Stage, has_conditionals, image_pipeline
from pipelines.dali.operators import Preprocessing
from pipelines.openmp import use_threads

if TYPE_CHECKING:
    from pipelines.config import DataConfig
    from pipelines.spec import LoaderSpec

# DALI's automatic augmentations switch warnings off for a while, for all threads, so pipelines are built one at a time.
_building = threading.Lock()


class Work(NamedTuple):
    """A part of a batch.

    Attributes:
        images: Encoded images, uint8 `(size,)`. Nobody may write to them until the part is done.
        epoch: Epoch; with `place` it determines the random draws.
        place: Place of the first image in the order of the epoch; the others follow.
        target: Memory for the finished images on a CPU, float32 `(N, H, W, 3)`, if the graph is not cut short.
    """

    images: Sequence[Any]
    epoch: int
    place: int
    target: torch.Tensor | None


_Queue = queue.SimpleQueue[tuple[Work, Future[Any]] | None]  # None: the end
_running = dict[threading.Thread, _Queue]()


class Graph:
    """A DALI pipeline. Only one thread may use it at a time.

    Args:
        config: Names the crop and the augmentations.
        spec: Describes the images.
        preprocessing: Says how to resize for validation, and how to normalize.
        resize: Resizes on a CPU; `None` on a GPU.
        until: Last stage of the graph, for measurements.
        options: Arguments of DALI's `Pipeline`.
    """

    def __init__(
        self,
        config: "DataConfig",
        spec: "LoaderSpec",
        preprocessing: Preprocessing,
        resize: Resize | None,
        until: Stage,
        **options: Any,
    ) -> None:
        self._seed = spec.seed
        with _building, draws_from_outside() as draws:
            self._pipeline: Pipeline = image_pipeline(
                config,
                spec,
                preprocessing,
                resize,
                until,
                enable_conditionals=has_conditionals(config, spec),
                device_id=spec.device.index if spec.device.type == "cuda" else None,
                **options,
            )
        self._pipeline.build()
        draws.check(self._pipeline)
        # Otherwise the first call of `schedule_run` wants as many batches as the queue holds, and there may be fewer.
        self._pipeline._first_iter = False
        self._draws = draws
        self._fed = deque[Any]()  # what DALI reads, which must stay where it is
        self._end = weakref.finalize(self, _shut_down, self._pipeline, os.getpid())
        self._end.atexit = False  # DALI handles that itself

    def feed(self, work: Work) -> None:
        """Starts decoding."""
        self._fed.append(work.images)
        self._pipeline.feed_input(ENCODED, list(work.images))
        self._draws.feed(self._pipeline, len(work.images), self._seed, work.epoch, work.place)
        self._pipeline.schedule_run()

    def outputs(self, stream: torch.cuda.Stream | None = None) -> Sequence[Any]:
        """Waits for the oldest images fed, and returns what the graph gives: DALI's lists of tensors."""
        outputs: Sequence[Any] = self._pipeline.share_outputs(stream)
        self._pipeline.release_outputs()
        self._fed.popleft()
        return outputs

    def close(self) -> None:
        """Ends the work under way. Outputs that were taken stay valid."""
        self._end()
        self._fed.clear()


_of_parents: list[Pipeline] = []


def _shut_down(pipeline: Pipeline, process: int) -> None:
    if os.getpid() == process:
        pipeline._shutdown()
    else:  # a fork has no threads of the pipeline, and its destructor would wait for them forever
        _of_parents.append(pipeline)


class GraphThread:
    """A thread that feeds a graph, and finishes what the graph gives while the graph decodes the next images.

    DALI has a lock for the whole process that only one Python function in a graph can hold (`operator_lock` in DALI's
    `dltensor_function.cc`), so the graphs of several parts would wait for each other if they finished their images themselves.

    Args:
        graph: The graph, which belongs to the thread from now on.
        finish: Is given the graph's outputs and the work, and returns the result.
    """

    def __init__(self, graph: Graph, finish: Callable[[Sequence[Any], Work], Any]) -> None:
        self._work: _Queue = queue.SimpleQueue()
        self._results = deque[Future[Any]]()
        # The thread does not refer to this object. So it also ends if nothing else does.
        self._thread = threading.Thread(target=_run, args=(graph, finish, self._work), name="finish images", daemon=True)
        self._end = weakref.finalize(self, self._work.put, None)
        self._thread.start()
        _running[self._thread] = self._work

    def feed(self, work: Work) -> None:
        """Starts work."""
        self._results.append(Future())
        self._work.put((work, self._results[-1]))

    def outputs(self, stream: torch.cuda.Stream | None = None) -> Any:
        """Waits for the oldest work fed, and returns its result. There is no stream on a CPU."""
        assert stream is None
        return self._results.popleft().result()

    def close(self) -> None:
        """Ends the work under way."""
        self._end()
        self._thread.join()
        self._results.clear()


def _run(graph: Graph, finish: Callable[[Sequence[Any], Work], Any], work: _Queue) -> None:
    """Finishes the work that comes until there is None. After an error, refuses it."""
    under_way = deque[tuple[Work, Future[Any]]]()
    try:
        if not _finish_all(graph, finish, work, under_way):
            while (more := under_way.popleft() if under_way else work.get()) is not None:
                more[1].set_exception(RuntimeError("an error stopped the graph"))
    finally:
        graph.close()
        _running.pop(threading.current_thread(), None)


def _finish_all(
    graph: Graph,
    finish: Callable[[Sequence[Any], Work], Any],
    work: _Queue,
    under_way: deque[tuple[Work, Future[Any]]],
) -> bool:
    """Finishes the work that comes until there is None; returns False after an error, which the oldest work gets.

    Only that one: the error refers to all who have passed it on, and they hold the results to come.
    """
    try:
        use_threads(1)
        is_first = True  # the first batch is there sooner if it has the CPUs to itself
        while _feed(graph, work, under_way, only_one=is_first):
            outputs = graph.outputs()
            # More work lets the graph decode while this thread finishes.
            if not _feed(graph, work, under_way, only_one=is_first):
                break
            under_way[0][1].set_result(finish(outputs, under_way[0][0]))
            under_way.popleft()
            is_first = False
            del outputs  # the thread may wait long for more work
    except BaseException as error:
        under_way.popleft()[1].set_exception(error)
        return False
    return True


def _feed(graph: Graph, work: _Queue, under_way: deque[tuple[Work, Future[Any]]], *, only_one: bool) -> bool:
    """Feeds the graph with the work that has come. Waits for some if there is none under way. Returns whether to go on."""
    while not under_way or not (only_one or work.empty()):
        more = work.get()
        if more is None:
            return False
        under_way.append(more)
        graph.feed(more[0])
    return True


@atexit.register  # after DALI's function for this, so it runs before that
def _end_threads() -> None:
    """Ends the threads before DALI ends their graphs."""
    running = [*_running.items()]
    for _, work in running:
        work.put(None)
    for thread, _ in running:
        thread.join()
