"""docs/library.md and examples/: what other programs use of this project."""

import gc
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.dali.validation_decoder import ValidationDecoder
from tests.helpers.command import run_main
from tests.helpers.runs import train_command
from tests.tools.test_shards_command import read_with_webdataset, shards_command
from tools.shards import cli

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "library.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
[OWN_LOOP, OWN_ITERATOR, FOREIGN, DECODED] = BLOCKS
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, shards: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of an example, with `photos` and `shards/mine`."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "photos").symlink_to(image_folder.parent / "train")
    (tmp_path / "shards" / "mine").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def run_block(code: str, capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the closing of its files to the garbage collector
        exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})
        gc.collect()
    printed = capfd.readouterr()
    assert printed.err == ""
    return printed.out


def assert_printed(output: str, expected: str) -> None:
    assert re.fullmatch(".*".join(map(re.escape, expected.split("…"))), output), output


def test_every_block_is_short() -> None:
    assert PAGE.read_text().count("```python") == len(BLOCKS)
    assert all(code.count("\n") < 20 for code, _ in BLOCKS)


@pytest.mark.parametrize(("code", "expected"), [OWN_LOOP, DECODED], ids=["own-loop", "decoded"])
def test_block(code: str, expected: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_printed(run_block(code, capfd), expected)


@pytest.mark.parametrize(
    "image", ["path.read_bytes()", "Image.open(path)", "np.asarray(Image.open(path))"], ids=["bytes", "pillow", "numpy"]
)
def test_shards_of_an_iterator(image: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The data set is complete: nothing is found in it, and training takes it without a warning."""
    code, expected = OWN_ITERATOR
    imports = "import numpy as np\nfrom PIL import Image\n"
    assert_printed(run_block(imports + code.replace("path.read_bytes()", image), capfd), expected)
    found = DataConfig(train="shards/own").open_shards("train")
    assert found.classes == ("ant", "bee", "cat")
    assert len(found.labels()) == 61
    if image == "path.read_bytes()":
        stored = {(found.classes[int(sample["cls"])], sample["jpg"]) for sample in read_with_webdataset(found.tars)}
        assert stored == {(path.parent.name, path.read_bytes()) for path in Path("photos").rglob("*.jpg")}
        assert_printed(run_block(FOREIGN[0].replace("foreign", "raw"), capfd), FOREIGN[1])
        done = train_command(
            *("--data.train", "shards/own", "--data.valid", "shards/mine", "--device", "cpu", "--epochs", 1),
            *("--batch-size", 16, "--image-size", 32, "--model.no-aux-logits", "--run-dir", "run"),
            cwd=folder,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "warning" not in done.stdout.lower()
    verified = run_main(cli.main, "verify", "shards/own")
    assert (verified.status, verified.stdout, verified.stderr) == (0, "1 tar, 61 samples: no findings\n", "")


@pytest.mark.parametrize("batch_size", [2, 64])
def test_decoder_gives_the_pixels_of_validation(batch_size: int, shards: Path) -> None:
    """It takes any number of images, and more than its batch size. A damaged one among them changes no other."""
    data = DataConfig(valid=str(shards))
    encoded = [sample["jpg"] for sample in read_with_webdataset(data.open_shards("valid").tars)]
    decoder = ValidationDecoder(batch_size=batch_size, device=CPU)
    images, unusable = decoder(encoded)
    others, damaged = decoder([encoded[0], b"no image", *encoded[1:]])
    assert torch.equal(images, others)
    assert [*damaged] == [1]
    with build_loader(data, LoaderSpec(split="valid", batch_size=25, device=CPU)) as loader:
        assert torch.equal(images, next(iter(loader))["image"])
    assert not unusable


def test_cuda_without_an_index_is_the_current_gpu(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    seen = []
    monkeypatch.setattr("pipelines.synthetic.SyntheticLoader", lambda num_samples, spec: seen.append(spec.device))
    for device in (torch.device("cuda"), torch.device("cuda", 1), CPU):
        data = DataConfig(train=str(shards), backend="synthetic")
        build_loader(data, LoaderSpec(split="train", batch_size=2, device=device))
    assert seen == [torch.device("cuda", 3), torch.device("cuda", 1), CPU]


def test_reference_training(tmp_path: Path) -> None:
    """It runs as its own text says, on the demo's images."""
    script = ROOT / "examples" / "reference_training.py"
    assert script.read_text().count("\n") < 80
    done = shards_command("demo", tmp_path / "demo", "--train-samples", 100, "--valid-samples", 20)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, script, tmp_path / "demo", "--epochs", 2, "--image-size", 32]
    ran = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.fullmatch(r"(epoch \d: loss \d\.\d+, validation accuracy \d+\.\d %\n){2}", ran.stdout)


DOCKERFILE = ROOT / "Dockerfile"


def test_dockerfile_copies_what_exists() -> None:
    lines = DOCKERFILE.read_text().replace("\\\n", "").splitlines()
    sources = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert "train.py" in sources
    sent = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(sources) == sorted(sent)
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_dockerfile_is_correct() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "pip install -e '.[dev]' installs hadolint"
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
