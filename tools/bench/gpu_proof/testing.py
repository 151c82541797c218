"""Runs tests of this project within a step of a proof."""

import queue
import threading
from collections.abc import Iterator, Sequence

import pytest

from tools.bench.gpu_proof.plan import Figures
from tools.throughput.process import ROOT

# Warnings do not fail a test, because the machine may have library versions that nobody has tried.
OPTIONS = ("-q", "-rA", "-p", "no:cacheprovider", "-o", "filterwarnings=default", f"--rootdir={ROOT}")


class _Outcomes(queue.Queue[Figures | None]):
    """A pytest plugin: a queue of the outcome of each test."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            found: Figures = {"outcome": report.outcome, "seconds": round(report.duration, 1)}
            if report.failed:
                found["why"] = report.longreprtext.splitlines()[-12:]
            self.put({report.nodeid: found})


def run_tests(arguments: Sequence[str]) -> Iterator[Figures]:
    """Yields the outcome of each test as soon as it ends; the arguments are those of pytest.

    Raises:
        AssertionError: A test failed, or none passed.
    """
    outcomes, statuses, num_passed = _Outcomes(), list[int](), 0

    def run() -> None:
        try:
            statuses.append(int(pytest.main([*OPTIONS, *arguments], plugins=[outcomes])))
        finally:
            outcomes.put(None)

    thread = threading.Thread(target=run)
    thread.start()
    for figures in iter(outcomes.get, None):
        num_passed += sum(found["outcome"] == "passed" for found in figures.values())
        yield figures
    thread.join()
    if statuses != [0] or not num_passed:
        status = statuses[0] if statuses else "none"
        raise AssertionError(f"pytest ended with status {status}, and {num_passed} tests passed")
