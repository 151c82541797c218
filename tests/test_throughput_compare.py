"""`throughput compare`, run as a user runs it; what it measures is for no test to judge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ["ours", "dali", "pillow", "webdataset", "torchvision", "litdata", "mds", "spdl", "decode"]


def compare(shards: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.throughput", "compare", shards, *options]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def test_table_and_figures(tmp_path: Path, shards: Path) -> None:
    path, scratch = tmp_path / "report.json", tmp_path / "scratch"
    scratch.mkdir()
    done = compare(
        *(shards, "--rounds", 1, "--images", 16, "--batch-size", 8, "--image-size", 32, "--threads", 1),
        *("--json", path, "--scratch", scratch, "--only", "ours", "webdataset", "pillow", "spdl", "decode"),
    )
    assert done.returncode == 0, done.stderr
    assert [*scratch.iterdir()] == []
    report = json.loads(path.read_text())
    assert (report["samples"], report["batch_size"], report["threads"], report["rounds"]) == (61, 8, 1, 1)
    results = {(result["split"], result["name"]): result for result in report["results"]}
    names = ("ours", "dali", "pillow", "webdataset", "spdl", "decode")
    assert [*results] == [(split, name) for split in ("train", "valid") for name in names]
    for (split, name), result in results.items():
        assert result["what"] in done.stdout
        if name == "spdl" and not result["is_installed"]:
            continue
        assert result["error"] is None
        [turn] = result["turns"]
        [reference] = results[split, "dali"]["turns"]
        assert result["ratio"]["rounds"] == [turn["images_per_second"] / reference["images_per_second"]]
        if name == "decode":
            assert (turn["first_seconds"], turn["cpu_milliseconds"], turn["peak_memory_bytes"]) == (None, None, None)
        else:
            assert turn["first_seconds"] > 0.1  # Python's start alone
            assert turn["cpu_milliseconds"] >= 0  # Linux counts in hundredths of a second
            assert turn["peak_memory_bytes"] > 50e6


def test_a_loader_that_gives_something_else_is_said_so(tmp_path: Path, shards: Path) -> None:
    """An interpreter in which each loader gives what nobody asked for."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "if '-c' in sys.argv:\n"
        '    print(\'[["spdl"], {"spdl-core": "9.9"}]\')\n'
        "else:\n"
        "    sys.exit('ValueError: gives torch.uint8 (8, 32, 32, 3)')\n"
    )
    fake.chmod(0o755)
    done = compare(
        *(shards, "--rounds", 1, "--images", 8, "--batch-size", 8, "--image-size", 32, "--threads", 1),
        *("--splits", "train", "--only", "spdl", "--peers-python", fake),
    )
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("SPDL")]
    assert line.split("  ")[-1].strip() == "failed: ValueError: gives torch.uint8 (8, 32, 32, 3)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", 0], "--rounds 0: at least 1 is needed"),
        (["--only", "yours"], f"--only yours: no such loader; there are {', '.join(NAMES)}"),
        (["--batch-size", 8, "--peers-python", "/bin/true"], "--peers-python /bin/true: not a Python interpreter"),
    ],
)
def test_mistakes(shards: Path, options: list[object], message: str) -> None:
    done = compare(shards, *options)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_too_few_samples(shards: Path) -> None:
    done = compare(shards, "--batch-size", 62)
    assert (done.returncode, done.stderr) == (2, f"error: {shards}: at least 62 samples in local shards are needed\n")
