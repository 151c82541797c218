"""A root that holds the splits, and splits that belong together: recognized, converted at once, compared."""

import json
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import write_image
from tests.helpers.command import Done, run_main
from tests.tools.test_sources import make_tar
from tools.shards.cli import main
from tools.shards.sources.splits import find_splits
from tools.shards.storage import open_storage


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("image") / "1.jpg"
    write_image(path, 1, (16, 16))
    return path.read_bytes()


def make_folders(root: Path, image: bytes, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image)
    return root


def shards(*arguments: object) -> Done:
    return run_main(main, *arguments, "--workers", 1)


def splits_of(out: Path) -> dict[str, int]:
    return {name: split["num_samples"] for name, split in json.loads((out / "_info.json").read_text())["splits"].items()}


def classes_of(out: Path) -> list[str]:
    return list(json.loads((out / "_info.json").read_text())["classes"])


FOLDERS = [
    (("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"), {"train": "train", "valid": "val"}),
    (("Training/a/1.jpg", "Validation/a/1.jpg", "TEST/a/1.jpg"), {"train": "Training", "valid": "Validation", "test": "TEST"}),
    (("train/a/1.jpg", "valid/a/1.jpg", "readme/notes.txt", "@eaDir/t/x.jpg"), {"train": "train", "valid": "valid"}),
    (("training_set/a/1.jpg", "test_set/a/1.jpg"), {"train": "training_set", "test": "test_set"}),
    (("train/a/1.jpg", "eval/a/1.jpg", "extra/1.jpg"), {"train": "train", "valid": "eval"}),
    (("train/a/1.jpg",), {"train": "train"}),
    (("train/a/1.jpg", "val/a/1.jpg", "eval/a/1.jpg"), {"train": "train", "valid": "val", "valid2": "eval"}),
]


@pytest.mark.parametrize(("names", "expected"), FOLDERS)
def test_a_root_of_splits_is_recognized(tmp_path: Path, image: bytes, names: tuple[str, ...], expected: dict[str, str]) -> None:
    root = make_folders(tmp_path / "my root", image, *names)
    done = shards("convert", root, tmp_path / "out")
    assert done.status == 2
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    commands = done.stderr.partition("convert each: ")[2].partition("; or all: ")[0].split(" && ")
    for command, (name, folder) in zip(commands, expected.items(), strict=True):  # as a user pastes them
        assert shlex.split(command) == ["shards", "convert", str(root / folder), str(tmp_path / "out"), "--name", name]
        assert shards(*shlex.split(command)[1:]).status == 0
    assert set(splits_of(tmp_path / "out")) == set(expected)
    shutil.rmtree(tmp_path / "out")
    command = done.stderr.partition("; or all: ")[2].partition(";")[0]
    assert shards(*shlex.split(command)[1:]).status == 0
    assert set(splits_of(tmp_path / "out")) == set(expected)
    assert classes_of(tmp_path / "out") == sorted({name.split("/")[1] for name in names if name.lower().startswith("train")})


@pytest.mark.parametrize(
    "names",
    [
        ("train/1.jpg", "car/1.jpg", "test/1.jpg"),
        ("train/steam/1.jpg", "car/1.jpg", "plane/2.jpg"),
        ("a/1.jpg", "b/2.jpg"),
        ("trainer/a/1.jpg", "validator/a/1.jpg"),
    ],
)
def test_classes_are_no_splits(tmp_path: Path, image: bytes, names: tuple[str, ...]) -> None:
    root = make_folders(tmp_path / "root", image, *names)
    done = shards("convert", root, tmp_path / "out")
    assert done.status == 0, done.stderr
    assert classes_of(tmp_path / "out") == sorted({name.split("/")[0] for name in names})
    done = shards("convert", "--splits", root, tmp_path / "two")
    assert f"{root}: no splits found; --splits needs" in done.stderr


