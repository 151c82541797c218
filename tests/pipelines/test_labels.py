"""All forms of labels: numbers and names, in `.cls` and in `.json`, in both loaders and in the `shards` command."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from model.distributed import World
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import Loader
from pipelines.shards.index import read_index, write_index
from pipelines.shards.shard_set import open_shards
from tests.conftest import write_image
from tests.tools.test_shards_command import read_with_webdataset, shards_command
from tests.tools.test_verify import write_tar
from tools.run.data import open_splits
from tools.shards.info import collect
from tools.shards.verify import verify

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no other test needs the indices of these tars


def gray(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_shard(folder: Path, labels: Sequence[bytes], extension: str = "cls", name: str = "x-000.tar") -> Path:
    """Writes a tar of gray images with these labels."""
    members = [(f"k/{i}.{end}", data) for i, text in enumerate(labels) for end, data in (("png", gray(i)), (extension, text))]
    return write_tar(folder / name, members, index=False)


def write_info(folder: Path, *classes: str) -> None:
    (folder / "_info.json").write_text(json.dumps({"classes": classes}))


def class_file(folder: Path, *names: str) -> str:
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return str(folder / "classes.txt")


def loader(backend: str, location: Path, num_classes: int | None = None, **options: str) -> Loader:
    config = DataConfig(valid=str(location), backend=backend, on_error="stop", **options)  # type: ignore[arg-type]
    return build_loader(
        config,
        LoaderSpec(
            split="valid", batch_size=3, image_size=32, device=CPU, num_threads=int(backend == "dali"), num_classes=num_classes
        ),
    )


def targets(backend: str, location: Path, **options: str) -> list[int]:
    with loader(backend, location, **options) as batches:
        return [label for batch in batches for label in batch["target"].tolist()]


both = pytest.mark.parametrize("backend", ["dali", "pillow"])
LONG = '{"text": "' + "x" * 5000 + '", "a": {"b": {"c": 0}}}'


@both
@pytest.mark.parametrize(
    ("extension", "labels", "key", "names", "numbers"),
    [
        ("cls", ["2", "0", " 1\n", "10"], "", (), [2, 0, 1, 10]),
        ("cls", ["dog", "ant", " große Katze\n", "dog"], "", ("ant", "große Katze", "dog"), [2, 0, 1, 2]),
        ("cls", ["dog", "0", "1", "ant"], "", ("ant", "bee", "dog"), [2, 0, 1, 0]),
        ("json", ['{"label": 2}', '{"label": "0"}', '{"x": [], "label": 1.0}'], "label", (), [2, 0, 1]),
        ("json", ['{"a": {"b": {"c": 1}}}', LONG], "a.b.c", (), [1, 0]),
        ("json", ['{"a": {"label": "dog"}}', '{"a": {"label": 1}}'], "a.label", ("ant", "bee", "dog"), [2, 1]),
    ],
)
def test_forms(
    tmp_path: Path, backend: str, extension: str, labels: list[str], key: str, names: tuple[str, ...], numbers: list[int]
) -> None:
    """The labels of one batch differ in length."""
    tar = write_shard(tmp_path, [label.encode() for label in labels], extension)
    file = class_file(tmp_path, *names) if names else ""
    assert targets(backend, tar, label_key=key, class_file=file) == numbers
    found = open_shards(str(tar), "valid", "", key, file)
    assert found.labels() == numbers
    assert found.classes == (names or None)
    assert found.num_classes() == (len(names) or max(numbers) + 1)


def test_classes_are_counted_once(tmp_path: Path) -> None:
    """Labels are cached, and read again only if a tar, an index or the label key changes."""
    tar = write_shard(tmp_path, [b"0", b"2"])
    assert open_shards(str(tar), "train").num_classes() == 3
    before = tar.stat()
    data = tar.read_bytes()
    index = read_index(open_shards(str(tar), "train").indices[0])
    [place] = [component.offset for component in index[1] if component.extension == "cls"]
    tar.write_bytes(data[:place] + b"7" + data[place + 1 :])
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_shards(str(tar), "train").num_classes() == 3  # the change is invisible
    os.utime(tar)
    assert open_shards(str(tar), "train").num_classes() == 8
    short = tar.with_suffix(".idx")
    write_index(short, index[:1])
    assert open_shards(str(tar), "train").num_classes() == 1
    short.unlink()
    with pytest.raises(ValueError, match=r"x-000\.tar: k/0: no \.json among its members, \.png \.cls"):
        open_shards(str(tar), "train", label_key="label").num_classes()


@both
def test_names_of_the_info_file(tmp_path: Path, backend: str) -> None:
    tar = write_shard(tmp_path, [b"cat", b"ant", b"1"])
    write_info(tmp_path, "ant", "bee", "cat")
    assert targets(backend, tar) == [2, 0, 1]


@both
def test_classes_with_numbers_as_names(tmp_path: Path, backend: str) -> None:
    """Digits are numbers in shards of the converter, and names if a class file lists them."""
    tar = write_shard(tmp_path, [b"2", b"1", b"0"])
    write_info(tmp_path, "0", "1", "10", "2")
    assert targets(backend, tar) == [2, 1, 0]
    (tmp_path / "_info.json").unlink()
    assert targets(backend, tar, class_file=class_file(tmp_path, "0", "1", "10", "2")) == [3, 1, 0]
    with pytest.raises(ValueError, match=r"the label is '0', which is none of the 3 classes of .*classes\.txt"):
        targets(backend, tar, class_file=class_file(tmp_path, "1", "10", "2"))  # then 1 is not class 1 either


@both
@pytest.mark.parametrize(
    ("extension", "label", "options", "message"),
    [
        ("cls", "cat", {}, r"the label is 'cat'; a class number in ASCII digits is needed, or a file of class names with"),
        ("cls", "catt", {"class_file": "{file}"}, r"the label is 'catt', which is none of the 4 classes of .*classes\.txt nor"),
        ("cls", "4", {"class_file": "{file}"}, "class 4 is out of range; there are 4 classes, from 0 on"),
        ("json", "{", {"label_key": "label"}, r"damaged \.json"),
        ("json", '{"l": 1}', {"label_key": "label"}, r"no 'label' in \.json; --label-key \(in training --data\.label-key\)"),
        ("json", '{"label": 1}', {"label_key": "label.id"}, r"no 'label\.id' in \.json"),
        ("json", '{"label": true}', {"label_key": "label"}, "'label' is true, which is neither"),
        ("json", '{"label": 1.5}', {"label_key": "label"}, r"'label' is 1\.5, which is neither"),
        ("json", '{"label": -1}', {"label_key": "label"}, "the label is '-1'"),
    ],
)
def test_bad_labels_are_named(
    tmp_path: Path, backend: str, extension: str, label: str, options: dict[str, str], message: str
) -> None:
    good = b"0" if extension == "cls" else b'{"label": 0}' if options["label_key"] == "label" else b'{"label": {"id": 0}}'
    tar = write_shard(tmp_path, [good, label.encode(), good], extension)
    file = class_file(tmp_path, "ant", "crane", "dog", "crane")
    options = {name: value.format(file=file) for name, value in options.items()}
    with pytest.raises(ValueError, match=rf"x-000\.tar:\d+:k/1\.(png|{extension}): {message}") as raised:
        loader(backend, tar, num_classes=4, **options).next()
    assert "\n" not in str(raised.value)


def test_a_class_file_as_some_editors_write_it(tmp_path: Path) -> None:
    tar = write_shard(tmp_path, [b"0"])
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee, wasp\r\n\r\n")
    assert open_shards(str(tar), "train", class_file=str(tmp_path / "classes.txt")).classes == ("ant", "bee, wasp")


def test_a_class_file_beside_an_info_file(tmp_path: Path) -> None:
    """It must number the classes like the info file: otherwise labels would silently change their meaning."""
    tar = write_shard(tmp_path, [b"0"])
    names = class_file(tmp_path, "ant", "bee", "cat")
    write_info(tmp_path, "ant", "bee", "cat")
    assert open_shards(str(tar), "train", class_file=names).classes == ("ant", "bee", "cat")
    write_info(tmp_path, "0", "1", "2")
    assert open_shards(str(tar), "train", class_file=names).classes == ("ant", "bee", "cat")
    for others in (("bee", "ant", "cat"), ("ant", "bee"), ("0", "1", "2", "3")):
        write_info(tmp_path, *others)
        with pytest.raises(ValueError, match=r"classes\.txt has other classes than the _info\.json beside the shards"):
            open_shards(str(tar), "train", class_file=names)


def test_verify_info_and_preview(tmp_path: Path) -> None:
    labels = ["dog", "ant", "catt", "dog"]
    tar = write_shard(tmp_path, [json.dumps({"a": {"label": label}}).encode() for label in labels], "json")
    file = class_file(tmp_path, "ant", "bee", "dog")
    options = ("--label-key", "a.label", "--class-file", file)
    assert verify(str(tar)).counts == {"missing-label": 4}
    with pytest.raises(ValueError, match=r"x-000\.tar:\d+:k/2\.json: the label is 'catt'"):
        collect(str(tar), label_key="a.label", class_file=file)
    report = json.loads(shards_command("verify", tar, "--json", "--quarantine", *options).stdout)
    assert [(found["kind"], found["member"]) for found in report["findings"]] == [("bad-label", "k/2.json")]
    assert "the label is 'catt', which is none of the 3 classes" in report["findings"][0]["detail"]
    split = json.loads(shards_command("info", tar, "--json", *options).stdout)["splits"]["x"]
    assert (split["class_names"], split["class_counts"]) == (["ant", "bee", "dog"], [1, 0, 2])
    done = shards_command("preview", tar, "-o", tmp_path / "sheet.png", "--image-size", 32, *options)
    assert "3 samples, 0 of them unreadable" in done.stdout, done.stderr


def table(folder: Path) -> set[tuple[str, bytes]]:
    """Returns class name and image of each sample, read by the webdataset library."""
    found = open_shards(str(folder), "train")
    assert found.classes is not None
    return {(found.classes[int(sample["cls"])], sample["png"]) for sample in read_with_webdataset(found.tars)}


def test_converting_shards_keeps_their_classes(tmp_path: Path) -> None:
    """Includes names of digits, class files, and labels in `.json` beside a `.cls`."""
    for i in range(12):
        write_image(tmp_path / "images" / str(i) / "x.png", i, (32, 32))
    for source, destination in (("images", "once"), ("once", "twice")):
        assert shards_command("convert", tmp_path / source, tmp_path / destination).returncode == 0
    assert table(tmp_path / "once") == table(tmp_path / "twice")
    assert len(table(tmp_path / "twice")) == 12

    (tmp_path / "foreign").mkdir()
    members = [
        (f"{i}.{end}", data)
        for i, name in enumerate(("dog", "ant", "dog"))
        for end, data in (("cls", b"7"), ("json", json.dumps({"a": {"label": name}}).encode()), ("png", gray(i)))
    ]
    write_tar(tmp_path / "foreign" / "x-000.tar", members, index=False)
    names = class_file(tmp_path, "dog", "cat", "ant")
    done = shards_command("convert", tmp_path / "foreign", tmp_path / "new", "--label-key", "a.label", "--class-file", names)
    assert done.returncode == 0, done.stderr
    assert open_shards(str(tmp_path / "new"), "train", class_file=names).classes == ("dog", "cat", "ant")
    assert table(tmp_path / "new") == {("dog", gray(0)), ("ant", gray(1)), ("dog", gray(2))}
    done = shards_command("convert", tmp_path / "images", tmp_path / "other", "--class-file", names)
    assert (done.returncode, "--class-file is for WebDataset shards, not for folders" in done.stderr) == (2, True)


def test_labels_that_begin_at_one_give_a_warning_at_the_start_of_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for labels, warns in (((1, 2), True), ((0, 2), False)):
        tar = str(write_shard(tmp_path, [str(label).encode() for label in labels], name=f"x-{labels[0]}.tar"))
        caplog.clear()
        open_splits(DataConfig(train=tar, valid=tar), World(0, 1, 0, 1, CPU))
        assert ("no sample has class 0" in caplog.text) is warns
