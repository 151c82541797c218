"""A sample that cannot be used is left out, and nothing else changes."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment import RandomResizedCrop
from pipelines.bad_samples import decoder_check
from pipelines.bad_samples.jpeg import is_cut_short
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.dali.image_pipeline import ImagePipeline
from pipelines.loader import Batch, Loader, state_for_others
from pipelines.shards import reader
from pipelines.shards.index import scan_tar, write_index
from pipelines.shards.tars import OpenTar
from tests.conftest import write_image
from tests.helpers.loader_contract import same, saved, take
from tests.helpers.odd_images import ENCODED_ANEW, REFUSED, overflowing_tiff, png_header, short_bmp
from tools.shards.verify import verify

NUM_SAMPLES, PER_SHARD, BATCH_SIZE = 60, 13, 6
NUM_KINDS = 5  # of damage
CPU = torch.device("cpu")


def encoded_images(folder: Path, count: int) -> list[bytes]:
    """Returns JPEGs of many shapes."""
    images = []
    for i in range(count):
        write_image(folder / f"{i}.jpg", i, (40 + 13 * i % 60, 40 + 29 * i % 50), quality=85)
        images.append((folder / f"{i}.jpg").read_bytes())
    return images


def write_shards(folder: Path, images: list[bytes], labels: dict[int, bytes] | None = None) -> Path:
    """Writes shards in which each sample has its own class, so that its target identifies it."""
    folder.mkdir(parents=True)
    for first in range(0, len(images), PER_SHARD):
        with tarfile.open(folder / f"train-{first // PER_SHARD:03d}.tar", "w") as tar:
            for i in range(first, min(first + PER_SHARD, len(images))):
                for name, data in ((f"{i:04d}.jpg", images[i]), (f"{i:04d}.cls", (labels or {}).get(i, str(i).encode()))):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def png(image: bytes) -> bytes:
    """Returns the same picture as a PNG file."""
    encoded = io.BytesIO()
    with Image.open(io.BytesIO(image)) as picture:
        picture.save(encoded, "PNG")
    return encoded.getvalue()


def flipped(image: bytes) -> bytes:
    """Overwrites some bytes in the middle."""
    middle = len(image) // 2
    return image[:middle] + bytes(16) + image[middle + 16 :]


def damage(image: bytes, kind: int) -> bytes:
    """Damages an image: cut in the middle, empty, not an image, cut in the header, or a PNG with wrong bytes."""
    return (image[: len(image) // 2], b"", b"wrong " * 50, image[:100], flipped(png(image)))[kind % NUM_KINDS]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return encoded_images(tmp_path_factory.mktemp("images"), NUM_SAMPLES)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> Path:
    return write_shards(tmp_path_factory.mktemp("good") / "shards", images)


def make(shards: Path, split: str = "train", quarantine: Path | None = None, **options: Any) -> Loader:
    given = {name: options.pop(name) for name in ("device", "rank", "world_size") if name in options}
    options["quarantine"] = options.pop("quarantine_files", ())
    config = DataConfig(**{"train": str(shards), "valid": str(shards), "max_bad_fraction": 1.0, **options})
    sizes = {"batch_size": BATCH_SIZE, "image_size": 32, "num_threads": 2, "num_classes": NUM_SAMPLES, "device": CPU}
    return build_loader(config, LoaderSpec(**{"split": split, "quarantine": quarantine, **sizes, **given}))


def without(batches: list[Batch], bad: set[int]) -> list[Batch]:
    """Removes samples from batches."""
    kept = [[i for i, target in enumerate(batch["target"].tolist()) if target not in bad] for batch in batches]
    return [
        {"image": batch["image"][places], "target": batch["target"][places]}
        for batch, places in zip(batches, kept, strict=True)
        if places
    ]


def epochs(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return [batch for _ in range(count) for batch in loader]


@pytest.mark.parametrize("order", [{"order": "global"}, {"order": "blocks", "block_shards": 2}], ids=str)
@pytest.mark.parametrize("where", ["several in one batch", "first batch", "last batch", "scattered"])
def test_all_else_is_as_if_they_were_good(
    tmp_path: Path, images: list[bytes], good: Path, where: str, order: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = epochs(make(good, **order), 3)
    num_batches = len(undisturbed) // 3
    targets = [batch["target"].tolist() for batch in undisturbed]
    bad = {
        "several in one batch": targets[4][:3],
        "first batch": targets[0][1:2],
        "last batch": targets[num_batches - 1][-2:],
        "scattered": [*range(5, NUM_SAMPLES, 11), *targets[0][:1]],
    }[where]
    damaged = write_shards(tmp_path / "bad", [damage(image, i) if i in bad else image for i, image in enumerate(images)])
    with caplog.at_level(logging.WARNING), make(damaged, **order) as loader:
        found = [batch for _ in range(3) for batch in loader]
        assert loader.num_bad_samples == len(set(bad))
    assert same(found, without(undisturbed, set(bad)))
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == len(set(bad))
    for sample in bad:
        [warning] = [text for text in warnings if f"{sample:04d}.jpg" in text]
        assert f"{damaged}/train-{sample // PER_SHARD:03d}.tar:" in warning


def test_validation_in_order_and_an_empty_batch(tmp_path: Path, images: list[bytes], good: Path) -> None:
    """An empty batch does not reach the caller."""
    bad = {3, *range(12, 18), 59}
    damaged = write_shards(tmp_path / "bad", [damage(image, i) if i in bad else image for i, image in enumerate(images)])
    for world_size in (1, 2, 7):
        found = [
            batch for rank in range(world_size) for batch in epochs(make(damaged, "valid", rank=rank, world_size=world_size), 2)
        ]
        expected = [
            batch for rank in range(world_size) for batch in epochs(make(good, "valid", rank=rank, world_size=world_size), 2)
        ]
        assert same(found, without(expected, bad))
        assert all(len(batch["target"]) for batch in found)


def test_batch_of_bad_labels(tmp_path: Path, images: list[bytes], good: Path) -> None:
    """Stand-ins with good labels fill up a batch that has no good label, or only one."""
    undisturbed = epochs(make(good), 1)
    bad = {*undisturbed[2]["target"].tolist(), *undisturbed[5]["target"].tolist()[1:], 0, 13}
    damaged = write_shards(tmp_path / "bad", images, dict.fromkeys(bad, b"?"))
    found = epochs(make(damaged, quarantine=tmp_path / "quarantine.jsonl"), 1)
    listed = [json.loads(line)["member"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(listed) == [f"{i:04d}.jpg" for i in sorted(bad)]  # and no stand-in
    assert [len(batch["target"]) for batch in found] == [
        max(2, sum(target not in bad for target in batch["target"].tolist())) for batch in undisturbed
    ]
    assert not bad & {target for batch in found for target in batch["target"].tolist()}


def test_one_good_sample_in_all(tmp_path: Path, images: list[bytes]) -> None:
    """A single good sample fills each training batch. Without one the run ends."""
    for good in (17, None):
        labels = {i: b"?" for i in range(NUM_SAMPLES) if i != good}
        with make(write_shards(tmp_path / str(good), images, labels)) as loader:
            if good is None:
                with pytest.raises(ValueError, match=r"there is not one good sample in .*; `shards verify` says why"):
                    list(loader)
            else:
                targets = [batch["target"].tolist() for batch in loader]
                assert targets == [[17, 17]] * 10


def test_other_numbers_of_ranks_know_what_all_have_met(tmp_path: Path, images: list[bytes]) -> None:
    bad = {2, 11, 29, 40, 58}
    damaged = write_shards(tmp_path / "bad", [damage(image, i) if i in bad else image for i, image in enumerate(images)])
    states = []
    for rank in range(2):
        with make(damaged, rank=rank, world_size=2) as loader:
            list(loader)
            states.append(saved(loader.state_dict()))
    with make(damaged, on_error="stop") as loader:  # stops at an unknown bad sample
        loader.load_state_dict(state_for_others(states))
        assert loader.num_bad_samples == len(bad)
        assert sum(len(batch["target"]) for batch in loader) == NUM_SAMPLES - len(bad)


def test_back_to_an_earlier_position(tmp_path: Path, images: list[bytes]) -> None:
    """A loader that goes back meets a bad sample again. After an error it cannot continue without a state."""
    damaged = write_shards(tmp_path / "bad", [damage(image, i) if i % 9 == 2 else image for i, image in enumerate(images)])
    with make(damaged) as loader:
        take(loader, 1)
        state = loader.state_dict()
        batches = take(loader, 12)
        loader.load_state_dict(state)
        assert same(take(loader, 12), batches)
    with make(damaged, max_bad_fraction=0.01) as loader:
        with pytest.raises(ValueError, match="bad samples of 60"):
            take(loader, 30)
        for call in (loader.next, loader.state_dict, loader.reset):
            with pytest.raises(ValueError, match="the loader was stopped by an error"):
                call()
    for closed in (loader.next, lambda: loader.load_state_dict(state)):
        with pytest.raises(ValueError, match="the loader is closed"):
            closed()


def test_an_image_that_only_the_pipeline_refuses(tmp_path: Path, images: list[bytes], good: Path) -> None:
    """The decoder alone accepts a BMP with 3 bits per pixel. DALI rejects it, without saying which image it was."""
    bmp = bmp_of_three_bits()
    damaged = write_shards(tmp_path / "bad", [bmp if i == 30 else image for i, image in enumerate(images)])
    assert same(epochs(make(damaged), 2), without(epochs(make(good), 2), {30}))


def test_a_header_that_the_decoder_must_not_meet(tmp_path: Path, images: list[bytes]) -> None:
    """DALI's decoder parses the headers of a batch in parts. A bad one in the last part would end the process."""
    write_shards(
        tmp_path / "bad", [images[0][:100] + b"\3" * 900 + b"\xff\xd9" if i == 160 else images[i % 60] for i in range(256)]
    )
    script = f"""
import torch
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
config = DataConfig(valid={str(tmp_path / "bad")!r}, max_bad_fraction=1)
for num_threads in (1, 2, 3):
    options = dict(batch_size=64, image_size=32, num_threads=num_threads, num_classes=256)
    with build_loader(config, LoaderSpec(split="valid", device=torch.device("cpu"), **options)) as loader:
        print(sum(len(batch["target"]) for batch in loader), loader.num_bad_samples)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "255 1\n" * 3), done.stderr


def test_touched_tars(tmp_path: Path, images: list[bytes], good: Path) -> None:
    """A new modification time alone, as a copy in its place has, does not turn a bad sample into a changed tar."""
    undisturbed = epochs(make(good), 1)
    bad = set(undisturbed[6]["target"].tolist()[:1])
    damaged = write_shards(tmp_path / "bad", [damage(image, 2) if i in bad else image for i, image in enumerate(images)])
    with make(damaged) as loader:
        batches = take(loader, 3)
        for tar in damaged.glob("*.tar"):
            os.utime(tar, (1, 1))
        assert same([*batches, *take(loader, 7)], without(undisturbed, bad))


def test_whole_batch_and_whole_shard(tmp_path: Path, images: list[bytes], good: Path) -> None:
    """A training batch without a good sample is filled with others, so that all ranks take equally many steps."""
    undisturbed = epochs(make(good), 1)
    bad = {*undisturbed[5]["target"].tolist(), *range(PER_SHARD)}
    damaged = write_shards(tmp_path / "bad", [damage(image, i) if i in bad else image for i, image in enumerate(images)])
    found = epochs(make(damaged), 1)
    assert len(found) == len(undisturbed)
    assert not set(found[5]["target"].tolist()) & bad
    others = [i for i, batch in enumerate(undisturbed) if set(batch["target"].tolist()) - bad]
    assert same([found[i] for i in others], without([undisturbed[i] for i in others], bad))


def test_one_rank_of_two(tmp_path: Path, images: list[bytes], good: Path) -> None:
    undisturbed = [epochs(make(good, rank=rank, world_size=2), 2) for rank in range(2)]
    bad = set(undisturbed[1][2]["target"].tolist()[:2]) - {
        target for batch in undisturbed[0] for target in batch["target"].tolist()
    }
    bad = bad or {undisturbed[1][2]["target"].tolist()[0]}
    damaged = write_shards(tmp_path / "bad", [damage(image, i) if i in bad else image for i, image in enumerate(images)])
    found = [epochs(make(damaged, rank=rank, world_size=2), 2) for rank in range(2)]
    for rank in range(2):
        assert len(found[rank]) == len(undisturbed[rank])
        assert same(found[rank], without(undisturbed[rank], bad))


def test_a_hundred_in_an_epoch(tmp_path: Path) -> None:
    images = encoded_images(tmp_path / "images", 40)
    many = [damage(images[i % 40], i) if i % 4 == 1 else images[i % 40] for i in range(400)]
    labels = {i: str(i % NUM_SAMPLES).encode() for i in range(400)}
    with make(write_shards(tmp_path / "bad", many, labels)) as loader:
        assert (
            sum(len(batch["target"]) for batch in loader) == 300 - sum(i % 4 != 1 for i in []) or loader.num_bad_samples >= 99
        )
        list(loader)
        assert loader.num_bad_samples == 100


def test_resumed_at_every_position(tmp_path: Path, images: list[bytes]) -> None:
    """A resumed loader knows the bad samples of its position, and finds later ones again."""
    bad = set(range(2, NUM_SAMPLES, 9))
    labels = {7: b"what?", 8: b"99"}
    damaged = write_shards(
        tmp_path / "bad", [damage(image, i) if i in bad else image for i, image in enumerate(images)], labels
    )
    with make(damaged) as loader:
        batches, states = [], []
        for _ in range(23):
            states.append(saved(loader.state_dict()))
            batches += take(loader, 1)
        assert loader.num_bad_samples == len(bad) + len(labels)
    for position in range(20):
        with make(damaged) as resumed:
            resumed.load_state_dict(states[position])
            assert same(take(resumed, 3), batches[position : position + 3]), position


def test_bad_labels(tmp_path: Path, images: list[bytes], good: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = {4: b"", 20: b"cat", 41: b"60"}
    damaged = write_shards(tmp_path / "bad", images, labels)
    assert same(epochs(make(damaged), 3), without(epochs(make(good), 3), set(labels)))
    warnings = sorted(record.message.partition(".tar:")[2].partition(":")[2] for record in caplog.records)
    starts = ("0004.jpg: the label is empty", "0020.jpg: the label is 'cat';", "0041.jpg: class 60 is out of range")
    for warning, start in zip(warnings, starts, strict=True):
        assert warning.startswith(start)


def test_later_runs_read_the_quarantine(
    tmp_path: Path, images: list[bytes], good: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {3, 30, 59}
    damaged = write_shards(tmp_path / "bad", [damage(image, i) if i in bad else image for i, image in enumerate(images)])
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "quarantine.jsonl"
    for _ in range(2):  # the second time nothing is added
        epochs(make(damaged, quarantine=path), 2)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert sorted(line["member"] for line in lines) == [f"{i:04d}.jpg" for i in sorted(bad)]
    for line in lines:
        assert set(line) == {"tar", "offset", "member", "reason", "found"}
        with tarfile.open(line["tar"]) as tar:
            assert tar.getmember(line["member"]).offset_data == line["offset"]
    caplog.clear()
    for listed in (path, path.parent):
        with make(damaged) as loader:
            assert loader.num_bad_samples == 0
        with make(damaged, on_error="stop") as loader, pytest.raises(ValueError, match=r"\.jpg: "):
            take(loader, 30)
        knowing = make(damaged, max_bad_fraction=0.1, on_error="stop", quarantine_files=(str(listed),))
        assert same(epochs(knowing, 2), without(epochs(make(good), 2), bad))
    assert not caplog.records


def test_verify_reads_the_quarantine(tmp_path: Path, images: list[bytes]) -> None:
    """It does not decode the images again, and writes index files without the listed samples."""
    damaged = write_shards(tmp_path / "bad", [damage(image, i) if i in (3, 30) else image for i, image in enumerate(images)])
    (tmp_path / "run").mkdir()
    epochs(make(damaged, quarantine=tmp_path / "run" / "quarantine.jsonl"), 2)
    report = verify(str(damaged), level="none", known=[tmp_path / "run"], quarantine=True, index_dir=tmp_path / "indices")
    assert [(finding.kind, finding.member) for finding in report.findings] == [
        ("bad-in-training", "0003.jpg"),
        ("bad-in-training", "0030.jpg"),
    ]
    assert all("left out by a run: " in finding.detail for finding in report.findings)
    with make(damaged, index_dir=str(tmp_path / "indices"), on_error="stop") as loader:
        targets = {target for _ in range(8) for batch in loader for target in batch["target"].tolist()}
    assert targets == set(range(NUM_SAMPLES)) - {3, 30}


def test_too_many_stop_the_run_with_a_table(tmp_path: Path, images: list[bytes]) -> None:
    damaged = write_shards(tmp_path / "bad", [damage(image, i) if i % 5 == 0 else image for i, image in enumerate(images)])
    with make(damaged, max_bad_fraction=0.05) as loader, pytest.raises(ValueError, match="bad samples of 60") as raised:
        take(loader, 30)
    first, *rows = str(raised.value).splitlines()
    assert "--data.max-bad-fraction 0.05 allows 3" in first
    assert len(rows) >= 4
    assert all(".tar:" in row and ".jpg: " in row for row in rows)
    with make(damaged, max_bad_fraction=0.0) as loader, pytest.raises(ValueError, match=r"^\d bad samples? of 60"):
        take(loader, 30)


@pytest.mark.parametrize("change", ["cut short", "replaced", "overwritten", "gone"])
def test_a_tar_that_changes_under_the_run(tmp_path: Path, images: list[bytes], change: str) -> None:
    """A changed tar is not reported as a bad sample."""
    shards = write_shards(tmp_path / "shards", images)
    tars = sorted(shards.glob("*.tar"))
    with make(shards) as loader:
        take(loader, 1)
        for tar in tars:
            if change == "cut short":
                os.truncate(tar, 5000)
            elif change == "replaced":
                new = tar.with_suffix(".new")
                new.write_bytes(tar.read_bytes() + bytes(10240))
                new.replace(tar)
            elif change == "overwritten":
                with open(tar, "r+b") as file:
                    file.write(b"\0" * (tar.stat().st_size - 1))
            else:
                tar.unlink()
        message = {"cut short": "cut short while the run", "replaced": "replaced while", "overwritten": "written to while"}
        with pytest.raises(ValueError, match=rf"train-\d+\.tar: {message.get(change, 'gone; it was there')}"):
            take(loader, 30)
        assert loader.num_bad_samples == 0


def rewrite(tar: Path, rename: Callable[[str], str], change: Callable[[str, bytes], bytes]) -> bytes:
    """Returns a tar with members of other names and contents."""
    written = io.BytesIO()
    with tarfile.open(tar) as old, tarfile.open(fileobj=written, mode="w") as new:
        for info in old:
            content = old.extractfile(info)
            assert content is not None
            member = tarfile.TarInfo(rename(info.name))
            data = change(info.name, content.read())
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return written.getvalue()


def test_a_tar_with_the_same_members_again(tmp_path: Path, images: list[bytes]) -> None:
    """Also without the end of the archive, as a writer that was killed leaves it."""
    shards = write_shards(tmp_path / "shards", images)
    for tar in shards.glob("*.tar"):
        samples = scan_tar(tar)
        write_index(tar.with_suffix(".idx"), samples)
        os.truncate(tar, samples[-1][-1].offset + tarfile.BLOCKSIZE)
    with make(shards, "valid") as loader:
        before = take(loader, 1)
        for tar in shards.glob("*.tar"):
            tar.write_bytes(tar.read_bytes())
        loader.reset()
        assert same(before, take(loader, 1))


def with_texts(tar: Path) -> bytes:
    """Returns a tar of the same size in which a text lies where each label was. Its first digits would pass for a label."""

    def change(name: str, data: bytes) -> bytes:
        return b"5" * len(data) + b" " if ".cls" in name else data

    changed = rewrite(tar, lambda name: name.replace(".cls", ".txt"), change)
    assert len(changed) == tar.stat().st_size
    return changed


def test_a_tar_with_other_members_of_the_same_size(tmp_path: Path, images: list[bytes]) -> None:
    shards = write_shards(tmp_path / "shards", images)
    with make(shards, "valid") as loader:
        take(loader, 1)
        for tar in shards.glob("*.tar"):
            tar.write_bytes(with_texts(tar))
        with pytest.raises(ValueError, match=r"\.tar: written to while the run was in progress; its members are"):
            take(loader, 20)


def test_a_good_tar_in_place_of_an_overwritten_one(tmp_path: Path, images: list[bytes]) -> None:
    """The loader has the overwritten file open, and it is that file that counts."""
    shards = write_shards(tmp_path / "shards", images)
    with make(shards, "valid") as loader:
        take(loader, 1)
        for tar in shards.glob("*.tar"):
            good = tar.read_bytes()
            tar.write_bytes(with_texts(tar))
            tar.with_suffix(".new").write_bytes(good)
            tar.with_suffix(".new").replace(tar)
        with contextlib.suppress(ValueError):
            targets = [target for batch in take(loader, 6) for target in batch["target"].tolist()]
            assert targets == [*range(6, 42)], targets


def test_a_tar_that_is_restored_while_it_is_read(tmp_path: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before is read again."""
    shards = write_shards(tmp_path / "shards", images)
    good = {tar: tar.read_bytes() for tar in shards.glob("*.tar")}
    with make(shards, "valid") as loader:
        known = [batch["target"].tolist() for batch in take(loader, 10)]
    real = reader._read_into

    def read_and_restore(tar: OpenTar, room: memoryview, offset: int) -> int:
        done = real(tar, room, offset)
        for path, content in good.items():
            if path.read_bytes() != content:
                path.write_bytes(content)
        return done

    with make(shards, "valid") as loader:
        for tar in good:
            tar.write_bytes(with_texts(tar))
            os.utime(tar, (0, 0))  # the clock of a file system may tick every 4 ms only
        monkeypatch.setattr(reader, "_read_into", read_and_restore)
        assert [batch["target"].tolist() for batch in take(loader, 10)] == known


