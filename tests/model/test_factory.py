"""Networks other than GoogLeNet: from an installed package and from a file, from training to the exported network."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import train
from model.checkpoint import load_checkpoint
from model.config import Arch, ModelConfig
from model.distributed import alone
from model.job import build_job
from model.load_model import load_model
from tests.helpers.command import Done, run_main
from tests.helpers.runs import arguments, assert_same
from tests.helpers.torchvision_networks import require_torchvision
from tools.evaluate.cli import main as evaluate
from tools.export.cli import main as export
from tools.predict.cli import main as predict
from tools.run.config import Config
from tools.run.log import log_schedule
from tools.throughput.cli import main as throughput

SMALL = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        layers = nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.body = nn.Sequential(*layers)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)  # in no state dict
        self.head = nn.Linear(width, num_classes)

    def forward(self, image):
        return self.head(self.body(image) * self.scale)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        assert "version" in local_metadata  # MNASNet of torchvision asks for it
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def small(num_classes, **options):
    return Small(num_classes, **options)
"""
NETWORKS = {
    "a file": ("small.py:small", "width=12"),
    "torchvision, one head": ("torchvision.models:resnet18",),
    "torchvision, three heads": ("torchvision.models:googlenet", "init_weights=False"),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def arch(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arch:
    """A network, and the working directory, where its file is."""
    factory, *options = request.param
    if factory.startswith("torchvision"):
        require_torchvision()
    (tmp_path / "small.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return Arch(factory, tuple(options))


def run(arch: Arch, shards: Path, folder: Path, *more: object) -> str:
    """Trains 2 epochs of 7 steps, and returns what train.py prints."""
    words = arguments(shards, folder, "--model.arch", arch.factory, *more)
    if arch.options:
        words += ["--model.options", *arch.options]

    def main(words: Sequence[str]) -> NoReturn:
        train.main(words)
        sys.exit(0)

    done = run_main(main, *words)
    assert done.status == 0, done.stderr
    return done.stdout


def named(arch: Arch) -> tuple[str, ...]:
    return ("--arch", arch.factory, *(("--options", *arch.options) if arch.options else ()))


def in_json(done: Done) -> dict[str, Any]:
    assert done.status == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    return found


def test_everything_works_with_it(arch: Arch, shards: Path, image_folder: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    printed = run(arch, shards, whole, "--checkpoint.every-steps", 3, "--checkpoint.keep", 99)
    assert f"evaluate {whole}/best.pt {shards} {arch.flags('--arch')}\n" in printed
    shutil.copytree(whole, resumed)
    for path in (resumed / "checkpoints").iterdir():
        if int(path.stem.removeprefix("step-")) > 6:
            path.unlink()
    run(arch, shards, resumed, "--checkpoint.every-steps", 3, "--checkpoint.keep", 99)
    assert_same(resumed, whole)

    scores = in_json(run_main(evaluate, whole / "last.pt", shards, "--json", "--device", "cpu", *named(arch)))
    assert scores["samples"] == 25
    image = next(image_folder.rglob("*.jpg"))
    prediction = in_json(run_main(predict, whole / "last.pt", image, "--json", "--device", "cpu", *named(arch)))
    assert prediction["path"] == str(image)
    if "googlenet" in arch.factory:
        return
    exported = run_main(export, whole / "last.pt", "-o", tmp_path / "model.pt2", *named(arch))
    assert exported.status == 0, exported.stderr


@pytest.mark.parametrize("arch", [NETWORKS["a file"]], indirect=True)
def test_fine_tuning(arch: Arch, shards: Path, tmp_path: Path) -> None:
    """From a run's own checkpoint, and from the state dict of a network with other classes."""
    run(arch, shards, tmp_path / "first", "--epochs", 1)
    run(arch, shards, tmp_path / "second", "--epochs", 1, "--init-from", tmp_path / "first" / "last.pt")
    state = load_checkpoint(tmp_path / "first" / "last.pt")["model"]
    heads = {name for name, tensor in state.items() if tensor.ndim and tensor.shape[0] == 3}
    torch.save({name: torch.cat([tensor] * 2) if name in heads else tensor for name, tensor in state.items()}, "other.pth")
    printed = run(arch, shards, tmp_path / "third", "--epochs", 1, "--init-from", "other.pth")
    assert "the file has 6 classes, and the data 3: the last layers are reset: head\n" in printed


def test_a_checkpoint_alone_runs_no_code(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(SMALL)
    run(Arch("small.py:small"), shards, tmp_path / "run", "--epochs", 1)
    (tmp_path / "small.py").write_text("raise SystemExit('code of a checkpoint ran')")
    path = tmp_path / "run" / "last.pt"
    way_out = "Its code is imported only if you name it: --arch small.py:small"
    for main, words in ((evaluate, (path, shards)), (predict, (path, tmp_path)), (export, (path, "-o", "x.pt2"))):
        done = run_main(main, *words)
        assert (done.status, done.stderr) == (2, f"error: {path}: its network is small.py:small. {way_out}\n")


def test_buffers_that_no_state_dict_has(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(SMALL)
    run(Arch("small.py:small"), shards, tmp_path / "run", "--epochs", 1)
    network: Any = load_model(tmp_path / "run" / "last.pt", arch=Arch("small.py:small")).model
    assert network.scale.tolist() == [2]


NORMS = """
from torch import nn


def norms(num_classes):
    layers = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.01), nn.BatchNorm2d(3, momentum=None)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
"""


@pytest.mark.parametrize(
    ("given", "steps_per_epoch", "expected", "said"),
    [
        (None, 7, [0.5, 0.01, None], "0.01, 0.5, 1 / batches"),
        (None, 1000, [0.1, 0.01, None], "0.01, 0.1, 1 / batches"),
        (0.3, 7, [0.3, 0.3, 0.3], "0.3"),
    ],
)
def test_a_momentum_of_the_factorys_own_stays_unless_one_is_given(
    given: float | None,
    steps_per_epoch: int,
    expected: list[float | None],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Layers with torch's default get what suits the length of an epoch, as in GoogLeNet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "norms.py").write_text(NORMS)
    config = Config(epochs=1, batch_size=4, image_size=32, model=ModelConfig(arch="norms.py:norms", norm_momentum=given))
    for chosen in (config.choose(steps_per_epoch), config.choose(steps_per_epoch).choose(steps_per_epoch)):
        job = build_job(
            *(chosen, alone(torch.device("cpu"))),
            num_classes=3,
            classes=None,
            autocast_dtype=None,
            steps_per_epoch=steps_per_epoch,
        )
        assert [module.momentum for module in job.model.modules() if isinstance(module, torch.nn.BatchNorm2d)] == expected
        caplog.clear()
        caplog.set_level("INFO", "train")
        log_schedule(job, chosen)
        assert caplog.messages[0].endswith(f", running statistics with momentum {said}")


def test_throughput_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(SMALL)
    words = ("model", "--model.arch", "small.py:small", "--batch-sizes", 8, "--image-size", 32, "--rounds", 1, "--steps", 1)
    done = run_main(throughput, *words, "--device", "cpu", "--torch-threads", 1)
    assert done.status == 0, done.stderr
    assert "fp32" in done.stdout
