"""`python -m tools.predict`, on the files and shards that people have."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from model.load_model import load_trained
from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.pillow import resized_center_crop
from tests.conftest import write_image
from tests.helpers import checkpoints
from tools.predict import cli


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str

    @property
    def predictions(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]


def predict(*arguments: object) -> Done:
    """Runs the command in this process."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as exit_,
    ):
        cli.main([*map(str, arguments), "--device", "cpu", "--threads", "1"])
    assert isinstance(exit_.value.code, int)
    return Done(exit_.value.code, out.getvalue(), err.getvalue())


def probabilities(prediction: dict[str, Any]) -> torch.Tensor:
    """By class."""
    return torch.tensor([entry["probability"] for entry in sorted(prediction["predictions"], key=lambda entry: entry["class"])])


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("run") / "best.pt")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good images of many kinds, and of bad ones among them."""
    folder = tmp_path_factory.mktemp("mixed")
    write_image(folder / "a.jpg", 1)
    write_image(folder / "b.PNG", 2, (33, 120))
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (50, 60)).astype(np.uint8)).save(folder / "c gray.jpeg")
    (folder / "d text.jpg").write_text("hello\n")
    (folder / "e.png").write_bytes(b"")
    good = (folder / "a.jpg").read_bytes()
    (folder / "f.jpg").write_bytes(good[: len(good) // 2])
    write_image(folder / "g.webp", 4)
    (folder / "h.jpg").symlink_to("nothing")
    write_image(folder / "sub" / "deep" / "i.jpg", 5)
    write_image(folder / ".hidden" / "j.jpg", 6)
    (folder / "notes.txt").write_text("no image")
    return folder


GOOD, BAD = ["a.jpg", "b.PNG", "c gray.jpeg", "g.webp", "sub/deep/i.jpg"], ["d text.jpg", "e.png", "f.jpg", "h.jpg"]


def test_a_shard_that_was_cut_short_is_said_as_such(tmp_path: Path, checkpoint: Path, shards: Path) -> None:
    for name in ("valid-000000.tar", "valid-000000.idx"):
        (tmp_path / name).write_bytes((shards / name).read_bytes())
    with open(tmp_path / "valid-000000.tar", "r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    done = predict(checkpoint, tmp_path / "valid-000000.tar", "--json", "--batch-size", 2)
    assert done.status != 0
    assert re.search(r"error: .*valid-000000\.tar.*cut short", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


def test_probabilities_are_those_of_validation(checkpoint: Path, shards: Path) -> None:
    """Against the loader that training validates with, and the network alone."""
    done = predict(checkpoint, shards, "--json", "--batch-size", 7)
    model = load_trained(checkpoint).model
    loader = build_loader(
        DataConfig(valid=str(shards)), "valid", batch_size=8, image_size=32, device=torch.device("cpu"), num_threads=1
    )
    with loader, torch.inference_mode():
        expected = torch.cat([model(batch["image"]).softmax(1) for batch in loader])
    predicted = torch.stack([probabilities(prediction) for prediction in done.predictions])
    assert torch.allclose(predicted, expected, atol=1e-5)


def test_files_of_many_kinds(checkpoint: Path, mixed: Path) -> None:
    """Against Pillow, whose pixels are not quite DALI's, and the network alone."""
    done = predict(checkpoint, mixed, "--json")
    trained = load_trained(checkpoint)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (checkpoints.MEAN, checkpoints.STD))
    for name, prediction in zip(GOOD, done.predictions, strict=True):
        with Image.open(mixed / name) as image:
            pixels = torch.from_numpy(np.array(resized_center_crop(image.convert("RGB"), 32))).permute(2, 0, 1).float() / 255
        with torch.inference_mode():
            expected = trained.model(((pixels - mean) / std)[None]).softmax(1)[0]
        assert torch.allclose(probabilities(prediction), expected, atol=0.02), name
    everything = torch.stack([probabilities(prediction) for prediction in done.predictions])
    assert (everything.amax(0) - everything.amin(0)).max() > 0.1  # so that the comparison says something


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_bad_files_are_named_and_passed_over(checkpoint: Path, mixed: Path, batch_size: int) -> None:
    done = predict(checkpoint, mixed, "--json", "--batch-size", batch_size)
    assert done.status == 0
    assert [prediction["path"] for prediction in done.predictions] == [f"{mixed}/{name}" for name in GOOD]
    assert sorted(done.stderr.splitlines()) == [
        f"{mixed}/d text.jpg: not an image",
        f"{mixed}/e.png: empty file",
        f"{mixed}/f.jpg: jpeg image cut short",
        f"{mixed}/h.jpg: link to a file that is not there",
    ]


