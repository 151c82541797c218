"""`tools.bench.remote`, run as a developer runs it. No test judges what it measures."""

import json
import subprocess
import sys
from pathlib import Path


def test_table_and_figures(shards: Path, tmp_path: Path) -> None:
    options = ["--latency", "5", "--block-shards", "2", "--batch-size", "8", "--image-size", "32", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.remote", str(shards), *options, "--json", str(tmp_path / "report.json")],
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
