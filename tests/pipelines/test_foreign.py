"""Shards of other tools: extensions, member order, and missing or duplicate members."""

import io
import itertools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from model.checkpoint import load_checkpoint
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import MEAN, STD, Loader
from pipelines.shards.index import scan_tar
from pipelines.shards.shard_set import open_shards
from pipelines.shards.sorted_shards import order_warning
from tests.pipelines.test_labels import class_file
from tests.runs.test_train import train_command
from tests.tools.test_shards_command import shards_command
from tests.tools.test_sources import read_with_webdataset
from tests.tools.test_verify import Member, write_tar

CPU = torch.device("cpu")
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF"}
both = pytest.mark.parametrize("backend", ["dali", "pillow"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # keeps index files of these tars out of the user's cache


def gray(value: int, extension: str = "png") -> bytes:
    """Returns an image of one gray value, which identifies it."""
    file = io.BytesIO()
    options = {"lossless": True} if extension == "webp" else {}
    Image.new("RGB", (40, 36), (value, value, value)).save(file, FORMATS[extension.lower()], **options)
    return file.getvalue()


def loader(backend: str, location: Path | str, quarantine_file: Path | None = None, **options: Any) -> Loader:
    config = DataConfig(valid=str(location), backend=backend, **options)  # type: ignore[arg-type]
    threads = int(backend == "dali")
    settings: dict[str, Any] = {"batch_size": 4, "image_size": 32, "device": CPU, "num_threads": threads, "num_classes": 200}
    return build_loader(config, LoaderSpec(split="valid", quarantine=quarantine_file, **settings))


def read(backend: str, location: Path | str) -> list[tuple[int, int]]:
    """Returns the gray value and the label of each sample."""
    with loader(backend, location) as batches:
        found = list(batches)
    values = torch.cat([255 * (batch["image"][:, 0].mean(dim=(1, 2)) * STD[0] + MEAN[0]) for batch in found])
    labels = torch.cat([batch["target"] for batch in found])
    return list(zip(values.round().int().tolist(), labels.tolist(), strict=True))


@both
def test_extensions_in_any_case(tmp_path: Path, backend: str) -> None:
    extensions = [variant for name in FORMATS for variant in (name, name.upper(), name.capitalize())]
    members: list[Member] = []
    for i, extension in enumerate(extensions):
        members += [(f"{i}.{extension}", gray(10 * i, extension)), (f"{i}.{('cls', 'CLS', 'Cls')[i % 3]}", str(i).encode())]
    found = read(backend, write_tar(tmp_path / "x.tar", members, index=False))
    assert [label for _, label in found] == list(range(21))
    assert all(abs(value - 10 * label) <= 1 for value, label in found)  # JPEG


@both
@pytest.mark.parametrize("key", ["{0}", "train/{0}", "./a/b.v2/c d/{0}", "größe/{0}"])
def test_keys_with_folders_and_components_in_any_order(tmp_path: Path, backend: str, key: str) -> None:
    """Unused members come before, between and after image and label."""
    orders = list(itertools.permutations(["png", "cls", "json", "txt", "seg.png"]))
    contents = {"json": b'{"label": 99}', "txt": b"text", "seg.png": gray(255)}
    members: list[Member] = []
    for i, order in enumerate(orders):
        data = {**contents, "png": gray(i), "cls": str(i).encode()}
        members += [(f"{key.format(i)}.{extension}", data[extension]) for extension in order]
    found = read(backend, write_tar(tmp_path / "x.tar", members, index=False))
    assert found == [(i, i) for i in range(len(orders))]


@both
def test_of_several_images_and_labels_the_first_is_taken(tmp_path: Path, backend: str) -> None:
    """The first one in the tar counts, whatever its extension: for DALI, the Pillow backend and the converter."""
    images = [("a.jpg", gray(10, "jpg")), ("a.png", gray(20))]
    members = [*images, ("a.cls", b"1"), ("a.CLS", b"2")]
    members += [(name.replace("a", "b"), data) for name, data in [*reversed(images), ("a.CLS", b"2"), ("a.cls", b"1")]]
    tar = write_tar(tmp_path / "x.tar", members, index=False)
    assert read(backend, tar) == [(10, 1), (20, 2)]
    done = shards_command("convert", tar, tmp_path / "new")
    assert done.returncode == 0, done.stderr
    found = open_shards(str(tmp_path / "new"), "train")
    [with_png] = [sample for sample in read_with_webdataset(found.tars) if "png" in sample]
    assert (with_png["png"], with_png["cls"]) == (gray(20), b"2")


INCOMPLETE: list[Member] = [
    *(("0.png", gray(0)), ("0.cls", b"0")),
    *(("1.txt", b"text"), ("1.cls", b"1")),
    *(("2.png", gray(2)), ("2.json", b"{}")),
    *(("3.cls", b"3"), ("3.PNG", gray(3))),
    ("4.v2.png", gray(4)),
    *(("5.png", gray(5)), ("5.cls", b"5")),
]


def test_samples_that_lack_something(tmp_path: Path) -> None:
    """The loader leaves them out, or stops."""
    tar = write_tar(tmp_path / "x.tar", INCOMPLETE, index=False)
    write_tar(tmp_path / "a.tar", INCOMPLETE[:2], index=False)
    with pytest.raises(ValueError, match=r"x\.tar:\d+:1\.txt: no image among its members, \.txt \.cls"):
        loader("dali", tmp_path / "x.tar", on_error="stop").next()
    path = tmp_path / "quarantine.jsonl"
    with loader("dali", tmp_path / "{a,x}.tar", max_bad_fraction=1.0, quarantine_file=path) as batches:
        assert [target for batch in batches for target in batch["target"].tolist()] == [0, 0, 3, 5]
        assert batches.num_bad_samples == 3
    places = {component.name: component.offset for sample in scan_tar(tar) for component in sample}
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(bad["tar"], bad["offset"], bad["member"], bad["reason"]) for bad in found] == [
        (str(tar), places["1.txt"], "1.txt", "no image among its members, .txt .cls"),
        (str(tar), places["2.png"], "2.png", f"no .cls among its members, .png .json; {found[1]['reason'].partition('; ')[2]}"),
        (
            str(tar),
            places["4.v2.png"],
            "4.v2.png",
            f"no image and no .cls among its members, .v2.png; {found[2]['reason'].partition('; ')[2]}",
        ),
    ]
    assert "--label-key KEY" in found[1]["reason"]
    assert "give --image-key v2.png (in training --data.image-key)" in found[2]["reason"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (" 1.txt", "", r"x\.idx: damaged index; line '.*' is not made of four fields"),
        ("cls 3584 1 ", "cls two 1 ", r"x\.idx: damaged index; offset 'two' and size '1' of 1\.cls are not both numbers"),
        (
            "png 512 ",
            "png 5120000 ",
            r"x\.idx: damaged index, or the index of another tar .*; it lists bytes from .* where \S+x\.tar has none",
        ),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_tar(tmp_path / "x.tar", INCOMPLETE)
    write_tar(tmp_path / "a.tar", INCOMPLETE[:2])
    shards = open_shards(str(tmp_path / "{a,x}.tar"), "valid")  # reads only the first line of each index
    index = tmp_path / "x.idx"
    assert old in index.read_text()
    index.write_text(index.read_text().replace(old, new))
    options = {"batch_size": 4, "image_size": 32, "device": CPU, "num_threads": 1, "num_classes": 200}
    config = DataConfig(max_bad_fraction=1.0)
    with (
        build_loader(config, LoaderSpec(split="valid", **options), shards=shards) as batches,  # type: ignore[arg-type]
        pytest.raises(ValueError, match=message),
    ):
        list(batches)


def test_members_in_any_order(tmp_path: Path) -> None:
    """A common order of all samples, which has a fast path, and a different order in each sample."""
    kinds = {"png": gray(9), "cls": b"7", "json": b"{}", "txt": b"x" * 100_000}
    for orders in ([("json", "cls", "txt", "png")] * 9, [*itertools.permutations(kinds, 3)]):
        wanted = [order for order in orders if {"png", "cls"} <= set(order)]
        members = [(f"{i}.{kind}", kinds[kind]) for i, order in enumerate(wanted) for kind in order]
        tar = write_tar(tmp_path / f"{len(wanted)}.tar", members)
        assert read("dali", tar) == [(9, 7)] * len(wanted)


def sorted_shards(folder: Path, labels: Sequence[str], split: str, num_tars: int) -> None:
    """Writes tars of gray images with the labels in `.json`."""
    per_tar = len(labels) // num_tars
    for number in range(num_tars):
        share = enumerate(labels[number * per_tar : (number + 1) * per_tar])
        members = [
            (f"{i}.{end}", data)
            for i, label in share
            for end, data in (("json", json.dumps({"meta": {"class": label}}).encode()), ("png", gray(i)))
        ]
        write_tar(folder / f"{split}-{number}.tar", members, index=False)


def test_training_on_them(tmp_path: Path) -> None:
    """Shards sorted by class, with names in `.json`, give a warning, and the command in it fixes them."""
    names = ("ant", "bee", "cat")
    sorted_shards(tmp_path, ["ant"] * 52 + ["cat"] * 52, "train", 4)
    sorted_shards(tmp_path, ["ant", "cat"] * 4, "valid", 1)
    done = train_command(
        *("--data.train", tmp_path / "train-*.tar", "--data.valid", tmp_path / "valid-*.tar", "--data.label-key", "meta.class"),
        *(
            "--data.class-file",
            class_file(tmp_path, *names),
            "--data.order",
            "blocks",
            "--data.block-shards",
            1,
            "--epochs",
            1,
            "--batch-size",
            16,
        ),
        *("--image-size", 32, "--device", "cpu", "--run-dir", "run"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "3 classes, 104 training and 8 validation samples" in done.stdout
    assert load_checkpoint(tmp_path / "run" / "last.pt")["classes"] == names
    [warning] = [line for line in done.stdout.splitlines() if "sorted by class" in line]
    command = shlex.split(warning.split("`")[1].replace("NEW_FOLDER", str(tmp_path / "new")))
    done = shards_command(*command[1:])
    assert done.returncode == 0, done.stderr
    old = open_shards(f"{tmp_path}/train-*.tar", "train", "", "meta.class", f"{tmp_path}/classes.txt")
    new = open_shards(str(tmp_path / "new"), "train")
    assert new.classes == old.classes == names
    assert sorted(new.labels()) == old.labels()
    assert order_warning(old, DataConfig(train="old", order="blocks", block_shards=1), 3) is not None
    assert order_warning(new, DataConfig(train="new", order="blocks", block_shards=1), 3) is None