def test_classes_that_are_called_like_splits(tmp_path: Path, image: bytes) -> None:
    root = make_folders(tmp_path / "root", image, "train/a/1.jpg", "val/a/1.jpg")
    assert shards("convert", root, tmp_path / "out").stderr.endswith("; if these folders are classes, give --source folders\n")
    assert shards("convert", root, tmp_path / "out", "--source", "folders").status == 0
    assert classes_of(tmp_path / "out") == ["train", "val"]


def test_splits_without_class_folders(tmp_path: Path, image: bytes) -> None:
    flat = make_folders(tmp_path / "flat", image, "train/1.jpg", "val/1.jpg")
    done = shards("convert", flat, tmp_path / "out")
    assert f"{flat}: holds splits without class folders ({flat}/train, {flat}/val); convert each by itself" in done.stderr
    mixed = make_folders(tmp_path / "mixed", image, "train/a/1.jpg", "val/a/1.jpg", "test/1.jpg")
    done = shards("convert", mixed, tmp_path / "out")
    assert f"; {mixed}/test: no class folders, --labels is needed;" in done.stderr
    done = shards("convert", "--splits", mixed, tmp_path / "out")
    assert done.stderr == f"warning: {mixed}/test has no class folders and is not converted\n"
    assert splits_of(tmp_path / "out") == {"train": 1, "valid": 1}


def test_splits_as_files(tmp_path: Path, image: bytes) -> None:
    for folder, names in (("tars", ("x-train-000", "x-train-001", "x-val-000")), ("odd", ("train-000", "training-000"))):
        (tmp_path / folder).mkdir()
        for name in names:
            make_tar(tmp_path / folder / f"{name}.tar", {"1.jpg": image, "1.cls": b"0"})
    (tmp_path / "parquet").mkdir()
    table = pa.table({"image": pa.array([{"bytes": image, "path": None}]), "label": [0]})
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(table, tmp_path / "parquet" / f"{name}.parquet")
    for folder, pattern, expected in (
        ("tars", "x-train*.tar", {"train": 2, "valid": 1}),
        ("parquet", "train*.parquet", {"test": 1, "train": 2}),
    ):
        done = shards("convert", tmp_path / folder, tmp_path / "out")
        assert f"shards convert '{tmp_path}/{folder}/{pattern}' {tmp_path}/out --name train && " in done.stderr
        assert "--source folders" not in done.stderr
        done = shards("convert", "--splits", tmp_path / folder, tmp_path / folder / "out", "--json")
        assert done.status == 0, done.stderr
        summaries = [json.loads(line) for line in done.stdout.splitlines()]
        assert summaries[0]["split"] == "train"
        assert splits_of(tmp_path / folder / "out") == expected
    assert list(find_splits(str(tmp_path / "odd")).sources.values()) == [
        f"{tmp_path}/odd/train-000.tar",
        f"{tmp_path}/odd/training-000.tar",
    ]


def test_a_hash_in_the_name_of_a_file_makes_no_split(tmp_path: Path, image: bytes) -> None:
    table = pa.table({"image": pa.array([{"bytes": image, "path": None}]), "label": [0]})
    for name in ("train-00000-of-00002-8d6a1ac6ba24c8f7", "train-00001-of-00002-1c3d5e7fa0b2c4d6", "test-00000-of-00001"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert find_splits(str(tmp_path)).sources == {
        "train": f"{tmp_path}/train*.parquet",
        "test": f"{tmp_path}/test-00000-of-00001.parquet",
    }
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    assert not find_splits(str(tmp_path)).sources


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("ant", "cat"), ""),
        (
            ("ant", "dog"),
            "the other splits in {0} do not have 1 of its classes: dog; it does not have 2 of theirs: bee, cat; all",
        ),
        (
            ("ant", "bee", "cat", "dog"),
            "the other splits in {0} do not have 1 of its classes: dog; all splits of a",
        ),
        (
            ("Ant", "bee", "cat"),
            "it does not have 1 of theirs: ant; only the case differs in Ant here and ant there; ",
        ),
        (("ant", "x\x1b[1m"), "of its classes: x\\x1b[1m; it does"),
    ],
)
def test_classes_of_two_splits_are_compared(tmp_path: Path, image: bytes, classes: tuple[str, ...], message: str) -> None:
    train = make_folders(tmp_path / "train", image, "ant/1.jpg", "bee/1.jpg", "cat/1.jpg")
    valid = make_folders(tmp_path / "valid", image, *(f"{name}/1.jpg" for name in classes))
    out = tmp_path / "out"
    assert shards("convert", train, out).status == 0
    done = shards("convert", valid, out, "--name", "valid")
    assert done.status == (2 if message else 0), done.stderr
    assert message.format(out) in done.stderr
    assert splits_of(out) == ({"train": 3} if message else {"train": 3, "valid": 2})


