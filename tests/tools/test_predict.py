"""The `predict` command on files, folders and shards."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.load_model import load_model
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.pillow import resized_center_crop
from tests.conftest import write_image
from tests.helpers import checkpoints
from tests.helpers.command import Done, run_main
from tests.helpers.runs import ONE_THREAD
from tools.predict import cli

# The tests' checkpoint has no scores.
WEIGHTS = "weights: ema (averaged; the checkpoint has no validation scores to choose by)\n"


def predict(*arguments: object) -> Done:
    """Runs the command. The line about the weights, with which standard error begins, is left out."""
    done = run_main(cli.main, *arguments, "--device", "cpu", "--threads", 1)
    return done._replace(stderr=done.stderr.removeprefix(WEIGHTS))


def predictions(*arguments: object) -> list[dict[str, Any]]:
    return parse(predict(*arguments, "--json"))


def parse(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def probabilities(prediction: dict[str, Any]) -> torch.Tensor:
    """Returns the probabilities in the order of the classes."""
    return torch.tensor([entry["probability"] for entry in sorted(prediction["predictions"], key=lambda entry: entry["class"])])


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("run") / "best.pt")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good images in several formats, and bad ones."""
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


def test_usage() -> None:
    done = run_main(cli.main, "--help")
    assert (done.status, done.stdout.split("\n")[0]) == (0, "usage: predict [-h] [OPTIONS] CHECKPOINT IMAGES ...")


def test_probabilities_match_validation(checkpoint: Path, shards: Path) -> None:
    """Compares them with those of the network on batches of the validation loader."""
    model = load_model(checkpoint).model
    loader = build_loader(
        DataConfig(valid=str(shards)),
        LoaderSpec(split="valid", batch_size=8, image_size=32, device=torch.device("cpu"), num_threads=1),
    )
    with loader, torch.inference_mode():
        expected = torch.cat([model(batch["image"]).softmax(1) for batch in loader])
    predicted = torch.stack([*map(probabilities, predictions(checkpoint, shards, "--batch-size", 7))])
    assert torch.allclose(predicted, expected, atol=1e-5)


def test_image_formats(checkpoint: Path, mixed: Path) -> None:
    """Compares the probabilities with those of the network on Pillow's pixels, which differ slightly from DALI's."""
    found = predictions(checkpoint, mixed)
    trained = load_model(checkpoint)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (checkpoints.MEAN, checkpoints.STD))
    for name, prediction in zip(GOOD, found, strict=True):
        with Image.open(mixed / name) as image:
            pixels = torch.from_numpy(np.array(resized_center_crop(image.convert("RGB"), 32))).permute(2, 0, 1).float() / 255
        with torch.inference_mode():
            expected = trained.model(((pixels - mean) / std)[None]).softmax(1)[0]
        assert torch.allclose(probabilities(prediction), expected, atol=0.02), name
    stacked = torch.stack([*map(probabilities, found)])
    assert (stacked.amax(0) - stacked.amin(0)).max() > 0.1  # otherwise the comparison would prove nothing


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_bad_files_are_reported_and_skipped(checkpoint: Path, mixed: Path, batch_size: int) -> None:
    done = predict(checkpoint, mixed, "--json", "--batch-size", batch_size)
    assert done.status == 0
    assert [prediction["path"] for prediction in parse(done)] == [f"{mixed}/{name}" for name in GOOD]
    assert sorted(done.stderr.splitlines()) == [
        f"{mixed}/d text.jpg: not an image",
        f"{mixed}/e.png: empty file",
        f"{mixed}/f.jpg: jpeg image cut short",
        f"{mixed}/h.jpg: broken symbolic link",
    ]


def test_json_output(checkpoint: Path, mixed: Path) -> None:
    for prediction in predictions(checkpoint, mixed / "a.jpg", mixed / "b.PNG"):
        assert set(prediction) == {"path", "predictions"}
        entries = prediction["predictions"]
        assert {(entry["class"], entry["name"]) for entry in entries} == {(0, "ant"), (1, "bee"), (2, "cat")}
        values = [entry["probability"] for entry in entries]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1)


