"""Parquet files with rows that lack something: each is left out with its number, and no cause is named that is not there."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import write_image
from tests.helpers.command import Done, run_main
from tools.shards.cli import main

NAMES = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("image") / "1.jpg"
    write_image(path, 1, (16, 16))
    return path.read_bytes()


def write(path: Path, columns: dict[str, Any], features: object = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def convert(source: Path, *options: object) -> tuple[Done, dict[str, str], list[str]]:
    """Returns the end of the command, the reasons of the rows that were left out, and the classes."""
    out = source.parent / "out"
    done = run_main(main, "convert", source, out, "--workers", 1, *options)
    lines = (out / "rejected.jsonl").read_text().splitlines() if (out / "rejected.jsonl").exists() else []
    info = json.loads((out / "_info.json").read_text()) if (out / "_info.json").exists() else {}
    return done, {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}, info.get("classes", [])


def images(image: bytes, count: int) -> list[dict[str, Any] | None]:
    return [{"bytes": image, "path": None} for _ in range(count)]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "no image"),
        ({"bytes": None, "path": None}, "no image"),
        ({"bytes": None, "path": "imgs/2.jpg"}, "only the path of an image file, without its bytes"),
        ({"bytes": b"", "path": None}, "empty file"),
        ({"bytes": b"text", "path": None}, "not an image"),
    ],
)
def test_a_row_without_image_is_left_out(tmp_path: Path, image: bytes, bad: dict[str, Any] | None, reason: str) -> None:
    column = [*images(image, 2), bad, *images(image, 2)]
    source = write(tmp_path / "x.parquet", {"image": column, "label": [0, 1, 0, 1, 0]}, NAMES)
    done, rejected, classes = convert(source)
    assert done.status == 0, done.stderr
    assert "train: 4 images of 2 classes" in done.stdout
    assert rejected == {f"x/00000002{'_imgs/2.jpg' if 'only' in reason else ''}": reason}
    assert classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (pa.array([0, 1, None, 1]), "no label"),
        (pa.array([0.0, 1.0, float("nan"), 1.0]), "no label"),
        (pa.array([0.0, 1.0, 0.5, 1.0]), "label 0.5 is neither a class number nor a class name"),
        (pa.array([0, 1, -1, 1]), "label -1, which stands for a missing label"),
        (pa.array(["cat", "dog", None, "dog"]), "no label"),
        (pa.array(["cat", "dog", "", "dog"]), "no label"),
        (pa.array(["cat", "dog", None, "dog"]).dictionary_encode(), "no label"),
    ],
)
def test_a_row_without_label_is_left_out(tmp_path: Path, image: bytes, labels: pa.Array, reason: str) -> None:
    source = write(tmp_path / "x.parquet", {"image": images(image, 4), "label": labels}, NAMES)
    done, rejected, classes = convert(source)
    assert done.status == 0, done.stderr
    assert (rejected, classes) == ({"x/00000002": reason}, ["cat", "dog"])


@pytest.mark.parametrize(
    ("column", "labels", "message"),
    [
        (["1.jpg"] * 3, [0, 1, 0], "(3 rows: only the path of an image file, without its bytes)"),
        (None, [[0, 1]] * 3, "(3 rows: label [0, 1] is neither a class number nor a class name)\n"),
        (None, [True] * 3, "(3 rows: label True is neither a class number nor a class name)\n"),
    ],
)
def test_files_without_a_usable_row(
    tmp_path: Path, image: bytes, column: list[Any] | None, labels: list[Any], message: str
) -> None:
    column = images(image, 3) if column is None else column
    done, _, _ = convert(write(tmp_path / "x.parquet", {"image": column, "label": labels}, NAMES))
    assert done.status == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_texts_are_read_like_the_labels_of_shards(tmp_path: Path, image: bytes) -> None:
    labels = ["1.0", "2", "10.0", " 2\n", "-5", "b'1'", "1e99"]
    done, rejected, classes = convert(write(tmp_path / "x.parquet", {"image": images(image, 7), "label": labels}))
    assert done.status == 0, done.stderr
    assert rejected.keys() == {"x/00000004", "x/00000005", "x/00000006"}
    assert classes == [str(number) for number in range(11)]


def test_a_line_shows_a_few_reasons_only(tmp_path: Path, image: bytes) -> None:
    """A reason may name a label, and be another one for each row."""
    bad = [f"[{i}]" for i in range(30)]
    done, rejected, _ = convert(write(tmp_path / "x.parquet", {"image": images(image, 31), "label": ["cat", *bad]}))
    assert len(rejected) == 30
    assert "; 20 other texts); see rejected.jsonl\n" in done.stdout
    done, _, _ = convert(write(tmp_path / "y" / "y.parquet", {"image": images(image, 30), "label": bad}))
    assert (done.status, done.stderr.count("1 row: "), "; ...)\n" in done.stderr) == (2, 10, True)


def test_columns_of_other_names(tmp_path: Path, image: bytes) -> None:
    columns = {"img": [image] * 2, "fine_label": [0, 1], "coarse_label": [0, 0]}
    source = write(tmp_path / "x.parquet", columns)
    done, _, _ = convert(source)
    names = "img, fine_label, coarse_label"
    assert f"no column 'image' among {names}; --image-key names another, for example img\n" in done.stderr
    done, _, _ = convert(source, "--image-key", "img")
    assert f"no column 'label' among {names}; --label-key names another, for example fine_label, coarse_label\n" in done.stderr
    done, rejected, classes = convert(source, "--image-key", "img", "--label-key", "coarse_label")
    assert done.status == 0, done.stderr
    assert (rejected, classes) == ({}, ["0"])


@pytest.mark.parametrize("features", [7, [], {"label": 7}, {"label": {"names": "cat"}}, {"label": {"names": [1, 2]}}])
def test_metadata_of_another_form_is_no_list_of_classes(tmp_path: Path, image: bytes, features: object) -> None:
    source = write(tmp_path / "x.parquet", {"image": images(image, 2), "label": [0, 1]}, features)
    done, _, classes = convert(source)
    assert done.status == 0, done.stderr
    assert classes == ["0", "1"]


@pytest.mark.parametrize(
    ("part", "message"), [(0.3, "damaged in the rows from 0 on ("), (0.6, "not a readable Parquet file (")]
)
def test_damaged_data_is_named(tmp_path: Path, image: bytes, part: float, message: str) -> None:
    source = write(tmp_path / "x.parquet", {"image": images(image, 200), "label": [0, 1] * 100}, NAMES)
    data = bytearray(source.read_bytes())
    begin = int(len(data) * part)
    data[4:begin] = b"\xff" * (begin - 4)
    source.write_bytes(data)
    done, _, _ = convert(source)
    assert done.status == 2
    assert f"x.parquet: {message}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_kept_files_of_another_label_are_unpacked_again(tmp_path: Path, image: bytes) -> None:
    source = write(tmp_path / "x.parquet", {"image": images(image, 3), "label": [0, 1, None], "other": ["a", "b", "c"]})
    for key, classes in (("label", ["0", "1"]), ("other", ["a", "b", "c"])):
        done, _, found = convert(source, "--scratch", tmp_path / "scratch", "--label-key", key, "--overwrite")
        assert done.status == 0, done.stderr
        assert found == classes
