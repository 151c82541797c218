"""The `export` command: the outputs and the metadata of its files."""

import contextlib
import errno
import importlib.util
import io
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from model.load_model import load_model
from tests.helpers import checkpoints
from tests.helpers.command import run_main
from tests.helpers.runs import ONE_THREAD
from tests.tools.test_predict import predictions, probabilities
from tools.export import cli
from tools.export.export import MismatchError, export, largest_difference
from tools.export.formats import TORCH_EXPORT

onnxruntime = pytest.importorskip("onnxruntime")

SIZE = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("run") / "best.pt")


@dataclass(frozen=True)
class Exported:
    """A file that the command wrote, the command's output, and a function that runs the file without our code."""

    path: Path
    output: str
    run: Callable[[Tensor], Tensor]
    metadata: dict[str, Any]
    weights: Literal["ema", "raw"]
    program: Any = None  # what torch.onnx.export returned


def write(path: Path, *arguments: object) -> str:
    """Writes the file, and nothing else into its folder; returns the command's output."""
    status, output, errors = run_main(cli.main, *arguments, "-o", path)
    assert (status, errors) == (0, "")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return output


@pytest.fixture(scope="module")
def onnx(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Exported:
    """Averaged weights, checked on shards."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    programs, torch_onnx_export = list[Any](), torch.onnx.export

    def recording_export(*inputs: Any, **options: Any) -> Any:
        programs.append(torch_onnx_export(*inputs, **options))
        return programs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", recording_export)
        output = write(path, checkpoint, "--check", shards)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    stored = session.get_modelmeta().custom_metadata_map
    metadata = {name: json.loads(value) for name, value in stored.items()}

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])

    return Exported(path, output, run, metadata, "ema", *programs)


@pytest.fixture(scope="module")
def pt2(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Raw weights, checked on synthetic images. Replaces an existing file."""
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    path.write_bytes(b"an existing file")
    output = write(path, checkpoint, "--weights", "raw")
    files = {"metadata.json": ""}
    module = torch.export.load(path, extra_files=files).module()
    return Exported(path, output, lambda images: module(images), json.loads(files["metadata.json"]), "raw")


@pytest.fixture(params=["onnx", "pt2"])
def exported(request: pytest.FixtureRequest) -> Exported:
    found: Exported = request.getfixturevalue(request.param)
    return found


def test_usage() -> None:
    done = run_main(cli.main, "--help")
    assert (done.status, done.stdout.split("\n")[0]) == (0, "usage: export-model [-h] [OPTIONS] CHECKPOINT")


def limit_file_size() -> None:
    """Limits files to 2 MB. Python ignores the signal, so writing more is an error, like on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def assert_full_disk(status: int, stderr: str, folder: Path) -> None:
    assert status == 1, stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_full_disk_with_onnx(
    checkpoint: Path, tmp_path: Path, onnx: Exported, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: onnx.program)  # another export would take 10 s
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        limit_file_size()
        done = run_main(cli.main, checkpoint, "-o", tmp_path / "model.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_full_disk(done.status, done.stderr + capfd.readouterr().err, tmp_path)


def test_full_disk_with_torch_export(checkpoint: Path, tmp_path: Path) -> None:
    """Uses a process of its own, because torch's file writer would end it."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.export", checkpoint, "-o", tmp_path / "model.pt2"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ONE_THREAD,
        preexec_fn=limit_file_size,
    )
    assert_full_disk(done.returncode, done.stderr, tmp_path)


def test_outputs_match_the_network(checkpoint: Path, exported: Exported) -> None:
    """Covers several batch sizes. The file normalizes the images."""
    trained = load_model(checkpoint, exported.weights)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (checkpoints.MEAN, checkpoints.STD))
    for count in (1, 2, 5, 33):
        images = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = trained.model((images - mean) / std).softmax(1)
        assert torch.allclose(exported.run(images), expected, atol=1e-5), count
    other = load_model(checkpoint, "raw" if exported.weights == "ema" else "ema")
    with torch.inference_mode():
        assert not torch.allclose(other.model((images - mean) / std).softmax(1), expected, atol=1e-2)


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_input_of_bytes(checkpoint: Path, tmp_path: Path, shards: Path, name: str) -> None:
    """As servers have images, run without our code."""
    output = write(tmp_path / name, checkpoint, "--input", "uint8", "--check", shards)
    assert f"input:  images, uint8 (N, 3, {SIZE}, {SIZE}), RGB from 0 to 255" in output
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if name.endswith(".onnx"):
        session = onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        assert json.loads(session.get_modelmeta().custom_metadata_map["input"]) == "uint8"
        [probabilities] = session.run(["probabilities"], {"images": images.numpy()})
    else:
        probabilities = torch.export.load(tmp_path / name).module()(images).numpy()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (checkpoints.MEAN, checkpoints.STD))
    with torch.inference_mode():
        expected = load_model(checkpoint).model((images / 255 - mean) / std).softmax(1)
    assert torch.allclose(torch.from_numpy(probabilities), expected, atol=1e-5)


def test_metadata(exported: Exported) -> None:
    assert exported.metadata == {
        "classes": ["ant", "bee", "cat"],
        "input": "float32",
        "image_size": SIZE,
        "resize_shorter": 37,
        "interpolation": "bilinear, antialiased",
        "mean": list(checkpoints.MEAN),
        "std": list(checkpoints.STD),
        "normalization": "inside",
        "weights": exported.weights,
        "epoch": 2,
        "step": 20,
    }