def test_text_output(checkpoint: Path, mixed: Path) -> None:
    [prediction] = predictions(checkpoint, mixed / "a.jpg", "--top", 2)
    lines = [f"  {100 * entry['probability']:5.1f} %  {entry['name']}" for entry in prediction["predictions"]]
    assert len(lines) == 2
    assert predict(checkpoint, mixed / "a.jpg", "--top", 2).stdout.splitlines() == [f"{mixed / 'a.jpg'}", *lines]


def test_order_and_repetition(checkpoint: Path, mixed: Path, shards: Path) -> None:
    found = predictions(checkpoint, mixed / "g.webp", shards, mixed / "a.jpg", mixed / "g.webp", "--batch-size", 4)
    places = [prediction.get("path") or prediction["key"][:8] for prediction in found]
    assert places == [str(mixed / "g.webp"), *(f"{i:08d}" for i in range(25)), str(mixed / "a.jpg"), str(mixed / "g.webp")]
    assert torch.allclose(probabilities(found[0]), probabilities(found[-1]), atol=1e-5)


def test_quoted_globs(checkpoint: Path, mixed: Path) -> None:
    found = predictions(checkpoint, mixed / "sub" / "**" / "*", mixed / "g.w*")
    assert [prediction["path"] for prediction in found] == [f"{mixed}/sub/deep/i.jpg", f"{mixed}/g.webp"]
    done = predict(checkpoint, mixed / "**" / "*.jpg", "--json")
    assert [prediction["path"] for prediction in parse(done)] == [f"{mixed}/a.jpg", f"{mixed}/sub/deep/i.jpg"]
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        f"{mixed}/{name}" for name in sorted(BAD) if name.endswith(".jpg")
    ]


def test_shards_and_their_files_agree(checkpoint: Path, shards: Path, image_folder: Path) -> None:
    """Covers labels, a folder with several splits, a glob and a brace pattern."""
    done = predict(checkpoint, shards, "--json")
    assert (done.status, done.stderr) == (0, "")
    found = parse(done)
    by_name = {Path(p["path"]).stem: p for p in predictions(checkpoint, image_folder, "--batch-size", 7)}
    assert len(found) == len(by_name) == 25
    for prediction in found:
        _, name, number = prediction["key"].split("_")
        assert prediction["label"] == {"class": ("ant", "bee", "cat").index(name), "name": name}
        assert Path(prediction["tar"]).parent == shards
        assert torch.allclose(probabilities(prediction), probabilities(by_name[number]), atol=1e-5)
    for pattern in ("valid-*.tar", "valid-{000000..000002}.tar"):
        assert predict(checkpoint, shards / pattern, "--json").stdout == done.stdout
    text = predict(checkpoint, shards / "valid-000000.tar").stdout.splitlines()
    assert text[0] == f"{shards}/valid-000000.tar:{found[0]['key']}  (label: {found[0]['label']['name']})"
    assert len(text) == 10 * 4
    assert len(predictions(checkpoint, shards, "--split", "train")) == 61


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_foreign_shards(tmp_path: Path, checkpoint: Path, mixed: Path) -> None:
    """Covers missing labels, class names as labels, labels in JSON, bad labels and a missing image."""
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
    assert {prediction["key"]: prediction.get("label") for prediction in parse(done)} == {
        "0": None,
        "1": {"class": 2, "name": "cat"},
        "2": None,
        "4": {"class": 0, "name": "ant"},
        "6": None,
    }
    messages = done.stderr.splitlines()
    assert messages[0].startswith(f"{tar}:2: predicted without its label; {tar}:")
    assert "the label is 'dog', which is none of the 3 classes" in messages[0]
    assert messages[1:] == [f"{tar}:3: no image among its members, .cls", f"{tar}:5: jpeg image cut short"]
    found = predictions(checkpoint, tar, "--label-key", "kind")
    labels = {prediction["key"]: prediction["label"] for prediction in found if "label" in prediction}
    assert labels == {"6": {"class": 1, "name": "bee"}}


