"""The demo: its images vary, are reproducible, and are too hard for a linear classifier but not for the network."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.distributed import alone
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.shards.shard_set import open_shards
from tests.helpers.runs import metrics, train_command
from tests.tools.test_shards_command import digests, shards_command
from tools.run import data
from tools.shards.drawing import FIGURES, draw_jpeg


def test_same_seed_same_images_and_all_classes_alike_often(tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        done = shards_command("demo", tmp_path / name, "--train-samples", 40, "--valid-samples", 20, "--seed", seed)
        assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "first") == digests(tmp_path / "again")
    assert digests(tmp_path / "first") != digests(tmp_path / "other")
    train = open_shards(str(tmp_path / "first"), "train")
    assert train.classes == tuple(sorted(FIGURES))
    assert np.bincount(train.labels()).tolist() == [4] * 10


def test_pictures_vary() -> None:
    jpegs = [draw_jpeg(figure, np.random.default_rng((i, n))) for i in range(20) for n, figure in enumerate(FIGURES)]
    images = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]
    assert len({image.size for image in images}) > 150
    assert 5 < sum(image.mode == "L" for image in images) < 60
    assert len({str(image.quantization) for image in images}) > 30  # JPEG qualities
    assert len(set(jpegs)) == len(jpegs)


def test_a_linear_classifier_on_the_pixels_fails(tmp_path: Path) -> None:
    """Even the best of several ridge regressions, chosen by its validation score, stays far below the network."""
    done = shards_command("demo", tmp_path, "--train-samples", 2000, "--valid-samples", 500)
    assert done.returncode == 0, done.stderr
    config = DataConfig(train=str(tmp_path), valid=str(tmp_path))

    def pixels_and_labels(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        shards = open_shards(str(tmp_path), split)
        with build_loader(
            config,
            LoaderSpec(
                split="valid", batch_size=100, image_size=48, device=torch.device("cpu"), dtype=torch.float32, num_threads=2
            ),
            shards=shards,
        ) as loader:
            batches = list(loader)
        images = torch.cat([batch["image"] for batch in batches]).flatten(1)
        return torch.nn.functional.pad(images, (0, 1), value=1.0), torch.cat([batch["target"] for batch in batches])

    (x, y), (x_valid, y_valid) = pixels_and_labels("train"), pixels_and_labels("valid")
    gram, cross = x @ x.T, x_valid @ x.T
    targets = torch.nn.functional.one_hot(y).float()
    top1 = []
    for penalty in (1e2, 1e3, 1e4, 1e5):
        weights = torch.linalg.solve(gram + penalty * torch.eye(len(x)), targets)
        top1.append(100 * ((cross @ weights).argmax(1) == y_valid).float().mean().item())
    assert max(top1) < 50, top1


def test_a_place_where_it_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "demo"
    monkeypatch.setattr(data, "DEMO_DATA", place)
    with pytest.raises(ValueError, match="the demo's images could not be made; the line above says why"):
        data.open_splits(DataConfig(train=str(place), valid=str(place)), alone(torch.device("cpu")))
    assert capfd.readouterr().err.startswith("error: ")


def test_demo_from_nothing(tmp_path: Path) -> None:
    """The command of the README draws, converts, and trains, and recognizes nine of ten validation images."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})  # the command inherits it, and leaves the other cores to other tests
    try:
        done = train_command("--run-dir", tmp_path / "run", cwd=tmp_path)
    finally:
        os.sched_setaffinity(0, cores)
    assert done.returncode == 0, done.stderr
    scores = metrics(tmp_path / "run")[-1]
    assert scores["split"] == "valid"
    assert max(scores["top1"], scores["ema_top1"]) >= 90
