"""`--profile`: the trace of a few steps."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.runs import alone, arguments, finish, start


@pytest.mark.parametrize(("asked", "traced"), [(2, 2), (3, 2)])
def test_a_trace_names_the_parts_of_a_step(shards: Path, tmp_path: Path, asked: int, traced: int) -> None:
    """The trace of a run of 12 steps starts with the eleventh. A warning says if there are too few."""
    run = tmp_path / "run"
    output = finish(start([*alone(), *arguments(shards, run, "--profile", asked, "--epochs", 1, "--batch-size", 5)], tmp_path))
    assert f"the trace of {traced} steps is in {run / 'trace.json'}, and a summary in profile.txt\n" in output
    table = (run / "profile.txt").read_text()
    assert "Self CPU" in table
    assert re.search(r"aten::\w*conv\w*", table)
    assert ("--profile 3 needs 13 steps; 2 were traced\n" in output) == (traced < asked)
    ranges = [event["name"] for event in json.loads((run / "trace.json").read_text())["traceEvents"] if "dur" in event]
    assert [ranges.count(name) for name in ("forward", "backward", "update")] == [traced] * 3
    assert "data: next batch" in ranges
    assert "dali: run" in ranges