def test_shards_in_a_bucket(checkpoint: Path, shards: Path, s3_bucket: str) -> None:
    import s3fs

    s3fs.S3FileSystem().put(str(shards), f"{s3_bucket}/predict", recursive=True)
    done = predict(checkpoint, f"{s3_bucket}/predict", "--json")
    assert done.stdout == predict(checkpoint, shards, "--json").stdout.replace(str(shards), f"{s3_bucket}/predict")


def test_without_class_names(tmp_path: Path, mixed: Path) -> None:
    unnamed = checkpoints.write(tmp_path / "best.pt", classes=None)
    done = predict(unnamed, mixed / "a.jpg", "--top", 1)
    [prediction] = predictions(unnamed, mixed / "a.jpg")
    [first, *_] = prediction["predictions"]
    assert first["name"] is None
    assert done.stdout.splitlines()[1].endswith(f" %  class {first['class']}")


@pytest.mark.parametrize(("top1", "better"), [(63.4, "raw"), (50.0, "ema")])
def test_the_better_weights_are_taken_and_said(tmp_path: Path, mixed: Path, top1: float, better: str) -> None:
    scored = checkpoints.write(tmp_path / "best.pt", scores={"top1": top1, "ema_top1": 58.8})
    done = predict(scored, mixed / "a.jpg", "--json")
    assert done.stderr == f"weights: {better} (the better ones on the validation split)\n"
    asked = predict(scored, mixed / "a.jpg", "--json", "--weights", better)
    assert asked.stderr == f"weights: {better} (as --weights says)\n"
    assert asked.stdout == done.stdout


def test_weights(checkpoint: Path, mixed: Path) -> None:
    [ema], [raw] = (predictions(checkpoint, mixed / "a.jpg", "--weights", weights) for weights in ("ema", "raw"))
    assert (probabilities(ema) - probabilities(raw)).abs().max() > 0.01


def test_preprocessing_comes_from_the_checkpoint(tmp_path: Path, checkpoint: Path, mixed: Path) -> None:
    """Changes image size, crop and normalization one at a time."""
    [usual] = predictions(checkpoint, mixed / "a.jpg")
    base = checkpoints.state()["preprocessing"]
    for change in ({"image_size": 36}, {"resize_shorter": 50}, {"mean": (0.0, 0.0, 0.0)}, {"std": (0.4, 0.4, 0.4)}):
        other = checkpoints.write(tmp_path / "other.pt", preprocessing={**base, **change})
        [changed] = predictions(other, mixed / "a.jpg")
        assert (probabilities(changed) - probabilities(usual)).abs().max() > 1e-3, change


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tools.predict", *map(str, arguments), "--device", "cpu", "--threads", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD)


def test_header_that_would_end_the_process(tmp_path: Path, checkpoint: Path, mixed: Path) -> None:
    """Like test_bad_samples.py: among many other images, DALI's decoder would end the process over this one."""
    good = (mixed / "a.jpg").read_bytes()
    for i in range(640):
        (tmp_path / f"{i:03d}.jpg").write_bytes(good[:100] + b"\3" * 900 + b"\xff\xd9" if i % 64 == 32 else good)
    process = start(checkpoint, tmp_path, "--json", "--batch-size", 64)
    stdout, stderr = process.communicate()
    messages = [f"{tmp_path}/{i:03d}.jpg: jpeg image that the training decoder cannot read" for i in range(32, 640, 64)]
    assert (process.returncode, stderr.splitlines()) == (0, [WEIGHTS.strip(), *messages])
    assert len(stdout.splitlines()) == 630


def test_closed_pipe(checkpoint: Path, mixed: Path) -> None:
    process = start(checkpoint, *[mixed / "a.jpg"] * 200, "--batch-size", 1)
    assert process.stdout is not None
    assert process.stdout.readline() == f"{mixed / 'a.jpg'}\n"
    process.stdout.close()
    assert process.wait() == 1
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == WEIGHTS