def test_as_json(checkpoint: Path, mixed: Path) -> None:
    done = predict(checkpoint, mixed / "a.jpg", mixed / "b.PNG", "--json")
    for prediction in done.predictions:
        assert set(prediction) == {"path", "predictions"}
        entries = prediction["predictions"]
        assert {(entry["class"], entry["name"]) for entry in entries} == {(0, "ant"), (1, "bee"), (2, "cat")}
        values = [entry["probability"] for entry in entries]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1)


def test_as_text(checkpoint: Path, mixed: Path) -> None:
    [prediction] = predict(checkpoint, mixed / "a.jpg", "--json", "--top", 2).predictions
    lines = [f"  {100 * entry['probability']:5.1f} %  {entry['name']}" for entry in prediction["predictions"]]
    assert len(lines) == 2
    assert predict(checkpoint, mixed / "a.jpg", "--top", 2).stdout.splitlines() == [f"{mixed / 'a.jpg'}", *lines]


def test_order_and_repetition(checkpoint: Path, mixed: Path, shards: Path) -> None:
    """Inputs of all kinds come out as they go in."""
    done = predict(checkpoint, mixed / "g.webp", shards, mixed / "a.jpg", mixed / "g.webp", "--json", "--batch-size", 4)
    places = [prediction.get("path") or prediction["key"][:8] for prediction in done.predictions]
    assert places == [str(mixed / "g.webp"), *(f"{i:08d}" for i in range(25)), str(mixed / "a.jpg"), str(mixed / "g.webp")]
    assert torch.allclose(probabilities(done.predictions[0]), probabilities(done.predictions[-1]), atol=1e-5)


def test_patterns_that_the_shell_has_left(checkpoint: Path, mixed: Path) -> None:
    done = predict(checkpoint, mixed / "sub" / "**" / "*", mixed / "g.w*", "--json")
    assert [prediction["path"] for prediction in done.predictions] == [f"{mixed}/sub/deep/i.jpg", f"{mixed}/g.webp"]
    done = predict(checkpoint, mixed / "**" / "*.jpg", "--json")
    assert [prediction["path"] for prediction in done.predictions] == [f"{mixed}/a.jpg", f"{mixed}/sub/deep/i.jpg"]
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        f"{mixed}/{name}" for name in sorted(BAD) if name.endswith(".jpg")
    ]


def test_shards_and_their_files_agree(checkpoint: Path, shards: Path, image_folder: Path) -> None:
    """Labels and names included; a folder with several splits, a glob and a brace pattern."""
    done = predict(checkpoint, shards, "--json")
    assert (done.status, done.stderr) == (0, "")
    by_name = {Path(p["path"]).stem: p for p in predict(checkpoint, image_folder, "--json", "--batch-size", 7).predictions}
    assert len(done.predictions) == len(by_name) == 25
    for prediction in done.predictions:
        _, name, number = prediction["key"].split("_")
        assert prediction["label"] == {"class": ("ant", "bee", "cat").index(name), "name": name}
        assert Path(prediction["tar"]).parent == shards
        assert torch.allclose(probabilities(prediction), probabilities(by_name[number]), atol=1e-5)
    for pattern in ("valid-*.tar", "valid-{000000..000002}.tar"):
        assert predict(checkpoint, shards / pattern, "--json").stdout == done.stdout
    text = predict(checkpoint, shards / "valid-000000.tar").stdout.splitlines()
    assert text[0] == f"{shards}/valid-000000.tar:{done.predictions[0]['key']}  (label: {done.predictions[0]['label']['name']})"
    assert len(text) == 10 * 4
    assert len(predict(checkpoint, shards, "--json", "--split", "train").predictions) == 61


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_foreign_shards(tmp_path: Path, checkpoint: Path, mixed: Path) -> None:
    """Without labels, with names for labels, with labels in JSON, with bad labels and without an image."""
    image = (mixed / "a.jpg").read_bytes()
    members = {
        "0.jpg": image,
        "1.jpg": image,
        "1.cls": b"cat",
        "2.jpg": image,
        "2.cls": b"dog",
        "3.cls": b"1",
        "4.cls": b"0",
        "4.JPG": image,
        "5.jpg": image[:300],
        "5.json": b'{"kind": 1}',
        "6.jpg": image,
        "6.json": b'{"kind": 1}',
    }
    tar = write_tar(tmp_path / "x.tar", members)
    done = predict(checkpoint, tar, "--json")
    assert {prediction["key"]: prediction.get("label") for prediction in done.predictions} == {
        "0": None,
        "1": {"class": 2, "name": "cat"},
        "2": None,
        "4": {"class": 0, "name": "ant"},
        "6": None,
    }
    complaints = done.stderr.splitlines()
    assert complaints[0].startswith(f"{tar}:2: predicted, but without its label; {tar}:")
    assert "the label is 'dog', which is none of the 3 classes" in complaints[0]
    assert complaints[1:] == [f"{tar}:3: no image among its members, .cls", f"{tar}:5: jpeg image cut short"]
    done = predict(checkpoint, tar, "--json", "--label-key", "kind")
    labels = {prediction["key"]: prediction["label"] for prediction in done.predictions if "label" in prediction}
    assert labels == {"6": {"class": 1, "name": "bee"}}


