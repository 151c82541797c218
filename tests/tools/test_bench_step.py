"""`tools.bench.step`, run as a developer runs it. No test judges what it measures."""

import json
import subprocess
import sys
from pathlib import Path


def test_table_and_figures(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "tools.bench.step", "--device", "cpu", "--torch-threads", 1, "--precision", "bf16"]
    command += ["--batch-size", 2, "--image-size", 32, "--steps", 2, "--rounds", 2, "--json", path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert (report["arithmetic"], report["torch_threads"], report["steps"]) == ("bfloat16", 1, 2)
    barest, trainer = report["results"]
    assert barest["ratio"]["rounds"] == barest["cpu_ratio"]["rounds"] == [1, 1]
    for name, ratio in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
        pairs = zip(trainer[name]["rounds"], barest[name]["rounds"], strict=True)
        assert trainer[ratio]["rounds"] == [seconds / base for seconds, base in pairs]
    for result in (barest, trainer):
        assert result["name"] in done.stdout
        assert all(seconds > 0 for seconds in result["seconds"]["rounds"] + result["cpu_seconds"]["rounds"])
