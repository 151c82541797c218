"""`python -m tools.export`: files that give what the network gives, and say what they need."""

import contextlib
import importlib.util
import io
import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from model.load_model import load_trained
from tests.helpers import checkpoints
from tests.tools.test_predict import predict
from tools.export import cli
from tools.export.export import DifferentError, export, largest_difference
from tools.export.formats import TorchExport

onnxruntime = pytest.importorskip("onnxruntime")

SIZE = 32


def command(*arguments: object) -> tuple[int, str, str]:
    """Runs the command in this process: exit status, output, errors."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as exit_,
    ):
        cli.main([*map(str, arguments)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("run") / "best.pt")


@dataclass(frozen=True)
class Exported:
    """A file that the command wrote, what it said, and what runs the file without any of our code."""

    path: Path
    output: str
    run: Callable[[Tensor], Tensor]
    metadata: dict[str, Any]
    weights: Literal["ema", "raw"]


def written(path: Path, *arguments: object) -> str:
    """What the command says that writes this file, and nothing else into its folder."""
    status, output, errors = command(*arguments, "-o", path)
    assert (status, errors) == (0, "")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return output


@pytest.fixture(scope="module")
def onnx(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Exported:
    """Of the averaged weights, checked on shards."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    output = written(path, checkpoint, "--check", shards)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    stored = session.get_modelmeta().custom_metadata_map
    metadata = {name: json.loads(value) for name, value in stored.items()}

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])

    return Exported(path, output, run, metadata, "ema")