HARMS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "whole": (lambda image: image, "nothing"),
    "bytes behind the end": (lambda image: image + bytes(5000), "nothing"),  # as some cameras append them
    "cut in the header": (lambda image: image[:100], "reader"),
    "cut in the middle": (lambda image: image[: len(image) // 2], "reader"),
    "last byte missing": (lambda image: image[:-1], "reader"),
    "no image": (lambda image: b"wrong " * 50, "headers"),
    "empty": (lambda image: b"", "headers"),
    "PNG cut in the middle": (lambda image: png(image)[:-200], "headers"),
    "PNG with wrong bytes": (lambda image: flipped(png(image)), "decoder"),
    "wrong bytes": (flipped, "nothing"),  # no decoder can know
}


@pytest.mark.parametrize(("harm", "stopped_by"), HARMS.values(), ids=HARMS.keys())
def test_what_reaches_the_decoder(images: list[bytes], harm: Callable[[bytes], bytes], stopped_by: str) -> None:
    """A hardware decoder reports every image as decoded, so it must get complete images only."""
    harmed = harm(images[0])
    assert is_cut_short(harmed) == (stopped_by == "reader")
    if stopped_by == "reader":
        return
    spec = LoaderSpec(split="valid", batch_size=1, image_size=32, device=CPU, num_threads=1)
    stops = []
    for until in ("headers", "normalize"):
        with contextlib.closing(ImagePipeline(DataConfig(), spec, until)) as pipeline:  # type: ignore[arg-type]
            pipeline.feed([np.frombuffer(harmed, np.uint8)], 0, 0)
            try:
                pipeline.images()
                stops.append(False)
            except RuntimeError:
                stops.append(True)
    assert stops == {"nothing": [False, False], "decoder": [False, True], "headers": [True, True]}[stopped_by]


def test_a_preview_is_not_taken_for_the_end(images: list[bytes]) -> None:
    """A JPEG's EXIF data may contain another JPEG, with its own end marker, before the pixels."""
    segment = b"Exif\0\0" + images[1]
    image = images[0][:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + images[0][2:]
    assert not is_cut_short(image)
    assert is_cut_short(image[:-2])
    assert is_cut_short(image[: len(image) - len(images[0]) // 2])
    assert not is_cut_short(image + image[:1000])


def test_a_jpeg_that_is_cut_short_is_bad_wherever_the_crop_lies(tmp_path: Path, images: list[bytes]) -> None:
    """Decoding only the crop would not always detect it."""
    shards = write_shards(tmp_path / "bad", [image[:-50] for image in images])
    loader = make(shards, crop=RandomResizedCrop(scale=(0.08, 0.1)))
    with loader, pytest.raises(ValueError, match="there is not one good sample"):
        loader.next()


def bmp_of_three_bits() -> bytes:
    """A BMP that nvImageCodec reads and DALI does not."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (1, 2, 3)).save(file, "BMP")
    return file.getvalue()[:28] + b"\3" + file.getvalue()[29:]


ONLY_THE_PIPELINE_STOPS = {
    "3 bits": bmp_of_three_bits(),
    "no sample type": ENCODED_ANEW["bmp 15 bits"][0],
}


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_any_mixture_is_sorted_out(tmp_path: Path, images: list[bytes], good: Path, split: str, share: float) -> None:
    """What damage, DALI alone, and the limit on pixels stop may all be in one batch."""
    harmful = [*ONLY_THE_PIPELINE_STOPS.values(), short_bmp(), png_header(30_000, 30_000), REFUSED["tiff int8"][0]]
    harmful += [damage(images[0], kind) for kind in range(NUM_KINDS)]
    rng = np.random.default_rng(int(10 * share))
    bad = set(np.flatnonzero(rng.random(NUM_SAMPLES) < share).tolist())
    mixed = write_shards(tmp_path / "bad", [harmful[i % len(harmful)] if i in bad else image for i, image in enumerate(images)])
    path = tmp_path / "quarantine.jsonl"
    found = epochs(make(mixed, split, quarantine=path), 1)
    listed = {int(json.loads(line)["member"][:4]) for line in path.read_text().splitlines()}
    assert listed <= bad  # no good image is blamed
    assert not bad & {target for batch in found for target in batch["target"].tolist()}
    if split == "valid":
        assert listed == bad
        assert same(found, without(epochs(make(good, split), 1), bad))


def test_images_that_stop_the_pipeline_together_only(
    tmp_path: Path, images: list[bytes], good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that depends on the batch costs one sample, not the run. Each image is presented a few times only."""
    undisturbed = epochs(make(good, "valid"), 1)
    pair, feed, num_fed = {images[20], images[22]}, ImagePipeline.feed, 0

    def fail_for_pair(pipeline: ImagePipeline, batch: list[Any], epoch: int, place: int) -> None:
        nonlocal num_fed
        num_fed += 1
        is_pair = pair <= {image.tobytes() for image in batch}
        feed(pipeline, [np.frombuffer(b"no", np.uint8), *batch[1:]] if is_pair else batch, epoch, place)

    monkeypatch.setattr(ImagePipeline, "feed", fail_for_pair)
    assert same(epochs(make(good, "valid"), 1), without(undisturbed, {22}))
    assert num_fed < 30


def test_a_pipeline_that_stops_at_nothing_in_particular(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with DALI's words, and no sample is blamed."""
    calls = 0

    def fail_once(pipeline: ImagePipeline, stream: object = None) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("encountered:\nout of luck\n")

    monkeypatch.setattr(ImagePipeline, "images", fail_once)
    with make(good) as loader, pytest.raises(ValueError, match=r"^the data pipeline stopped: out of luck$"):
        loader.next()
    assert loader.num_bad_samples == 0


@pytest.mark.parametrize("split", ["train", "valid"])
def test_images_with_too_many_pixels_are_never_decoded(
    tmp_path: Path, images: list[bytes], good: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the pipeline, nor by the search for the sample at which it stopped."""
    monkeypatch.setattr(decoder_check, "decode_whole", lambda decoder, streams: [s for s in streams if s.width < 30_000])
    bomb = png_header(30_000, 30_000)
    shards = write_shards(tmp_path / "bad", [bomb if i == 7 else image for i, image in enumerate(images)])
    path = tmp_path / "quarantine.jsonl"
    assert same(epochs(make(shards, split, quarantine=path), 1), without(epochs(make(good, split), 1), {7}))
    [line] = path.read_text().splitlines()
    assert json.loads(line)["reason"] == "30000x30000 pixels, more than the limit of 89,478,485 (--data.max-pixels)"


def test_the_limit_on_pixels_can_be_set(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    found = epochs(make(good, "valid", quarantine=path, max_pixels=60 * 60), 1)
    sizes = {i: (40 + 13 * i % 60) * (40 + 29 * i % 50) for i in range(NUM_SAMPLES)}
    assert {target for batch in found for target in batch["target"].tolist()} == {i for i in sizes if sizes[i] <= 3600}


def test_a_tiff_that_would_overflow_the_decoders_buffer(tmp_path: Path, images: list[bytes], good: Path) -> None:
    """It could end the process, so no decoder gets it: not the pipeline, not the search, not `verify`."""
    tiff = overflowing_tiff()
    shards = write_shards(tmp_path / "bad", [tiff if i in (7, 20) else image for i, image in enumerate(images)])
    path = tmp_path / "quarantine.jsonl"
    assert same(epochs(make(shards, "valid", quarantine=path), 1), without(epochs(make(good, "valid"), 1), {7, 20}))
    assert {json.loads(line)["reason"] for line in path.read_text().splitlines()} == {"damaged tiff image (a tag occurs twice)"}
    findings = verify(str(shards), num_workers=1).findings
    assert [finding.detail for finding in findings if finding.kind == "bad-image"] == 2 * [
        "damaged tiff image (a tag occurs twice)"
    ]
