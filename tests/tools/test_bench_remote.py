"""`throughput remote`, run as a user runs it; what it measures is for no test to judge."""

import json
import subprocess
import sys
from pathlib import Path


def test_table_and_figures(shards: Path, tmp_path: Path) -> None:
    options = ["--latency", "5", "--block-shards", "2", "--batch-size", "8", "--image-size", "32", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.throughput", "remote", str(shards), *options, "--json", str(tmp_path / "report.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["latency_seconds"] == 0.005
    local, copied, itself = report["results"]
    assert local["ratio"]["rounds"] == [1, 1]
    for result in (local, copied, itself):
        assert result["name"] in done.stdout
        assert all(rate > 0 for rate in result["images_per_second"]["rounds"])
        pairs = zip(result["images_per_second"]["rounds"], local["images_per_second"]["rounds"], strict=True)
        assert result["ratio"]["rounds"] == [rate / base for rate, base in pairs]


def test_figures_have_a_place_before_they_are_measured(shards: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.throughput", "remote", str(shards), "--json", str(tmp_path / "no" / "report.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: --json {tmp_path}/no/report.json: there is no folder {tmp_path}/no; make it first\n"
