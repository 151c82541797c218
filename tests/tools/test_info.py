"""`shards info`, compared with independent readers of the same tars."""

import collections
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pipelines.shards.shard_set import open_shards
from tests.conftest import write_image
from tests.tools.test_shards_command import add_member, call_shards, shards_command
from tools.shards.info import as_json, as_text, collect


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # indices of these tars are useless to others


def write_shard(path: Path, images: list[tuple[bytes, int]]) -> Path:
    """Writes a tar as another tool might, with images of any kind and their class numbers."""
    with tarfile.open(path, "w") as tar:
        for i, (image, label) in enumerate(images):
            for name, data in ((f"{i:04d}.jpg", image), (f"{i:04d}.cls", f"{label}\n".encode()), (f"{i:04d}.json", b"{}")):
                add_member(tar, name, data)
    return path


def encoded(folder: Path, size: tuple[int, int], suffix: str = ".jpg") -> bytes:
    write_image(folder / f"image{suffix}", 0, size)
    return (folder / f"image{suffix}").read_bytes()


def test_text_of_a_converted_data_set(shards: Path) -> None:
    done = shards_command("info", shards)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["split", "shards", "samples", "classes", "MB"]
    assert lines[1].split()[:4] == ["train", "4", "61", "3"]
    assert lines[2].split()[:4] == ["valid", "3", "25", "3"]
    valid = "\n".join(lines[lines.index("valid") :])
    assert "3: 8.3 samples on average, smallest bee 8, largest ant 9; no class is empty" in valid
    assert "ant 9, bee 8, cat 8" in valid
    assert "5 to 10 samples" in valid
    assert "jpg 25; median " in valid
    [bar] = [line for line in valid.splitlines() if "64-127" in line]
    assert bar.split()[-2:] == ["25", 40 * "#"]
    assert max(map(len, lines)) <= 120


def test_json_equals_what_other_readers_find(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call_shards(capsys, "info", shards, "--json")
    assert done.returncode == 0, done.stderr
    splits = json.loads(done.stdout)["splits"]
    assert set(splits) == {"train", "valid"}
    for name, split in splits.items():
        found = open_shards(str(shards), name)
        images = []
        for path in map(Path, found.tars):
            with tarfile.open(path) as tar:
                images += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
        sizes = [Image.open(io.BytesIO(image)).size for image in images]
        middle = len(images) // 2  # both splits have an odd number of samples
        assert split["num_samples"] == split["num_headers"] == len(images)
        assert split["num_shards"] == len(found.tars)
        assert split["image_bytes"] == sum(map(len, images))
        assert split["label_bytes"] == len(images)
        assert split["shard_bytes"] == sum(found.sizes)
        assert split["class_names"] == ["ant", "bee", "cat"]
        assert split["class_counts"] == [found.labels().count(label) for label in range(3)]
        assert split["formats"] == {"jpg": len(images)}
        assert split["unreadable"] == {}
        assert split["median_width"] == sorted(width for width, _ in sizes)[middle]
        assert split["median_height"] == sorted(height for _, height in sizes)[middle]
        in_bins = collections.Counter("64-127" if min(size) < 128 else "128-255" for size in sizes)
        assert {side: count for side, count in split["shorter_sides"].items() if count} == in_bins


def test_foreign_shards_of_many_sizes_and_damaged_images(tmp_path: Path) -> None:
    sizes = [(40, 300), (64, 64), (130, 127), (128, 300), (256, 255), (600, 512), (1030, 1024)]
    images = [(encoded(tmp_path, size), 2) for size in sizes]
    images += [(encoded(tmp_path, (70, 70), ".png"), 0), (b"no image", 4), (images[0][0][:-20], 4)]
    write_shard(tmp_path / "some-7.tar", images)
    write_shard(tmp_path / "some-8.tar", images[:4])
    splits = collect(str(tmp_path / "some-*.tar"))
    split = splits["some"]
    assert split.class_names is None
    assert split.class_counts == [1, 0, 11, 0, 2]
    assert split.shard_samples == (4, 10)
    assert split.label_bytes == 2 * 14
    assert list(split.shorter_sides.values()) == [2, 2 + 2 + 1, 1 + 1 + 1, 0, 1, 1]
    assert split.formats == {"jpg": 11, "png": 1}
    assert split.unreadable == {"not an image": 1, "jpeg image cut short": 1}
    text = as_text(splits)
    assert "5: 2.8 samples on average, smallest class 0 1, largest class 2 11; 2 classes are empty" in text
    assert "training cannot decode 2 (1 not an image; 1 jpeg image cut short)" in text
    assert as_json(collect(str(tmp_path), num_workers=2)) == as_json(splits)
    assert as_json(collect(f"{tmp_path}/{{some-7,some-*}}.tar")) == as_json(splits)  # a tar that is named twice counts once


def test_a_sample_is_spread_evenly_and_said_to_be_one(tmp_path: Path) -> None:
    small, large = encoded(tmp_path, (40, 40)), encoded(tmp_path, (140, 140))
    for number, image in enumerate((small, small, small, large)):
        write_shard(tmp_path / f"s-{number}.tar", [(image, 0)] * 10)
    splits = collect(str(tmp_path), sample=6)
    assert splits["s"].shorter_sides["<64"] == 4
    assert splits["s"].shorter_sides["128-255"] == 2
    assert splits["s"].class_counts == [40]  # labels are counted in full
    assert splits["s"].image_bytes == 30 * len(small) + 10 * len(large)
    assert "in an evenly spaced sample of 6 of 40 images:" in as_text(splits)


def test_options_of_the_conversion_are_shown(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", [(encoded(tmp_path, (40, 40)), 0)])
    split = {"filenames": ["train-0.tar"], "conversion": {"seed": 3, "resize": None, "check": "decode"}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    splits = collect(str(tmp_path))
    assert splits["train"].conversion == {"seed": 3, "resize": None, "check": "decode"}
    assert "converted with  seed 3, check decode" in as_text(splits)
    assert "1: 1 sample each; no class is empty" in as_text(splits)
