"""The `shards` command, as a user runs it."""

import gc
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from pipelines.shards.shard_set import open_shards
from tests.conftest import write_image, write_tree
from tools.shards.cli import main


def shards_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.shards", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def call_shards(capsys: pytest.CaptureFixture[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command in this process: faster, and sufficient for errors that it finds before its work."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    return subprocess.CompletedProcess(arguments, end.value.code, *capsys.readouterr())


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_with_webdataset(tars: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Returns the samples as the format's own library reads them, without our code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the garbage collector closes its files
        samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
        gc.collect()
    return samples


def test_convert_keeps_every_byte(tmp_path: Path, image_folder: Path) -> None:
    done = shards_command("convert", image_folder, tmp_path / "out", "--name", "valid", "--shard-samples", 10)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("valid: 25 images of 3 classes in 3 shards, ")
    assert done.stderr == ""  # no progress bar without a terminal, no log of a decoder
    info = json.loads((tmp_path / "out" / "_info.json").read_text())
    assert info["classes"] == ["ant", "bee", "cat"]
    split = info["splits"]["valid"]
    assert split["name"] == "valid"  # the four keys that timm reads
    assert split["num_samples"] == 25
    assert split["filenames"] == [f"valid-00000{i}.tar" for i in range(3)]
    assert split["shard_lengths"] == [10, 10, 5]
    samples = read_with_webdataset([tmp_path / "out" / name for name in info["splits"]["valid"]["filenames"]])
    stored = {(info["classes"][int(sample["cls"])], sample["jpg"]) for sample in samples}
    originals = {(path.parent.name, path.read_bytes()) for path in image_folder.rglob("*.jpg")}
    assert stored == originals
    assert len({sample["__key__"] for sample in samples}) == 25
    assert not any(" " in sample["__key__"] or "." in sample["__key__"] for sample in samples)
    labels = [int(sample["cls"]) for sample in samples]
    assert labels == open_shards(str(tmp_path / "out"), "valid").labels()
    assert labels != sorted(labels)


def test_convert_is_deterministic(tmp_path: Path, image_folder: Path) -> None:
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        done = shards_command("convert", image_folder, tmp_path / name, "--name", "valid", "--seed", seed)
        assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "first") == digests(tmp_path / "again")
    assert digests(tmp_path / "first") != digests(tmp_path / "other")


def test_convert_leaves_out_what_training_cannot_decode(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "images", 9)
    good = (folder / "ant" / "000.jpg").read_bytes()
    (folder / "ant" / "truncated.jpg").write_bytes(good[: len(good) // 2])
    (folder / "bee" / "empty.jpg").write_bytes(b"")
    (folder / "bee" / "notes.txt").write_text("no image")
    write_image(folder / "cat" / "moving.gif", 1)
    (folder / "cat" / ".DS_Store").write_text("skipped")
    done = shards_command("convert", folder, tmp_path / "out")
    assert done.returncode == 0
    assert "train: 10 images of 3 classes" in done.stdout
    assert "encoded: 1 GIF encoded as jpg" in done.stdout
    assert "left out: 3 files (1 empty file; 1 jpeg image cut short; 1 not an image); see rejected.jsonl" in done.stdout
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {(Path(entry["path"]).name, entry["reason"]) for entry in rejected} == {
        ("truncated.jpg", "jpeg image cut short"),
        ("empty.jpg", "empty file"),
        ("notes.txt", "not an image"),
    }
    assert {entry["split"] for entry in rejected} == {"train"}


def test_names_with_dots_blanks_and_accents(tmp_path: Path) -> None:
    for i, name in enumerate(("a b.c.jpg", "größe.jpg", "日本.jpg", f"{'long' * 50}.jpg", "deep/er/x.JPEG")):
        write_image(tmp_path / "images" / "some class.v2" / name, i)
    (tmp_path / "images" / "some class.v2" / "no_extension").write_bytes(
        (tmp_path / "images" / "some class.v2" / "a b.c.jpg").read_bytes()
    )
    done = shards_command("convert", tmp_path / "images", tmp_path / "out")
    assert "train: 6 images of 1 class in" in done.stdout, done.stderr
    found = open_shards(str(tmp_path / "out"), "train")
    assert found.classes == ("some class.v2",)
    samples = read_with_webdataset(found.tars)
    assert len(samples) == 6
    assert all(Image.open(io.BytesIO(sample["jpg"])).size == (90, 70) for sample in samples)


def test_later_splits_share_the_classes(tmp_path: Path, image_folder: Path) -> None:
    out = tmp_path / "out"
    assert shards_command("convert", image_folder, out).returncode == 0
    fewer = tmp_path / "fewer"
    shutil.copytree(image_folder / "cat", fewer / "cat")
    done = shards_command("convert", fewer, out, "--name", "valid")
    assert done.returncode == 0, done.stderr
    assert set(open_shards(str(out), "valid").labels()) == {2}
    write_image(fewer / "dog" / "1.jpg", 1)
    before = digests(out)
    done = shards_command("convert", fewer, out, "--name", "test")
    assert done.returncode == 2
    assert "do not have 1 of its classes: dog; it does not have 2 of theirs: ant, bee; " in done.stderr
    assert digests(out) == before


def test_an_existing_split_is_replaced_only_when_asked(tmp_path: Path, image_folder: Path) -> None:
    out = tmp_path / "out"
    assert shards_command("convert", image_folder, out, "--shard-samples", 5).returncode == 0
    refused = shards_command("convert", image_folder, out)
    assert refused.returncode == 2
    assert "already has a split 'train' from another conversion: --shard-samples was 5 and is 1000; give" in refused.stderr
    assert shards_command("convert", image_folder, out, "--overwrite").returncode == 0
    assert sorted(digests(out)) == ["_info.json", "train-000000.idx", "train-000000.tar"]
    (out / "_info.json").unlink()  # shards from elsewhere are not overwritten either
    before = digests(out)
    assert shards_command("convert", image_folder, out).returncode == 2
    assert digests(out) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [("1.jpg", "no images in class folders; use the layout"), ("a/1.jpg", "training can decode none of its 1 files (1 jpeg")],
)
def test_a_source_without_images_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    image = tmp_path / "images" / name
    write_image(image, 1)
    image.write_bytes(image.read_bytes()[:1000])
    done = call_shards(capsys, "convert", tmp_path / "images", tmp_path / "out")
    assert (done.returncode, message in done.stderr) == (2, True)
    assert not list((tmp_path / "out").iterdir())


def test_empty_class_folders_are_mentioned(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "images", 3)
    (folder / "unused").mkdir()
    done = shards_command("convert", folder, tmp_path / "out")
    assert "warning: skipped 1 class folder without images: unused" in done.stdout
    assert open_shards(str(tmp_path / "out"), "train").classes == ("ant", "bee", "cat")
