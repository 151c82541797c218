"""What a label may hold: conversion, `verify` and the loader read it alike."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipelines.shards.shard_set import open_shards
from tests.helpers.command import Done, run_main
from tests.pipelines.test_labels import class_file, gray, write_shard
from tests.tools.test_verify import write_tar
from tools.shards.cli import main


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shards(*arguments: object) -> Done:
    return run_main(main, *arguments)


def rejected(folder: Path) -> dict[str, str]:
    entries = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    return {entry["path"]: entry["reason"] for entry in entries}


def findings(tar: Path, *options: object) -> dict[str, tuple[str, str]]:
    """Returns kind and detail of what `verify` finds, by member."""
    report = json.loads(shards("verify", tar, "--json", "--check", "none", "--workers", 1, *options).stdout)
    return {finding["member"]: (finding["kind"], finding["detail"]) for finding in report["findings"]}


GOOD: Mapping[bytes, int] = {
    b"1": 1,
    b" 1\r\n": 1,
    b"\xef\xbb\xbf1\n": 1,
    b"1\0\0\0\0": 1,
    b"1\n\0": 1,
    b"007": 7,
    b"2.0": 2,
    b"10.": 10,
}
BAD: Mapping[bytes, str] = {
    b"": "the label is empty",
    b" \n": "the label is empty",
    (0).to_bytes(4, "little"): "looks like a number in binary",
    (1).to_bytes(8, "little"): "looks like a number in binary",
    (300).to_bytes(2, "little"): "looks like a number in binary",
    (7).to_bytes(1, "little"): "looks like a number in binary",
    b"b'0'": "how Python prints bytes",
    b"tensor(0)": "how Python prints a tensor",
    b"tensor([1], device='cuda:0')": "how Python prints a tensor",
    b"np.int64(3)": "how Python prints a tensor or an array",
    b"[0, 1, 0]": "a list of values",
    b'{"label": 1}': "JSON",
    b"'cat'": "text in quotation marks",
    b"-1": "not in plain digits",
    b"+1": "not in plain digits",
    b"1,000": "not in plain digits",
    b"1.5": "not in plain digits",
    b"2e0": "not in plain digits",
    b"1 2": "not in plain digits",
    "\uff11".encode(): "not in plain digits",
    "\u0663".encode(): "not in plain digits",
    b"1\n2": "the label has several lines",
    b"a\x1b[31mb": r"the label has control characters: 'a\x1b[31mb'",
    b"9" * 5000: "too large for a class number",
    b"\x80\x04K\x01.": "a pickle of Python",
    b"PK\x03\x04 archive": "a file of torch.save",
    b"\x93NUMPY\x01": "a file of numpy.save",
    "\ufeff1".encode("utf-16-le"): "UTF-16 text",
    "größe".encode("latin-1"): "which is not UTF-8 text",
}


def test_good_labels_mean_the_same_everywhere(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "tars", [*GOOD, b"0"])
    numbers = [*GOOD.values(), 0]
    assert open_shards(str(tar), "train").labels() == numbers
    assert findings(tar) == {}
    done = shards("convert", tar, tmp_path / "out")
    assert (done.status, done.stderr) == (0, "")
    assert sorted(open_shards(str(tmp_path / "out"), "train").labels()) == sorted(numbers)


def test_bad_labels_are_refused_with_one_reason_everywhere(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "tars", [b"0", *BAD, b"2"])
    done = shards("convert", tar, tmp_path / "out")
    assert done.status == 0, done.stderr
    assert "train: 2 images" in done.stdout
    reader, found, left_out = open_shards(str(tar), "train").label_reader, findings(tar), rejected(tmp_path / "out")
    for i, (raw, reason) in enumerate(BAD.items(), 1):
        with pytest.raises(ValueError, match=r"^place: ") as raised:
            reader.parse(raw, "place")
        for text in (str(raised.value), found[f"k/{i}.cls"][1], left_out[f"x-000/k/{i}.png"]):
            assert reason in text
            assert text.isprintable()
            assert len(text) < 250


def test_if_all_labels_are_bad_one_line_says_so(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "tars", [number.to_bytes(4, "little") for number in range(20)])
    done = shards("convert", tar, tmp_path / "out")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert "none of its 20 samples has an image and a valid label; x-000/k/0.png: the label is '\\x00" in done.stderr


def test_binary_numbers_that_spell_digits_are_refused_with_the_others(tmp_path: Path) -> None:
    """The bytes of 49 are those of a padded 1."""
    labels = [number.to_bytes(4, "little") for number in (3, 49, 50, 67)] + [b"5"]
    tar = write_shard(tmp_path / "tars", labels)
    assert shards("convert", tar, tmp_path / "out").status == 0
    assert open_shards(str(tmp_path / "out"), "train").labels() == [5]
    assert "may be a number in binary, as other labels" in rejected(tmp_path / "out")["x-000/k/1.png"]
    assert shards("convert", write_shard(tmp_path / "big", [b"\0\0\0\3", b"\0\0\0001"]), tmp_path / "none").status == 2
    tar = write_shard(tmp_path / "padded", [b"1\0\0\0", b"0\0\0\0", b"\5"])
    assert shards("convert", tar, tmp_path / "good").status == 0
    assert sorted(open_shards(str(tmp_path / "good"), "train").labels()) == [0, 1]


def test_names_are_stripped_alike_in_both_kinds_of_members(tmp_path: Path) -> None:
    names = ["cat", " cat\n", "\ufeffcat", "cat\0\0", "dog"]
    for extension, key, texts in (
        ("cls", (), [name.encode() for name in names]),
        ("json", ("--label-key", "label"), [json.dumps({"label": name}).encode() for name in names]),
    ):
        tar = write_shard(tmp_path / extension, texts, extension)
        out = tmp_path / f"{extension}-out"
        assert shards("convert", tar, out, *key).status == 0
        found = open_shards(str(out), "train")
        assert (found.classes, sorted(found.labels())) == (("cat", "dog"), [0, 0, 0, 0, 1])
        classes = class_file(tmp_path, "cat", "dog")
        assert open_shards(str(tar), "train", "", "".join(key[1:]), classes).labels() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("name", ["b'0'", "tensor(0)", "1.5", "[ant]"])
def test_a_listed_class_may_have_any_name(tmp_path: Path, name: str) -> None:
    tar = write_shard(tmp_path / "tars", [name.encode(), b"ant"])
    classes = class_file(tmp_path, "ant", name)
    assert open_shards(str(tar), "train", class_file=classes).labels() == [1, 0]
    assert shards("convert", tar, tmp_path / "out", "--class-file", classes).status == 0
    assert open_shards(str(tmp_path / "out"), "train").classes == ("ant", name)


def test_a_bad_label_among_listed_classes_is_left_out(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "tars", [b"ant", b"bat", b"7", b"1"])
    assert shards("convert", tar, tmp_path / "out", "--class-file", class_file(tmp_path, "ant", "bee")).status == 0
    assert sorted(open_shards(str(tmp_path / "out"), "train").labels()) == [0, 1]
    reasons = rejected(tmp_path / "out")
    assert "'bat', which is none of the 2 classes of" in reasons["x-000/k/1.png"]
    assert reasons["x-000/k/2.png"] == "class 7 is out of range; there are 2 classes, from 0 on"


def test_numbers_and_names_are_never_mixed(tmp_path: Path) -> None:
    """A name among many numbers is a bad label. It must not turn the numbers into names, of which 10 comes before 2."""
    members = [(f"{i}.{end}", data) for i in range(200) for end, data in (("png", gray(1)), ("cls", b"%d" % (i % 11)))]
    tar = write_tar(tmp_path / "tars" / "x.tar", [*members, ("a.png", gray(1)), ("a.cls", b"cat")], index=False)
    assert shards("convert", tar, tmp_path / "out", "--check", "none").status == 0
    assert rejected(tmp_path / "out") == {"x/a.png": "the label is 'cat', which is a name among class numbers"}
    assert open_shards(str(tmp_path / "out"), "train").classes == tuple(map(str, range(11)))
    mixed = write_shard(tmp_path / "mixed", [b"cat", b"7", b"dog"])
    done = shards("convert", mixed, tmp_path / "new")
    assert done.status == 2
    assert "some labels are class numbers, such as '7' (x-000/k/1.png), and some are names, such as 'cat'" in done.stderr


def test_one_huge_class_number_is_left_out(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "tars", [b"0", b"12345678", b"1"])
    assert shards("convert", tar, tmp_path / "out").status == 0
    assert "a class number below 1,000,000 is needed" in rejected(tmp_path / "out")["x-000/k/1.png"]


def test_labels_that_begin_at_one_give_a_warning(tmp_path: Path) -> None:
    for name, labels, warns in (("one", (1, 2, 3), True), ("zero", (0, 1, 2), False), ("single", (1, 1, 1), False)):
        tar = write_shard(tmp_path / name, [str(label).encode() for label in labels])
        done = shards("convert", tar, tmp_path / f"{name}-out")
        report = json.loads(shards("verify", tar, "--json", "--workers", 1).stdout)
        info = shards("info", tar).stdout
        for text in (done.stdout, " ".join(report["notes"]), " ".join(info.split())):
            assert ("no sample has class 0; class numbers begin at 0" in text) is warns


@pytest.mark.parametrize(
    ("label_key", "members"),
    [
        ("outputs.cls", {"outputs.cls": b"1"}),
        (".outputs.CLS", {"outputs.cls": b"1"}),
        ("meta.json:a.b", {"meta.json": b'{"a": {"b": 1}}'}),
        ("json:cls", {"json": b'{"cls": 1}', "cls": b"0"}),
        ("a.b", {"json": b'{"a": {"b": 1}}', "cls": b"0"}),
    ],
)
def test_the_label_key_names_a_member_or_a_key(tmp_path: Path, label_key: str, members: dict[str, bytes]) -> None:
    tar = write_tar(
        tmp_path / "tars" / "x.tar",
        [(f"{i}.{extension}", data) for i in range(2) for extension, data in {"in.png": gray(9), **members}.items()],
        index=False,
    )
    keys = ("--image-key", "in.png", "--label-key", label_key)
    assert open_shards(str(tar), "train", "", label_key, image_key="in.png").labels() == [1, 1]
    assert findings(tar, *keys) == {}
    assert shards("convert", tar, tmp_path / "out", *keys).status == 0
    assert open_shards(str(tmp_path / "out"), "train").labels() == [1, 1]
    for verb in (("info", tar), ("preview", tar, "-o", tmp_path / "x.png", "--image-size", 32, "--samples", 1, "--views", 1)):
        done = shards(*verb, *keys)
        assert done.status == 0, done.stderr
