"""Training and prediction on a GPU."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_checkpoint
from model.config import ModelConfig
from model.distributed import alone
from model.job import build_job
from tests.helpers import checkpoints
from tests.helpers.runs import all_metrics, train_command
from tools.run.config import Config
from tools.run.preemption import EXIT_CODE
from train import train_step

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("precision", ["auto", "fp32", "tf32", "bf16", "fp16"])
def test_training(shards: Path, tmp_path: Path, precision: str) -> None:
    done = train_command(
        *("--data.train", shards, "--data.valid", shards, "--device", "cuda", "--precision", precision),
        *("--epochs", 2, "--batch-size", 8, "--image-size", 64, "--log-every", 3, "--run-dir", tmp_path / "run"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = all_metrics(tmp_path / "run")
    assert [line["epoch"] for line in lines if line["split"] == "valid"] == [1, 2]
    assert all(0 <= line["data_wait_percent"] <= 100 for line in lines if line["split"] == "train")
    weights = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_stopped_run_resumes(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "train.py", "--data.train", shards, "--data.valid", shards, "--device", "cuda"]
    command += ["--epochs", 40, "--batch-size", 8, "--image-size", 64, "--log-every", 1, "--run-dir", run, "--resume", "auto"]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT)
    while not (run / "metrics.jsonl").exists() or len(all_metrics(run)) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == EXIT_CODE
    subprocess.run([*map(str, command)], cwd=ROOT, check=True)
    steps = [line["step"] for line in all_metrics(run) if line["split"] == "train"]
    assert steps == list(range(1, 40 * 7 + 1))


@pytest.mark.parametrize(
    "flags",
    [
        ["--compile", "default", "--accumulate-steps", "2"],
        ["--compile", "reduce-overhead"],
        ["--compile", "max-autotune"],
        ["--compile", "default", "--precision", "fp16", "--grad-clip", "1"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_compiled_training_matches_eager(shards: Path, tmp_path: Path, flags: list[str]) -> None:
    losses = []
    for name, more in (("compiled", flags), ("eager", [flag for flag in flags if flag not in ("--compile", flags[1])])):
        done = train_command(
            *("--data.train", shards, "--data.valid", shards, "--device", "cuda", "--epochs", 2, "--batch-size", 8),
            *("--image-size", 64, "--log-every", 1, "--model.dropout", 0, "--model.no-aux-logits"),
            *("--run-dir", tmp_path / name),
            *more,
            cwd=tmp_path,
            warnings=("error", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # inductor's own
        )
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in all_metrics(tmp_path / name) if line["split"] == "train"])
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=0.05)  # rounding errors grow in later steps
    assert all(map(math.isfinite, losses[0]))


def test_predictions_match_the_cpu(shards: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints.write(tmp_path / "best.pt")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    outputs = []
    for device in ("cpu", "cuda"):
        command = [
            sys.executable,
            "-m",
            "tools.predict",
            checkpoint,
            shards,
            tmp_path / "bad.jpg",
            "--json",
            "--device",
            device,
        ]
        done = subprocess.run([*map(str, command), "--split", "valid"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "bad.jpg" in done.stderr
        lines = map(json.loads, done.stdout.splitlines())
        outputs.append([{entry["class"]: entry["probability"] for entry in line["predictions"]} for line in lines])
    assert len(outputs[0]) == 25
    for on_cpu, on_gpu in zip(*outputs, strict=True):
        assert on_gpu == pytest.approx(on_cpu, abs=0.05)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_step_does_not_wait_for_the_device(dtype: torch.dtype | None) -> None:
    device = torch.device("cuda", 0)
    world = alone(device)
    config = Config(epochs=2, batch_size=4, grad_clip=1.0, model=ModelConfig(transform_input=True))
    job = build_job(config, world, num_classes=10, classes=None, autocast_dtype=dtype, steps_per_epoch=10)
    image = torch.randn(4, 3, 64, 64, device=device).to(memory_format=torch.channels_last)
    target = torch.zeros(4, dtype=torch.int64, device=device)
    train_step(job, image, target)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            train_step(job, image, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
