"""What all measurements share: competitors that take turns, statistics of rounds, and reports."""

import functools
import json
import sys

import pytest

from tests.helpers.command import run_main
from tools.throughput import cli
from tools.throughput.report import Column, Report, Row, Table
from tools.throughput.rounds import Outcome, Turn, TurnError, summarize, take_turns


def test_each_round_begins_with_another_competitor() -> None:
    order: list[str] = []

    def turn(name: str) -> Turn:
        order.append(name)
        if name == "b" and order.count("b") == 2:
            raise TurnError("tired")
        return {"rate": float(len(order))}

    outcomes = take_turns({name: functools.partial(turn, name) for name in "ab"}, 3)
    assert order == ["a", "b", "b", "a", "a"]
    assert (outcomes["b"].turns, outcomes["b"].error) == (({"rate": 2},), "tired")
    assert outcomes["a"].rounds("rate") == [1, 4, 5]


def test_interval_says_what_it_is_worth() -> None:
    assert summarize([3, 1, 2, 5, 4]).coverage == 0.9375
    nine = summarize([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert (nine.median, nine.low, nine.high) == (5, 2, 8)
    assert 0.95 <= nine.coverage < 0.97


def test_figures_of_an_outcome() -> None:
    outcome = Outcome(({"rate": 2.0, "memory": 7.0}, {"rate": 6.0, "memory": None}))
    baseline = Outcome(({"rate": 1.0}, {"rate": 2.0}))
    ratio = outcome.ratio("rate", baseline)
    assert ratio is not None
    assert (ratio.rounds, ratio.median) == ((2, 3), 2.5)
    assert outcome.ratio("rate", Outcome((), "tired")) is None
    assert (outcome.largest("memory"), outcome.rounds("memory")) == (7, [7])


def test_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    columns = (Column("seconds", "ms", ",.1f", scale=1000, interval=True), Column("files", "files"))
    rows = [
        Row("quick", {"seconds": summarize([0.001, 0.002, 0.003]), "files": 3}, labels={"name": "a"}),
        Row("slow", {"seconds": summarize([1.5])}),
        Row("broken", error="no space left"),
        Row("missing", is_installed=False),
    ]
    tables = [Table("first", columns, rows), Table("none", columns, [], key="others")]
    report = Report(heading="three", tables=tables, settings={"steps": 2}, notes=["the end"], versions={"python": "3"})
    report.publish()
    assert report.has_failed
    assert capsys.readouterr().out.splitlines() == [
        f"three; {report.hardware}",
        "",
        f"first    {'ms':>25}  files",
        f"quick    {'2.0 (1.0-3.0)':>25}      3",
        "slow     1,500.0 (1,500.0-1,500.0)      -",
        "broken   failed: no space left",
        "missing  not installed",
        "the end",
    ]
    found = json.loads(report.as_json())
    assert (found["steps"], found["others"], found["versions"]) == (2, [], {"python": "3"})
    quick, slow, broken, missing = found["results"]
    assert (quick["name"], quick["what"], quick["files"], quick["seconds"]["rounds"]) == (
        "a",
        "quick",
        3,
        [0.001, 0.002, 0.003],
    )
    assert (slow["files"], broken["seconds"], broken["error"]) == (None, None, "no space left")
    assert (broken["is_installed"], missing["is_installed"]) == (True, False)


def test_a_chart_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run_main(cli.main, "model", "--plot", "chart.png")
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr == "error: --plot needs matplotlib, which is not installed; pip install -e '.[plot]'\n"