@pytest.fixture(scope="module")
def pt2(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Of the raw weights, checked on drawn images, in place of an older file."""
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    path.write_bytes(b"an older one")
    output = written(path, checkpoint, "--weights", "raw")
    files = {"metadata.json": ""}
    module = torch.export.load(path, extra_files=files).module()
    return Exported(path, output, lambda images: module(images), json.loads(files["metadata.json"]), "raw")


@pytest.fixture(params=["onnx", "pt2"])
def exported(request: pytest.FixtureRequest) -> Exported:
    found: Exported = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(checkpoint: Path, tmp_path: Path, name: str) -> None:
    def fill() -> None:  # files may have 2 MB, and writing more is an error as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    done = subprocess.run(
        [sys.executable, "-m", "tools.export", checkpoint, "-o", tmp_path / name],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=fill,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_gives_what_the_network_gives(checkpoint: Path, exported: Exported) -> None:
    """For any number of images, which are normalized inside."""
    trained = load_trained(checkpoint, exported.weights)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (checkpoints.MEAN, checkpoints.STD))
    for count in (1, 2, 5, 33):
        images = torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = trained.model((images - mean) / std).softmax(1)
        assert torch.allclose(exported.run(images), expected, atol=1e-5), count
    other = load_trained(checkpoint, "raw" if exported.weights == "ema" else "ema")
    with torch.inference_mode():
        assert not torch.allclose(other.model((images - mean) / std).softmax(1), expected, atol=1e-2)


def test_metadata(exported: Exported) -> None:
    assert exported.metadata == {
        "classes": ["ant", "bee", "cat"],
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


def test_what_it_says(exported: Exported) -> None:
    lines = exported.output.splitlines()
    title = "ONNX" if exported.path.suffix == ".onnx" else "torch.export"
    # Without the auxiliary heads, whose weights would make it 40 MB.
    assert 20e6 < exported.path.stat().st_size < 25e6
    assert (
        lines[0]
        == f"{exported.path}: {title}, {exported.path.stat().st_size / 1e6:.1f} MB, {exported.weights} weights of step 20"
    )
    assert lines[1:3] == ["input:  images, float32 (N, 3, 32, 32), RGB from 0 to 1", "output: probabilities, float32 (N, 3)"]
    assert lines[3].startswith("check:  at most ")
    images = "25 images" if exported.weights == "ema" else "11 drawn images"
    assert lines[3].endswith(f" from the network's on {images}")


def test_the_documentations_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, onnx: Exported, pt2: Exported, image_folder: Path
) -> None:
    """Gives what `tools.predict` gives, or nearly."""
    monkeypatch.chdir(tmp_path)
    Path("shapes.onnx").symlink_to(onnx.path)
    Path("shapes.pt2").symlink_to(pt2.path)
    Path("photo.jpg").symlink_to(min(image_folder.rglob("*.jpg")))
    text = (Path(__file__).parents[2] / "docs" / "after-training.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(block, names)
        [prediction] = predict(checkpoint, "photo.jpg", "--json", "--weights", names["about"]["weights"]).predictions
        expected = [entry["probability"] for entry in sorted(prediction["predictions"], key=lambda entry: entry["class"])]
        assert names["probabilities"][0].tolist() == pytest.approx(expected, abs=0.02)
        assert names["about"]["classes"] == ["ant", "bee", "cat"]
        if "onnxruntime" in block:
            assert out.getvalue().split()[0] == prediction["predictions"][0]["name"]
    assert "session" in names
    assert "module" in names


def test_a_file_that_gives_something_else_is_not_written(tmp_path: Path, checkpoint: Path, pt2: Exported) -> None:

    class Stale(TorchExport):
        """Writes what it wrote of other weights."""

        def write(self, module: torch.nn.Module, example: Tensor, metadata: Any, path: Path) -> None:
            path.write_bytes(pt2.path.read_bytes())

    path = tmp_path / "model.pt2"
    path.write_bytes(b"an older one")
    with pytest.raises(DifferentError, match="not written: the file's probabilities differ from the network's by up to 0"):
        export(load_trained(checkpoint, "ema"), path, Stale())
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.pt2", b"an older one")]


@pytest.mark.parametrize("count", [1, 2, 40])
def test_comparison(checkpoint: Path, count: int) -> None:
    """One wrong image is enough; so is one that is no number."""
    trained = load_trained(checkpoint)
    images = torch.rand(count, 3, SIZE, SIZE)
    seen: list[int] = []

    def run(batch: Tensor, change: float = 0.0) -> Tensor:
        seen.append(len(batch))
        with torch.inference_mode():
            probabilities = trained.model(batch).softmax(1)
        probabilities[-1, 0] += change if sum(seen) == count else 0
        return probabilities

    assert largest_difference(run, trained, images, images) < 1e-5
    assert sum(seen) == count
    assert seen[0] == 1
    for change in (1e-3, float("nan")):
        seen.clear()
        with pytest.raises(DifferentError):
            largest_difference(lambda batch, change=change: run(batch, change), trained, images, images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pt", "-o", "model.pt2"], "error: none.pt: no such file; name a best.pt or last.pt"),
        (["best.pt", "-o", "model.bin"], "error: --output model.bin: the name has to end in .onnx or .pt2"),
        (["best.pt", "-o", "none/model.onnx"], "error: --output none/model.onnx: there is no folder none; make it first"),
        (["best.pt", "-o", "model.pt2", "--check", "none.jpg"], "error: none.jpg: no such file or folder"),
        (
            ["best.pt", "-o", "model.pt2", "--check", "text.jpg"],
            "error: --check text.jpg: not one of the first 64 images",
        ),
    ],
)
def test_mistakes(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("best.pt").symlink_to(checkpoint)
    Path("text.jpg").write_text("hello")
    status, output, errors = command(*arguments)
    assert (status, output) == (2, "")
    assert errors.startswith(message)
    assert errors.count("\n") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.pt", "text.jpg"]


def test_without_the_libraries(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnxr") else find_spec(name))
    status, _, errors = command(checkpoint, "-o", tmp_path / "model.onnx")
    assert status == 2
    message = "onnxruntime not installed; pip install 'googlenet-dali[export]'"
    assert errors == f"error: --output {tmp_path / 'model.onnx'}: {message}\n"
