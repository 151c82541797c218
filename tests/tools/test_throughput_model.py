"""`throughput model`, run as a user runs it. No test judges what it measures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import ModelConfig
from tools.run.config import Config
from tools.throughput.model import count_flops


def throughput(*options: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tools.throughput",
        "model",
        "--device",
        "cpu",
        "--torch-threads",
        1,
        *options,
    ]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def test_table_and_figures(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = throughput(
        *("--batch-sizes", 2, 4, "--precisions", "fp32", "--image-size", 32, "--model.no-aux-logits"),
        *("--steps", 1, "--rounds", 2, "--json", path),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    [matrix] = report["matrices"]
    assert matrix["precision"] == "fp32"
    assert [(result["precision"], result["batch_size"]) for result in report["results"]] == [("fp32", 2), ("fp32", 4)]
    for result in report["results"]:
        rates = result["images_per_second"]["rounds"]
        assert rates == [result["batch_size"] / seconds for seconds in result["step_seconds"]["rounds"]]
        flops = [report["flops_per_image"] * rate for rate in rates]
        assert result["flops_per_second"]["rounds"] == pytest.approx(flops)
        pairs = zip(flops, matrix["flops_per_second"]["rounds"], strict=True)
        assert result["matrix_percent"]["rounds"] == pytest.approx([100 * own / product for own, product in pairs])
        assert result["peak_memory_bytes"] is result["error"] is None
        assert f"\nfp32 {result['batch_size']:>5}  " in done.stdout


OUT_OF_MEMORY = """
import torch
import tools.throughput.cli, tools.throughput.model
from tools.throughput.loops import WARM_UP_STEPS

def make_trainer(config, *arguments):
    loop, passes = make(config, *arguments), iter(range(10**6))
    def limited():
        if next(passes) >= {2: 10**6, 3: WARM_UP_STEPS + 1, 4: 0}[config.batch_size]:
            raise torch.OutOfMemoryError
        loop()
    return limited

make, tools.throughput.model.make_trainer = tools.throughput.model.make_trainer, make_trainer
tools.throughput.cli.main()
"""


def test_what_does_not_fit_is_said_and_the_others_go_on() -> None:
    """At the first step, or when others have taken the memory."""
    options = ("--batch-sizes", 2, 3, 4, "--image-size", 32, "--model.no-aux-logits", "--steps", 1, "--rounds", 2)
    command = [sys.executable, "-c", OUT_OF_MEMORY, "model", "--device", "cpu", "--torch-threads", 1, *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^fp32 +2 +[\d,.]+ +\(", done.stdout, re.MULTILINE)
    assert re.search(r"^fp32 +3 +failed: does not fit into the device's memory beside the others$", done.stdout, re.MULTILINE)
    assert re.search(r"^fp32 +4 +failed: does not fit into the device's memory$", done.stdout, re.MULTILINE)


def test_operations_of_an_image() -> None:
    """1.5 billion multiplications forward, as published, and twice that backward, but for the gradient of the image."""
    forward = 2 * 1.5e9
    first_layer = 2 * 7 * 7 * 3 * 64 * 112 * 112
    counted = count_flops(Config(image_size=224, model=ModelConfig(aux_logits=False)))
    assert counted == pytest.approx(3 * forward - first_layer, rel=0.01)
