"""Settings of the loader that only a GPU has, and `throughput tune` there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.helpers.loader_contract import make_loader, same, take
from tests.helpers.runs import ROOT
from tests.runs.test_train import train_command

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_load_of_the_decoder_in_hardware(shards: Path, split: Literal["train", "valid"]) -> None:
    """The same samples and crops, and nearly the same pixels, whichever decoder takes them."""
    epochs = []
    for load in (None, 0.0, 1.0):
        with make_loader(shards, "dali", split, GPU, data={"hw_decoder_load": load}) as loader:
            epochs.append(list(loader))
    for batches in epochs[1:]:
        for ours, reference in zip(batches, epochs[0], strict=True):
            assert torch.equal(ours["target"], reference["target"])
            assert (ours["image"] - reference["image"]).abs().mean().item() < 0.05


@pytest.mark.parametrize("prefetch", [1, 4])
def test_prefetch_changes_no_batch(shards: Path, prefetch: int) -> None:
    def batches(**data: Any) -> list[Any]:
        with make_loader(shards, "dali", "train", GPU, data=data) as loader:
            return take(loader, 16)

    assert same(batches(prefetch=prefetch), batches())


def test_tuned_and_trained_with(shards: Path, tmp_path: Path) -> None:
    file, path = tmp_path / "tuned.json", tmp_path / "report.json"
    command = [sys.executable, "-m", "tools.throughput", "tune", "--data.train", shards, "--device", "cuda", "-o", file]
    command += ["--image-size", "64", "--batch-size", "8", "--seconds", "10", "--rounds", "6", "--json", path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report, tuned = json.loads(path.read_text()), json.loads(file.read_text())
    assert (tuned["device"], tuned["gpu"]) == ("cuda", torch.cuda.get_device_name(GPU))
    assert report["step_images"] is None
    assert any("hw_decoder_load" in result["what"] for result in report["results"])
    options = ("--data.train", shards, "--data.valid", shards, "--image-size", 64, "--batch-size", 8, "--epochs", 1)
    trained = train_command(*options, "--device", "cuda", "--data.tuned", file, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert f"tuned by {file}: " in trained.stdout
    assert "was found" not in trained.stdout
    on_cpu = train_command(*options, "--device", "cpu", "--data.tuned", file, cwd=tmp_path)
    assert on_cpu.stderr.startswith(
        f"error: --data.tuned {file} is of another kind of device: cuda, and this is cpu; tune again"
    )
