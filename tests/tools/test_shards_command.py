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
    assert "train: 6 images of 1 classes" in done.stdout, done.stderr
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
    assert "1 classes that the other splits in" in done.stderr
    assert "do not have: dog;" in done.stderr
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
    ("arguments", "message"),
    [
        (["{0}/nowhere", "{0}/out"], "nowhere: no such file or folder"),
        (["{0}/file", "{0}/out"], "file: neither a folder nor a tar (.tar .tar.gz "),
        (["{0}/flat", "{0}/out"], "flat: no images in class folders; use the layout SRC/CLASS/IMAGE"),
        (["{0}/text", "{0}/out"], "training can decode none of its 1 files (1 not an image)"),
        (["{0}/text", "{0}/text/out"], "overlap"),
        (["{0}/text", "{0}/out", "--shard-samples", "0"], "--shard-samples 0: at least 1 is needed"),
        (["{0}/text", "{0}/out", "--name", "a/b"], "--name 'a/b': only letters, digits and underscores"),
        (["{0}/text", "{0}/out", "--shard-bytes", "many"], "--shard-bytes 'many': a size such as 256MB or 1GiB"),
        (["{0}/text", "{0}/out", "--shard-bytes", "1MB", "--shard-samples", "1"], "give one"),
        (["{0}/text", "{0}/out", "--quality", "0"], "--quality 0: 1 to 100"),
        (["{0}/text", "{0}/out", "--workers", "0"], "--workers 0: at least 1"),
        (["{0}/text", "{0}/file"], "file: cannot be written to (File exists)"),
        (["{0}/good", "{0}/foreign"], "foreign has 1 tars with names from another tool (imagenet1k-train-0000.tar)"),
        (["{0}/text", "nosuch://bucket/x"], "nosuch://bucket/x: cannot be written to"),
    ],
)
def test_bad_input_gets_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    write_image(tmp_path / "flat" / "1.jpg", 1)
    write_image(tmp_path / "good" / "a" / "1.jpg", 1)
    (tmp_path / "text" / "a").mkdir(parents=True)
    (tmp_path / "text" / "a" / "1.jpg").write_text("no image")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "imagenet1k-train-0000.tar").touch()
    done = call_shards(capsys, "convert", *[argument.format(tmp_path) for argument in arguments])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_empty_class_folders_are_mentioned(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "images", 3)
    (folder / "unused").mkdir()
    done = shards_command("convert", folder, tmp_path / "out")
    assert "warning: skipped 1 class folders without images: unused" in done.stdout
    assert open_shards(str(tmp_path / "out"), "train").classes == ("ant", "bee", "cat")