def test_output(exported: Exported) -> None:
    lines = exported.output.splitlines()
    title = "ONNX" if exported.path.suffix == ".onnx" else "torch.export"
    # Without the auxiliary heads, whose weights would make it 40 MB.
    assert 20e6 < exported.path.stat().st_size < 25e6
    assert (
        lines[0]
        == f"{exported.path}: {title}, {exported.path.stat().st_size / 1e6:.1f} MB, {exported.weights} weights of step 20"
    )
    raw = exported.weights == "raw"
    assert (
        lines.pop(1)
        == f"weights: {'as --weights says' if raw else 'averaged; the checkpoint has no validation scores to choose by'}"
    )
    assert lines[1:3] == ["input:  images, float32 (N, 3, 32, 32), RGB from 0 to 1", "output: probabilities, float32 (N, 3)"]
    assert lines[3].startswith("check:  at most ")
    images = "25 images" if exported.weights == "ema" else "11 synthetic images"
    assert lines[3].endswith(f" from the network's on {images}")


def test_code_in_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, onnx: Exported, pt2: Exported, image_folder: Path
) -> None:
    """Its probabilities are close to those of `predict`."""
    monkeypatch.chdir(tmp_path)
    Path("shapes.onnx").symlink_to(onnx.path)
    Path("shapes.pt2").symlink_to(pt2.path)
    Path("photo.jpg").symlink_to(min(image_folder.rglob("*.jpg")))
    text = (Path(__file__).parents[2] / "docs" / "after-training.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(block, names)
        [prediction] = predictions(checkpoint, "photo.jpg", "--weights", names["about"]["weights"])
        assert names["probabilities"][0].tolist() == pytest.approx(probabilities(prediction).tolist(), abs=0.02)
        assert names["about"]["classes"] == ["ant", "bee", "cat"]
        if "onnxruntime" in block:
            assert out.getvalue().split()[0] == prediction["predictions"][0]["name"]
    assert "session" in names
    assert "module" in names


def test_mismatch_is_not_written(tmp_path: Path, checkpoint: Path, pt2: Exported) -> None:
    stale = TORCH_EXPORT._replace(write=lambda module, example, metadata, path: path.write_bytes(pt2.path.read_bytes()))
    path = tmp_path / "model.pt2"
    path.write_bytes(b"an existing file")
    with pytest.raises(MismatchError, match="its probabilities would differ from the network's by up to 0"):
        export(load_model(checkpoint, "ema"), path, stale)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.pt2", b"an existing file")]


def test_what_a_killed_export_left_is_overwritten(tmp_path: Path, checkpoint: Path, pt2: Exported) -> None:
    copied = TORCH_EXPORT._replace(write=lambda module, example, metadata, path: path.write_bytes(pt2.path.read_bytes()))
    (tmp_path / ".tmp.model.pt2").write_bytes(b"half")
    export(load_model(checkpoint, "raw"), tmp_path / "model.pt2", copied)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def test_the_better_weights_are_exported(tmp_path: Path, pt2: Exported) -> None:
    copied = TORCH_EXPORT._replace(write=lambda module, example, metadata, path: path.write_bytes(pt2.path.read_bytes()))
    path = checkpoints.write(tmp_path / "best.pt", scores={"top1": 63.4, "ema_top1": 58.8})
    summary = export(load_model(path), tmp_path / "model.pt2", copied)  # otherwise, its outputs would differ
    assert "raw weights of step 20\nweights: the better ones on the validation split\n" in summary


def test_a_disk_that_fills_up_names_the_output(tmp_path: Path, checkpoint: Path) -> None:
    def fail(module: object, example: object, metadata: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "model.pt2"
    path.write_bytes(b"an existing file")
    with pytest.raises(OSError, match=r"model\.pt2: could not be written \(No space left on device\); nothing was changed$"):
        export(load_model(checkpoint), path, TORCH_EXPORT._replace(write=fail))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.pt2", b"an existing file")]


@pytest.mark.parametrize("count", [1, 2, 40])
def test_comparison(checkpoint: Path, count: int) -> None:
    """A single wrong probability is a mismatch, and so is a NaN."""
    trained = load_model(checkpoint)
    images = torch.rand(count, 3, SIZE, SIZE)
    seen: list[int] = []

    def run(batch: Tensor, change: float = 0.0) -> Tensor:
        seen.append(len(batch))
        with torch.inference_mode():
            probabilities = trained.model(batch).softmax(1)
        probabilities[-1, 0] += change if sum(seen) == count else 0
        return probabilities

    with torch.inference_mode():
        expected = trained.model(images).softmax(1)
    assert largest_difference(run, images, expected) < 1e-5
    assert sum(seen) == count
    assert seen[0] == 1
    for change in (1e-3, float("nan")):
        seen.clear()
        with pytest.raises(MismatchError):
            largest_difference(lambda batch, change=change: run(batch, change), images, expected)


def test_missing_libraries(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnxr") else find_spec(name))
    status, _, errors = run_main(cli.main, checkpoint, "-o", tmp_path / "model.onnx")
    assert status == 2
    assert errors == f"error: --output {tmp_path / 'model.onnx'} needs onnxruntime; pip install -e '.[export]'\n"
