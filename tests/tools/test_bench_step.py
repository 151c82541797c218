"""`throughput step`, run as a user runs it; what it measures is for no test to judge."""

import json
import subprocess
import sys
from pathlib import Path


def throughput(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.throughput", "step", "--device", "cpu", "--torch-threads", 1, *options]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def test_table_and_figures(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = throughput("--batch-size", 2, "--image-size", 32, "--steps", 2, "--rounds", 2, "--precision", "bf16", "--json", path)
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


def test_figures_have_a_place_before_they_are_measured(tmp_path: Path) -> None:
    done = throughput("--json", tmp_path / "no" / "report.json")
    assert done.returncode == 2
    assert done.stderr == f"error: --json {tmp_path}/no/report.json: there is no folder {tmp_path}/no; make it first\n"


def test_wrong_settings_are_said_in_a_line() -> None:
    done = throughput("--rounds", 0)
    assert (done.returncode, done.stderr) == (2, "error: --steps 1 --rounds 0: at least 1 of each is needed\n")
