"""Training on a few photos with the default settings: they depend on the number of steps."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.runs import all_metrics, train_command
from tools.shards.convert import convert
from tools.shards.plan import Options


@pytest.fixture(scope="module")
def two_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 training and 32 validation images of stripes, upright or level, in any colors."""
    folder = tmp_path_factory.mktemp("kinds")
    for split, num_images in (("train", 96), ("valid", 32)):
        for i in range(num_images):
            rng = np.random.default_rng((i, num_images))
            wave = np.sin(np.arange(40) / rng.uniform(1, 3) + rng.uniform(0, 6))[:, None]
            pixels = wave[..., None] * rng.uniform(40, 90, 3) + rng.uniform(100, 150, 3) + rng.normal(0, 20, (40, 40, 3))
            pixels = pixels.transpose(1, 0, 2) if i % 2 else pixels
            path = folder / split / ("level", "upright")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        convert(folder / split, folder / "shards", Options(name=split), num_workers=1)
    return folder / "shards"


def test_the_loss_does_not_explode_and_the_classes_are_learned(two_kinds: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train_command(
        *("--data.train", two_kinds, "--data.valid", two_kinds, "--image-size", 32, "--epochs", 10),
        *("--device", "cpu", "--seed", 1),
        *("--run-dir", run),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    valid = [line for line in all_metrics(run) if line["split"] == "valid"]
    assert max(line["loss"] for line in valid) < 2 * np.log(2)  # twice the loss of a guess
    assert valid[-1]["top1"] >= 90
    assert valid[-1]["ema_top1"] >= 90
    assert (
        "global batch size 16 (16 images x 1 batch x 1 process); learning rate 0.01 x 16 / 64 = 0.0025\n"
        "6 steps an epoch, 60 in all: warm-up over 30 steps, a log line every step, running statistics with momentum 0.5\n"
        "60 steps are few for training from random weights; "
    ) in done.stdout


def test_the_loss_does_not_explode_in_fine_tuning(two_kinds: Path, tmp_path: Path) -> None:
    """The recipe that the log suggests for small sets has batches and a warm-up for them."""
    options = ("--data.train", two_kinds, "--data.valid", two_kinds, "--image-size", 32, "--device", "cpu")
    first = train_command(*options, "--epochs", 1, "--run-dir", tmp_path / "first", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    initial = ("--recipe", "finetune", "--init-from", tmp_path / "first" / "last.pt")
    done = train_command(*options, *initial, "--epochs", 10, "--run-dir", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    valid = [line for line in all_metrics(tmp_path / "run") if line["split"] == "valid"]
    assert max(line["loss"] for line in valid) < 2 * np.log(2)
    assert valid[-1]["loss"] < np.log(2)  # of a guess
    assert "global batch size 16 " in done.stdout
    assert "60 in all: warm-up over 30 steps" in done.stdout