def test_other_options_of_the_source_are_named(tmp_path: Path, image: bytes) -> None:
    """Also after an interruption. Options that change nothing are no reason to refuse."""
    source = tmp_path / "x.parquet"
    table = pa.table({"image": pa.array([{"bytes": image, "path": None}] * 2), "label": [0, 1], "other": ["a", "b"]})
    pq.write_table(table, source)
    out = tmp_path / "out"
    assert shards("convert", source, out).status == 0
    assert "already complete" in shards("convert", source, out, "--source", "parquet").stdout
    done = shards("convert", source, out, "--label-key", "other")
    assert done.status == 2
    assert ": --label-key was not given and is other; the images of the source have other " in done.stderr
    assert shards("convert", source, out, "--label-key", "other", "--overwrite").status == 0
    done = shards("convert", source, out)
    assert ": --label-key was other and is not given; the images" in done.stderr

    images = make_folders(tmp_path / "images", image, "1.jpg", "2.jpg")
    lists = [tmp_path / "list.csv", tmp_path / "other" / "list.csv"]
    lists[1].parent.mkdir()
    for path, text in zip(lists, ("1.jpg,a\n2.jpg,b\n", "1.jpg,b\n2.jpg,a\n"), strict=True):
        path.write_text(text)
    assert shards("convert", images, tmp_path / "out2", "--labels", lists[0]).status == 0
    done = shards("convert", images, tmp_path / "out2", "--labels", lists[1])
    assert ": --labels was list.csv (" in done.stderr
    pq.write_table(table.slice(0, 1), source)
    done = shards("convert", source, out, "--label-key", "other")  # the options are the same
    assert ": the source had 2 images and has 1; give another --name" in done.stderr


def test_options_of_an_interrupted_conversion_are_named(tmp_path: Path, image: bytes) -> None:
    images = make_folders(tmp_path / "images", image, "1.jpg", "2.jpg", "3.jpg")
    for name, text in (("one.csv", "1.jpg,a\n2.jpg,b\n3.jpg,a\n"), ("two.csv", "1.jpg,a\n2.jpg,c\n3.jpg,a\n")):
        (tmp_path / name).write_text(text)
    (images / "2.jpg").write_bytes(image[:100])
    out = tmp_path / "out"
    assert shards("convert", images, out, "--labels", tmp_path / "one.csv", "--strict", "--shard-samples", 1).status == 3
    done = shards("convert", images, out, "--labels", tmp_path / "two.csv", "--shard-samples", 1)
    assert "the conversion of split 'train' was started differently: --labels was one.csv (" in done.stderr
    assert shards("convert", images, out, "--labels", tmp_path / "one.csv", "--shard-samples", 1).status == 0
    assert splits_of(out) == {"train": 2}


def test_two_conversions_of_one_split_exclude_each_other(tmp_path: Path, image: bytes) -> None:
    """Those of two splits do not. The second of them must have the classes of the first, whichever ends first."""
    source = make_folders(tmp_path / "src", image, "a/1.jpg", "b/1.jpg")
    out = tmp_path / "out"
    with open_storage(str(out)).lock(".train.convert"):
        done = shards("convert", source, out)
        assert done.status == 2
        assert done.stderr == f"error: {out}/.train.convert: another process is at work there; wait for it or end it\n"
        assert shards("convert", source, out, "--name", "valid").status == 0
    assert shards("convert", source, out).status == 0
    assert splits_of(out) == {"train": 2, "valid": 2}