def test_from_a_bucket(checkpoint: Path, shards: Path, s3_bucket: str) -> None:
    import s3fs

    s3fs.S3FileSystem().put(str(shards), f"{s3_bucket}/predict", recursive=True)
    done = predict(checkpoint, f"{s3_bucket}/predict", "--json")
    assert done.stdout == predict(checkpoint, shards, "--json").stdout.replace(str(shards), f"{s3_bucket}/predict")


def test_without_class_names(tmp_path: Path, mixed: Path) -> None:
    unnamed = checkpoints.write(tmp_path / "best.pt", classes=None)
    done = predict(unnamed, mixed / "a.jpg", "--top", 1)
    [prediction] = predict(unnamed, mixed / "a.jpg", "--json").predictions
    [first, *_] = prediction["predictions"]
    assert first["name"] is None
    assert done.stdout.splitlines()[1].endswith(f" %  class {first['class']}")


def test_weights(checkpoint: Path, mixed: Path) -> None:
    [average], [raw] = (predict(checkpoint, mixed / "a.jpg", "--json", "--weights", w).predictions for w in ("ema", "raw"))
    assert (probabilities(average) - probabilities(raw)).abs().max() > 0.01


def test_preprocessing_is_the_checkpoints(tmp_path: Path, checkpoint: Path, mixed: Path) -> None:
    """Another size, another crop, another normalization, each by itself."""
    [usual] = predict(checkpoint, mixed / "a.jpg", "--json").predictions
    base = checkpoints.state()["preprocessing"]
    for change in ({"image_size": 36}, {"resize_shorter": 50}, {"mean": (0.0, 0.0, 0.0)}, {"std": (0.4, 0.4, 0.4)}):
        other = checkpoints.write(tmp_path / "other.pt", preprocessing={**base, **change})
        [changed] = predict(other, mixed / "a.jpg", "--json").predictions
        assert (probabilities(changed) - probabilities(usual)).abs().max() > 1e-3, change


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pt", "a.jpg"], "error: none.pt: no such file; name a best.pt or last.pt that train.py wrote"),
        (["a.jpg", "a.jpg"], "error: a.jpg is damaged, or not a checkpoint"),
        (["best.pt"], "error: name images, folders or shards after the checkpoint"),
        (["best.pt", "a.jpg", "none.jpg"], "error: none.jpg: no such file or folder"),
        (["best.pt", "empty"], "error: empty: no images in this folder, nor shards"),
        (["best.pt", "x-*.tar"], "error: no such shard: 'x-*.tar'"),
        (["best.pt", "x-*.jpg"], "error: x-*.jpg: no such image"),
        (["best.pt", "both"], "error: both: holds images and tars; name the tars ('both/*.tar'), or the images, or both"),
        (["best.pt", "a.jpg", "--top", "0"], "error: --top 0: a number from 1 to 1024 is needed"),
        (["best.pt", "a.jpg", "--batch-size", "0"], "error: --batch-size 0: a number from 1 to 1024 is needed"),
    ],
)
def test_mistakes(
    tmp_path: Path, checkpoint: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "both"):
        (tmp_path / folder).mkdir()
    for name in ("x.tar", "x.jpg"):
        (tmp_path / "both" / name).touch()
    os.link(checkpoint, "best.pt")
    shutil.copy(mixed / "a.jpg", "a.jpg")
    done = predict(*arguments)
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_not_one_good_image(checkpoint: Path, mixed: Path) -> None:
    done = predict(checkpoint, *(mixed / name for name in BAD[:3]))
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "error: not one image could be predicted"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tools.predict", *map(str, arguments), "--device", "cpu"]


def test_a_header_that_the_decoder_must_not_meet(tmp_path: Path, checkpoint: Path, mixed: Path) -> None:
    """As in test_bad_samples.py: among many others DALI's decoder ends the process over it."""
    good = (mixed / "a.jpg").read_bytes()
    for i in range(640):
        (tmp_path / f"{i:03d}.jpg").write_bytes(good[:100] + b"\3" * 900 + b"\xff\xd9" if i % 64 == 32 else good)
    arguments = command(checkpoint, tmp_path, "--json", "--batch-size", 64, "--threads", 1)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    complaints = [f"{tmp_path}/{i:03d}.jpg: not an image" for i in range(32, 640, 64)]
    assert (done.returncode, done.stderr.splitlines()) == (0, complaints)
    assert len(done.stdout.splitlines()) == 630


def test_a_reader_that_leaves(checkpoint: Path, mixed: Path) -> None:
    process = subprocess.Popen(
        command(checkpoint, *[mixed / "a.jpg"] * 200, "--batch-size", 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"{mixed / 'a.jpg'}\n"
    process.stdout.close()
    assert process.wait() == 1
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""
