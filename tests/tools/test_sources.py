"""Every kind of image collection gives the same data set, with the same bytes and class names."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.shards.shard_set import open_shards
from tests.conftest import write_image
from tests.tools.test_shards_command import add_member, call_shards, read_with_webdataset, shards_command

CLASSES = ["ant", "bee", "cat"]
CPU = torch.device("cpu")
Arguments = list[object]


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            add_member(tar, name, data)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def class_folders(images: Path, tmp: Path) -> Arguments:
    return [images]


def flat_folder(images: Path, tmp: Path) -> dict[str, str]:
    """Copies the images into one folder, and returns the class of each."""
    (tmp / "flat").mkdir()
    for name, data in files_of(images).items():
        (tmp / "flat" / Path(name).name).write_bytes(data)
    return {Path(name).name: name.split("/")[0] for name in files_of(images)}


def label_csv(images: Path, tmp: Path) -> Arguments:
    labels = flat_folder(images, tmp)
    rows = "".join(f"{name},{label}\n" for name, label in labels.items())
    (tmp / "labels.csv").write_text(f"filename,label\n{rows}")
    return [tmp / "flat", "--labels", tmp / "labels.csv"]


def label_tsv_without_header(images: Path, tmp: Path) -> Arguments:
    labels = flat_folder(images, tmp)
    (tmp / "labels.tsv").write_text("".join(f"{name}\t{label}\n" for name, label in labels.items()))
    return [tmp / "flat", "--labels", tmp / "labels.tsv"]


def kaggle_solution(images: Path, tmp: Path) -> Arguments:
    """`LOC_val_solution.csv`: names without extension, with class and boxes in one column."""
    labels = flat_folder(images, tmp)
    rows = "".join(f"{Path(name).stem},{label} 1 2 30 40 {label} 5 6 7 8 \n" for name, label in labels.items())
    (tmp / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{rows}")
    return [tmp / "flat", "--labels", tmp / "LOC_val_solution.csv"]


def caffe_list(images: Path, tmp: Path) -> Arguments:
    """`val.txt`: name, blank, class number from 0."""
    labels = flat_folder(images, tmp)
    (tmp / "val.txt").write_text("".join(f"{name} {CLASSES.index(label)}\n" for name, label in labels.items()))
    (tmp / "names.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(CLASSES)))
    return [tmp / "flat", "--labels", tmp / "val.txt", "--class-names", tmp / "names.txt"]


def devkit_ground_truth(images: Path, tmp: Path) -> Arguments:
    """`ILSVRC2012_validation_ground_truth.txt`: one number per line, from 1, for the images of a flat tar."""
    labels = flat_folder(images, tmp)
    numbers = {"cat": 1, "ant": 2, "bee": 3}
    (tmp / "ground_truth.txt").write_text("".join(f"{numbers[labels[name]]}\n" for name in sorted(labels)))
    (tmp / "ids.csv").write_text("".join(f"{number},{name}\n" for name, number in numbers.items()))
    make_tar(tmp / "val.tar", dict(reversed(files_of(tmp / "flat").items())))
    return [tmp / "val.tar", "--labels", tmp / "ground_truth.txt", "--class-names", tmp / "ids.csv"]


def tar_of_class_tars(images: Path, tmp: Path) -> Arguments:
    for name in CLASSES:
        make_tar(tmp / f"{name}.tar", {f"{name}_{key}": data for key, data in files_of(images / name).items()})
    make_tar(tmp / "ILSVRC2012_img_train.tar", {f"{name}.tar": (tmp / f"{name}.tar").read_bytes() for name in CLASSES})
    return [tmp / "ILSVRC2012_img_train.tar"]


def folder_of_class_tars(images: Path, tmp: Path) -> Arguments:
    (tmp / "tars").mkdir()
    for name in CLASSES:
        make_tar(tmp / "tars" / f"{name}.tar", files_of(images / name))
    return [tmp / "tars"]


def tar_of_class_folders(images: Path, tmp: Path) -> Arguments:
    make_tar(tmp / "all.tar", {f"./photos/train/{name}": data for name, data in files_of(images).items()})
    return [tmp / "all.tar"]


def webdataset_shards(images: Path, tmp: Path) -> Arguments:
    done = shards_command("convert", images, tmp / "first", "--shard-samples", 7, "--seed", 5)
    assert done.returncode == 0, done.stderr
    return [tmp / "first"]


def webdataset_with_json(images: Path, tmp: Path) -> Arguments:
    """Shards from another tool: `imagenet1k-train-0000.tar`, class names in `.json`, extensions in upper case."""
    for shard in range(2):
        members = {}
        for number, (name, data) in enumerate(files_of(images).items()):
            if number % 2 == shard:
                members[f"n/{number:04d}.JPEG"] = data
                members[f"n/{number:04d}.json"] = json.dumps({"info": {"wnid": name.split("/")[0]}}).encode()
        make_tar(tmp / f"imagenet1k-train-{shard:04d}.tar", members)
    return [f"{tmp}/imagenet1k-train-{{0000..0001}}.tar", "--label-key", "info.wnid"]


def parquet(images: Path, tmp: Path) -> Arguments:
    """Hugging Face's layout: structs of bytes and path, class numbers, and class names in the metadata."""
    (tmp / "data").mkdir()
    rows = list(files_of(images).items())
    features = {"label": {"names": CLASSES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    for part in range(2):
        mine = rows[part::2]
        image = pa.array([{"bytes": data, "path": Path(name).name} for name, data in mine])
        table = pa.table({"image": image, "label": pa.array([CLASSES.index(name.split("/")[0]) for name, _ in mine])})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tmp / "data" / f"train-{part:05d}-of-00002.parquet", row_group_size=4)
    return [tmp / "data"]


SOURCES = [
    class_folders,
    label_csv,
    label_tsv_without_header,
    kaggle_solution,
    caffe_list,
    devkit_ground_truth,
    tar_of_class_tars,
    folder_of_class_tars,
    tar_of_class_folders,
    webdataset_shards,
    webdataset_with_json,
    parquet,
]


@pytest.mark.parametrize("make", SOURCES)
def test_every_byte_under_its_class(make: Callable[[Path, Path], Arguments], image_folder: Path, tmp_path: Path) -> None:
    arguments = make(image_folder, tmp_path)
    done = shards_command("convert", *arguments, tmp_path / "out", "--shard-samples", 10, "--workers", 2)
    assert done.returncode == 0, done.stderr
    found = open_shards(str(tmp_path / "out"), "train")
    assert found.classes == tuple(CLASSES)
    samples = read_with_webdataset(found.tars)
    stored = {(CLASSES[int(sample["cls"])], sample["jpg"]) for sample in samples}
    assert stored == {(name.split("/")[0], data) for name, data in files_of(image_folder).items()}
    assert len(samples) == 25
    labels = [int(sample["cls"]) for sample in samples]
    assert labels != sorted(labels)
    leftovers = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")}
    assert leftovers == set()
    with build_loader(
        DataConfig(train=str(tmp_path / "out")), LoaderSpec(split="train", batch_size=5, image_size=32, device=CPU)
    ) as loader:
        assert sum(len(batch["target"]) for batch in loader) == 25


def test_numbers_stay_what_they_are(image_folder: Path, tmp_path: Path) -> None:
    """In shards without class names, class 7 does not become class 0, and later splits agree."""
    data = next(iter(files_of(image_folder).values()))
    make_tar(tmp_path / "x-000.tar", {"a.jpg": data, "a.cls": b"7", "b.jpg": data, "b.cls": b"2\n"})
    done = shards_command("convert", tmp_path / "x-000.tar", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(open_shards(str(tmp_path / "out"), "train").labels()) == [2, 7]
    (tmp_path / "one.txt").write_text("1.jpg 5\n")
    write_image(tmp_path / "valid" / "1.jpg", 1)
    done = shards_command("convert", tmp_path / "valid", tmp_path / "out", "--name", "valid", "--labels", tmp_path / "one.txt")
    assert done.returncode == 0, done.stderr
    assert open_shards(str(tmp_path / "out"), "valid").labels() == [5]


def test_numbers_index_existing_class_names(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Caffe's `val.txt` can follow a training set in class folders. A number out of range is refused."""
    out = tmp_path / "out"
    assert shards_command("convert", image_folder, out).returncode == 0
    labels = flat_folder(image_folder, tmp_path)
    (tmp_path / "val.txt").write_text("".join(f"{name} {CLASSES.index(label)}\n" for name, label in labels.items()))
    arguments = ("convert", tmp_path / "flat", out, "--name", "valid", "--labels", tmp_path / "val.txt")
    done = shards_command(*arguments)
    assert done.returncode == 0, done.stderr
    samples = read_with_webdataset(open_shards(str(out), "valid").tars)
    stored = {(CLASSES[int(sample["cls"])], sample["jpg"]) for sample in samples}
    assert stored == {(name.split("/")[0], data) for name, data in files_of(image_folder).items()}
    first = next(iter(labels))
    (tmp_path / "val.txt").write_text(f"{first} 3\n")
    done = call_shards(capsys, *arguments, "--overwrite")
    assert done.returncode == 2
    assert "of its classes: " in done.stderr


def test_images_without_bytes_of_their_own_are_listed(image_folder: Path, tmp_path: Path) -> None:
    """Links in tars, and loose files, broken links and pipes in folders, are reported."""
    data = next(iter(files_of(image_folder).values()))
    make_tar(tmp_path / "x.tar", {"ant/1.jpg": data, "bee/2.jpg": data})
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        link = tarfile.TarInfo("bee/3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "../ant/1.jpg"
        tar.addfile(link)
    folder = tmp_path / "folder"
    (folder / "ant").mkdir(parents=True)
    (folder / "ant" / "1.jpg").write_bytes(data)
    (folder / "loose.jpg").write_bytes(data)
    (folder / "ant" / "gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "ant" / "pipe.jpg")
    for source, count, expected in (
        (tmp_path / "x.tar", 2, {"bee/3.jpg": "a symbolic link to ../ant/1.jpg"}),
        (folder, 1, {"ant/gone.jpg": "broken symbolic link", "ant/pipe.jpg": "not a regular file"}),
    ):
        done = shards_command("convert", source, tmp_path / "out", "--overwrite")
        assert f"train: {count} image" in done.stdout, done.stderr
        rejected = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
        assert {entry["path"]: entry["reason"] for entry in rejected} == expected
    assert f"warning: skipped 1 file in {folder} that is in no class folder" in done.stdout


def test_other_class_names(image_folder: Path, tmp_path: Path) -> None:
    """Names in Kaggle's list may have blanks and commas."""
    data = next(iter(files_of(image_folder).values()))
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
    (tmp_path / "labels.csv").write_text("ImageId,PredictionString\n1,n01440764 1 2 3 4\n2,n01443537 1 2 3 4\n")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    names = ("--labels", tmp_path / "labels.csv", "--class-names")
    done = shards_command("convert", tmp_path / "images", tmp_path / "out", *names, tmp_path / "LOC_synset_mapping.txt")
    assert done.returncode == 0, done.stderr
    assert open_shards(str(tmp_path / "out"), "train").classes == ("goldfish, Carassius auratus", "tench, Tinca tinca")


def test_samples_of_shards_that_lack_something_are_listed(image_folder: Path, tmp_path: Path) -> None:
    data = next(iter(files_of(image_folder).values()))
    members = {"a.jpg": data, "a.json": b'{"label": 1}', "b.jpg": data, "c.json": b"{}", "d.jpg": data, "d.json": b"{"}
    make_tar(tmp_path / "x.tar", {**members, "e.jpg": data, "e.json": b'{"label": 1.5}', "f.jpg": data, "f.json": b'{"l": 1}'})
    done = shards_command("convert", tmp_path / "x.tar", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "train: 1 image of" in done.stdout
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["path"], entry["reason"]) for entry in rejected] == [
        ("x/d.jpg", rejected[0]["reason"]),
        ("x/e.jpg", "'label' is 1.5, which is neither a class number nor a class name"),
        ("x/f.jpg", "no 'label' in .json; --label-key (in training --data.label-key) names another"),
        ("x/b", "no .cls or .json among its members, .jpg"),
        ("x/c", "no image among its members, .json"),
    ]
    assert rejected[0]["reason"].startswith("damaged .json")


def test_images_that_no_line_names_are_counted(image_folder: Path, tmp_path: Path) -> None:
    flat_folder(image_folder, tmp_path)
    (tmp_path / "list.csv").write_text("000.jpg,1\n")
    done = shards_command("convert", tmp_path / "flat", tmp_path / "out", "--labels", tmp_path / "list.csv")
    assert f"warning: skipped 24 images in {tmp_path}/flat that {tmp_path}/list.csv does not name\n" in done.stdout


def test_folders_that_are_called_like_tars_are_classes(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in CLASSES:
        (tmp_path / "src" / f"{name}.tar").symlink_to(image_folder / name)
    done = shards_command("convert", tmp_path / "src", tmp_path / "out")
    assert "train: 25 images of 3 classes" in done.stdout, done.stderr


def test_a_class_file_is_for_shards_whatever_their_first_members_are(image_folder: Path, tmp_path: Path) -> None:
    """All images come first. So the first members look like those of a tar of images."""
    images = {f"{number:03d}.jpg": data for number, data in enumerate(files_of(image_folder).values())}
    make_tar(tmp_path / "x.tar", {**images, **{f"{number:03d}.cls": b"bee" for number in range(25)}})
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    done = shards_command("convert", tmp_path / "x.tar", tmp_path / "out", "--class-file", tmp_path / "classes.txt")
    assert done.returncode == 0, done.stderr
    assert open_shards(str(tmp_path / "out"), "train").labels() == [1] * 25
