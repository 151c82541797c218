"""Runs tests of this project inside a step of a proof."""

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tools.bench.gpu_proof.plan import Figures

ROOT = Path(__file__).parents[3]


class _Outcomes:
    """A plugin of pytest that passes on how each test ended."""

    def __init__(self) -> None:
        self.queue = queue.Queue[Figures | None]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            found: Figures = {"outcome": report.outcome, "seconds": round(report.duration, 1)}
            if report.failed:
                found["why"] = report.longreprtext.splitlines()[-12:]
            self.queue.put({report.nodeid: found})


def run_tests(arguments: Sequence[str]) -> Iterator[Figures]:
    """The outcome of each test as soon as it has ended.

    Warnings are shown, and do not fail a test: they may be of a version of a library that nobody has tried here.

    Args:
        arguments: Files, tests and options, as pytest takes them.

    Raises:
        AssertionError: One failed, or none passed.
    """
    outcomes, statuses, num_passed = _Outcomes(), list[int](), 0

    def run() -> None:
        options = ["-q", "-rA", "-p", "no:cacheprovider", "-o", "filterwarnings=default", f"--rootdir={ROOT}"]
        try:
            statuses.append(int(pytest.main([*options, *arguments], plugins=[outcomes])))
        finally:
            outcomes.queue.put(None)

    thread = threading.Thread(target=run)
    thread.start()
    for figures in iter(outcomes.queue.get, None):
        num_passed += sum(found["outcome"] == "passed" for found in figures.values())
        yield figures
    thread.join()
    if statuses != [0] or not num_passed:
        raise AssertionError(f"pytest ended with status {statuses}, and {num_passed} tests passed")
