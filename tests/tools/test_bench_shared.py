"""`tools.bench.shared`, run as a developer runs it. No test judges what it measures."""

import json
import subprocess
import sys
from pathlib import Path


def test_table_and_figures(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "tools.bench.shared", "--busy", 0, 1, "--torch-threads", 1, "--batch-size", 2]
    command += ["--image-size", 32, "--seconds", 0.1, "--rounds", 1, "--json", path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    waits = ("as train.py", "spinning")
    assert [row["name"] for row in report["results"]] == [f"{wait}, {number} busy" for wait in waits for number in (0, 1)]
    quiet = report["results"][2]["images_per_second"]["rounds"]
    for row in report["results"]:
        assert row["name"] in done.stdout
        assert row["ratio"]["rounds"] == [
            rate / base for rate, base in zip(row["images_per_second"]["rounds"], quiet, strict=True)
        ]
        assert row["cpu_milliseconds"]["median"] > 0
