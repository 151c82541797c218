"""`throughput` and `tools.bench.step` on a GPU: they run to their ends and have figures for everything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

SMALL = ("--device", "cuda", "--batch-size", 8, "--image-size", 64)


def results(path: Path, *options: object, module: str = "tools.throughput") -> list[dict[str, object]]:
    command = [sys.executable, "-m", module, *options, "--json", path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report["hardware"]["gpus"]
    return list(report["results"])


def test_compare(shards: Path, tmp_path: Path) -> None:
    found = results(tmp_path / "r.json", "compare", shards, *SMALL, "--rounds", 1, "--images", 32, "--threads", 2)
    assert {"ours", "dali", "pillow", "webdataset"} <= {result["name"] for result in found}
    assert "decode" not in {result["name"] for result in found}
    assert all(result["images_per_second"] for result in found if result["is_installed"])


def test_loader(shards: Path, tmp_path: Path) -> None:
    options = ("--data.train", shards, "--data.valid", shards, "--splits", "train", "valid", "--rounds", 1, "--images", 32)
    found = results(tmp_path / "r.json", "loader", *SMALL, *options)
    assert all(result["images_per_second"] for result in found)


def test_model(tmp_path: Path) -> None:
    options = ("--precisions", "fp32", "tf32", "bf16", "fp16", "--batch-sizes", 8, "--steps", 2, "--rounds", 1)
    found = results(tmp_path / "r.json", "model", "--device", "cuda", "--image-size", 64, *options)
    assert all(result["images_per_second"] and result["peak_memory_bytes"] for result in found)


def test_train(shards: Path, tmp_path: Path) -> None:
    options = ("--data.train", shards, "--steps", 2, "--rounds", 3)
    found = results(tmp_path / "r.json", "train", *SMALL, *options)
    assert all(result["images_per_second"] for result in found if result["name"] != "cold")


def test_step(tmp_path: Path) -> None:
    results(tmp_path / "r.json", *SMALL, "--steps", 2, "--rounds", 2, module="tools.bench.step")
