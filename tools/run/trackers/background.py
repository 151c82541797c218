"""Gives each tracker a thread, so that training never waits for a server."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from tools.run.trackers.tracker import Line, State, Tracker, milliseconds, one_line

log = logging.getLogger("train")

# The end of a run waits as long. torchrun kills a process 30 s after the first one of a preempted run has ended.
FINISH_SECONDS = 25.0
RETRY_SECONDS = 10.0
MOST_LINES = 100_000  # that wait for a server: a few hundred megabytes


class Trackers:
    """The trackers of a run. Its methods only fill queues, except for `finish`."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._workers = [_Worker(tracker) for tracker in trackers]
        self._results: dict[str, float] | None = None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Logs the numbers of a line of metrics.jsonl."""
        line = Line(step, milliseconds(), _numbers(metrics))
        for worker in self._workers:
            worker.log(line)

    def set_results(self, results: Mapping[str, Any]) -> None:
        """Keeps the final scores for the end of the run, which is finished then, and not interrupted."""
        self._results = _numbers(results)

    def finish(self, *, is_failed: bool) -> None:
        """Ends the runs of all trackers. Waits for at most `FINISH_SECONDS`."""
        deadline = time.monotonic() + FINISH_SECONDS
        state: State = "failed" if is_failed else "interrupted" if self._results is None else "finished"
        for worker in self._workers:
            worker.end(state, self._results or {})
        for worker in self._workers:
            worker.wait(deadline)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}


class _Worker:
    """Calls a tracker in a thread. Its errors become one warning, and never end the run."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._queue: SimpleQueue[Line | None] = SimpleQueue()  # None: the end
        self._is_ending = threading.Event()
        self._end: tuple[State, dict[str, float]] = ("failed", {})
        self._is_warned = False
        self._thread = threading.Thread(target=self._work, name=tracker.name, daemon=True)
        self._thread.start()

    def log(self, line: Line) -> None:
        if self._thread.is_alive():
            self._queue.put(line)

    def end(self, state: State, results: dict[str, float]) -> None:
        self._end = state, results
        self._queue.put(None)
        self._is_ending.set()

    def wait(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"no answer for {FINISH_SECONDS:.0f} s")

    def _work(self) -> None:
        if not self._succeeds(self._tracker.start):
            return
        lines: list[Line] = []
        is_end = False
        while not is_end:
            was_refused, is_end = bool(lines), self._take(lines)
            if not self._succeeds(self._tracker.log, lines):
                del lines[:-MOST_LINES]
                continue
            lines.clear()
            if was_refused:
                log.info("%s: has all metrics again", self._tracker.name)
        self._succeeds(self._tracker.finish, *self._end)

    def _succeeds(self, call: Callable[..., None], *arguments: Any) -> bool:
        try:
            call(*arguments)
        except Exception as error:
            self._warn(error)
            return False
        return True

    def _take(self, lines: list[Line]) -> bool:
        """Adds the lines that wait, and returns whether they are the last. Waits for one, or after an error for a while."""
        if lines:
            self._is_ending.wait(RETRY_SECONDS)
            more = self._waiting()
        else:
            more = [self._queue.get(), *self._waiting()]
        lines += [line for line in more if line is not None]
        return None in more

    def _waiting(self) -> list[Line | None]:
        lines = []
        with contextlib.suppress(Empty):
            while True:
                lines.append(self._queue.get_nowait())
        return lines

    def _warn(self, problem: object) -> None:
        if not self._is_warned:
            self._is_warned = True
            text = "%s: %s; training is not affected, and metrics.jsonl has all metrics"
            log.warning(text, self._tracker.name, one_line(problem))
