"""`throughput loader`, run as a user runs it. No test judges what it measures."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from pipelines.augment import HorizontalFlip, RandAugment
from pipelines.build import LoaderSpec
from pipelines.config import DataConfig
from tests.conftest import write_tree
from tools.shards.convert import convert
from tools.shards.plan import Options
from tools.shards.shape import Shape
from tools.throughput.stage import StageTask, stage_batches

STAGES = ["read", "headers", "decode", "resize", "normalize", "hand-over"]
SMALL = ("--device", "cpu", "--data.threads", 1, "--image-size", 32, "--batch-size", 8, "--images", 16)


def throughput(*options: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "tools.throughput", "loader", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_table_figures_and_chart(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "site" / "nvidia_dali_cuda130-9.9.dist-info"  # as if DALI for CUDA 13 were installed
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-dali-cuda130\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    json_path, plot = tmp_path / "report.json", tmp_path / "report.png"
    augment = ("--data.augment", "trivial-augment-wide")
    done = throughput("--data.train", shards, *SMALL, *augment, "--rounds", 2, "--json", json_path, "--plot", plot)
    assert done.returncode == 0, done.stderr
    report = json.loads(json_path.read_text())
    assert report["versions"]["nvidia-dali-cuda130"] == "9.9"
    assert report["bytes_per_image"]["train"] == pytest.approx(
        sum(path.stat().st_size for path in shards.glob("train-*.tar")) / 61
    )
    results = report["results"]
    assert [(result["split"], result["stage"]) for result in results] == [("train", stage) for stage in STAGES]
    for before, result in zip([None, *results], results, strict=False):
        assert result["error"] is None
        median = f"{result['images_per_second']['median']:,.0f}"
        assert re.search(rf"^{re.escape(result['what'])} +{median} ", done.stdout, re.MULTILINE)
        own = 1000 / np.array(result["images_per_second"]["rounds"])
        if result["stage"] != "read":
            own -= 1000 / np.array(before["images_per_second"]["rounds"])
        assert result["milliseconds"]["rounds"] == pytest.approx(own)
        assert result["first_seconds"]["median"] > 0
        assert result["peak_memory_bytes"] > 2**20
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_stages_end_where_they_say(shards: Path) -> None:
    data = DataConfig(train=str(shards), valid=str(shards), augment=(HorizontalFlip(), RandAugment()))
    splits: tuple[Literal["train", "valid"], ...] = ("train", "valid")
    for split in splits:
        shapes, dtypes = {}, {}
        spec = LoaderSpec(split=split, batch_size=4, image_size=32, device=torch.device("cpu"), num_threads=1)
        for stage in STAGES[:-1]:
            with contextlib.closing(stage_batches(StageTask(stage, data, spec))) as batches:
                images = [np.asarray(image) for image in next(batches)]
            shapes[stage] = {image.shape for image in images}
            [dtypes[stage]] = {str(image.dtype) for image in images}
        assert shapes["read"] == shapes["headers"]
        assert {len(shape) for shape in shapes["read"]} == {1}
        assert {shape[2:] for shape in shapes["decode"]} == {(3,)}
        assert len(shapes["decode"]) > 1
        assert shapes["resize"] == shapes["normalize"] == {(32, 32, 3)}
        assert dtypes == {"read": "uint8", "headers": "uint8", "decode": "uint8", "resize": "uint8", "normalize": "float32"}


def test_a_stage_that_fails_has_no_figures_and_the_next_no_difference(tmp_path: Path) -> None:
    """The graph alone stops at what cannot be decoded; the loader leaves it out."""
    images = write_tree(tmp_path / "images", 24)
    broken = images / "ant" / "000.jpg"
    broken.write_bytes(broken.read_bytes()[:300] + bytes(300))
    convert(images, tmp_path / "shards", Options(shape=Shape(check="none")), num_workers=1)
    path = tmp_path / "report.json"
    stages = ("--stages", "hand-over", "decode", "read")  # in any order
    done = throughput("--data.train", "shards", *SMALL, *stages, "--rounds", 1, "--json", path, cwd=tmp_path)
    assert done.returncode == 1
    results = {result["stage"]: result for result in json.loads(path.read_text())["results"]}
    assert [*results] == ["read", "decode", "hand-over"]
    assert results["read"]["error"] is None
    assert results["decode"]["images_per_second"] is None
    assert "the data pipeline stopped: " in results["decode"]["error"]
    assert re.search(rf"^\+ decode +failed: {re.escape(results['decode']['error'])}$", done.stdout, re.MULTILINE)
    assert results["hand-over"]["images_per_second"]["median"] > 0
    assert results["hand-over"]["milliseconds"] is None


def test_a_chart_of_nothing(tmp_path: Path) -> None:
    """Where every turn failed the table says why, and the exit status is that of a failure."""
    (tmp_path / "images" / "ant").mkdir(parents=True)
    for i in range(16):
        (tmp_path / "images" / "ant" / f"{i}.jpg").write_bytes(b"\xff\xd8\xffno image")
    convert(tmp_path / "images", tmp_path / "shards", Options(shape=Shape(check="none")), num_workers=1)
    options = ("--stages", "decode", "--rounds", 1, "--plot", tmp_path / "chart.png")
    done = throughput("--data.train", tmp_path / "shards", *SMALL, *options)
    assert done.returncode == 1
    assert re.search(r"^\+ decode +failed: ", done.stdout, re.MULTILINE)
    assert (tmp_path / "chart.png").exists()
