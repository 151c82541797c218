"""Kinds of images that decoders read differently: each arrives in training as it is meant, or is refused with the reason."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.dali.validation_decoder import ValidationDecoder
from pipelines.shards.shard_set import open_shards
from tests.helpers.odd_images import (
    ENCODED_ANEW,
    KEPT,
    REFUSED,
    SIZE,
    Array,
    crashing_jpeg2000,
    png_bomb,
    png_with_long_chunk,
    short_bmp,
)
from tests.helpers.runs import ROOT, peak_megabytes
from tests.tools.test_shards_command import read_with_webdataset
from tools.shards.convert import Summary, convert
from tools.shards.plan import Options
from tools.shards.verify import verify

FILES = {name: file for kinds in (ENCODED_ANEW, REFUSED, KEPT) for name, (file, _) in kinds.items()}
EXTENSIONS = {"tiff": "tif", "bmp": "bmp", "jpeg": "jpg", "pnm": "ppm", "jp2": "jp2", "png": "png", "webp": "webp"}
NAMES = {f"{i:03d}.{EXTENSIONS[kind.split()[0]]}": kind for i, kind in enumerate(FILES)}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, dict[str, tuple[str, bytes]], dict[str, str]]:
    """Returns the summary, extension and bytes of the stored images by kind, and the reasons of the others."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "in" / "a").mkdir(parents=True)
    for name, kind in NAMES.items():
        (folder / "in" / "a" / name).write_bytes(FILES[kind])
    summary = convert(folder / "in", folder / "out", Options(shard_samples=1000), num_workers=1)
    stored = {}
    for sample in read_with_webdataset(open_shards(str(folder / "out"), "train").tars):
        extension = next(key for key in sample if key not in ("cls", "__key__", "__url__", "__local_path__"))
        [kind] = [kind for name, kind in NAMES.items() if name[:3] == sample["__key__"].rpartition("_")[2]]
        stored[kind] = (extension, sample[extension])
    lines = (folder / "out" / "rejected.jsonl").read_text().splitlines()
    reasons = {NAMES[Path(entry["path"]).name]: entry["reason"] for entry in map(json.loads, lines)}
    return summary, stored, reasons


def decoder(batch_size: int = len(FILES) + 1) -> ValidationDecoder:
    """Returns a decoder that changes no pixel."""
    return ValidationDecoder(
        batch_size=batch_size,
        image_size=SIZE,
        resize_shorter=SIZE,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        device=torch.device("cpu"),
        num_threads=1,
    )


def difference(pixels: Array, expected: Array) -> float:
    expected = np.dstack([expected] * 3) if expected.ndim == 2 else expected
    return float(np.abs(pixels.astype(float) - expected.astype(float)).mean())


@pytest.mark.parametrize("kind", ENCODED_ANEW)
def test_encoded_anew(converted: tuple[Summary, dict[str, tuple[str, bytes]], dict[str, str]], kind: str) -> None:
    _, stored, _ = converted
    extension, data = stored[kind]
    assert extension == "jpg"
    assert difference(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), ENCODED_ANEW[kind][1]) < 5  # JPEG, 15 bits


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(converted: tuple[Summary, dict[str, tuple[str, bytes]], dict[str, str]], kind: str) -> None:
    _, stored, reasons = converted
    assert kind not in stored
    assert reasons[kind].startswith(REFUSED[kind][1])
    assert reasons[kind].endswith(": save it with 8 bits per channel")


def test_all_others_are_kept(converted: tuple[Summary, dict[str, tuple[str, bytes]], dict[str, str]]) -> None:
    """What training reads right is stored as it is, also where Pillow reads it wrong."""
    summary, stored, reasons = converted
    assert set(reasons) == set(REFUSED)
    assert sum(summary.changes.values()) == len(ENCODED_ANEW)
    for kind in KEPT:
        assert stored[kind][1] == FILES[kind], kind
    pixels, bad = decoder()([file for file, _ in KEPT.values()])
    assert not bad
    for i, (kind, (_, expected)) in enumerate(KEPT.items()):
        assert difference((255 * pixels[i]).permute(1, 2, 0).numpy(), expected) < 3, kind


def write_shard(folder: Path, images: dict[str, bytes]) -> None:
    """Writes a shard as other tools may write it, with images as they are. The class of each is its place."""
    with tarfile.open(folder / "train-000.tar", "w") as tar:
        for i, (name, image) in enumerate(images.items()):
            for member, data in ((name, image), (f"{name.partition('.')[0]}.cls", str(i).encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def load(shards: Path, quarantine: Path, split: str) -> tuple[set[int], dict[str, str]]:
    """Returns the classes that the loader yields in an epoch, and the reasons of the members that it leaves out."""
    config = DataConfig(train=str(shards), valid=str(shards / "train-*.tar"), max_bad_fraction=1.0)
    spec = LoaderSpec(
        split=split,  # type: ignore[arg-type]
        batch_size=5,
        image_size=32,
        device=torch.device("cpu"),
        num_threads=1,
        num_classes=len(FILES) + 9,
        quarantine=quarantine,
    )
    with build_loader(config, spec) as loader:
        found = {target for batch in loader for target in batch["target"].tolist()}
    lines = map(json.loads, quarantine.read_text().splitlines())
    return found, {line["member"]: line["reason"] for line in lines}


@pytest.mark.parametrize("split", ["train", "valid"])
def test_the_loader_leaves_out_what_it_would_misread(tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TIFF, PNM and JPEG 2000 are judged by their headers. Other formats cost nothing, so a misread JPEG passes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shard(tmp_path, {name: FILES[kind] for name, kind in NAMES.items()})
    found, reasons = load(tmp_path, tmp_path / "quarantine.jsonl", split)
    left_out = {NAMES[name]: reason for name, reason in reasons.items()}
    assert not set(left_out) & set(KEPT)
    passed = {kind for i, kind in enumerate(NAMES.values()) if i in found}
    assert {kind for kind in passed if kind not in KEPT} <= {"jpeg CMYK without Adobe"}
    if split == "valid":  # a training epoch leaves out the last batch, if it is not full
        assert set(left_out) | passed == set(FILES)
    for kind, reason in left_out.items():
        way_out = reason.rpartition(": ")[2]
        assert not way_out.startswith("`shards convert`") or kind in ENCODED_ANEW
        assert way_out != "save it with 8 bits per channel" or kind in REFUSED


def use_everywhere(folder: Path) -> None:
    """Gives images that could end the process or fill the memory to every part that reads images.

    Prints what each part says of them, and the most memory that was used, in MB.
    """
    harmful = [*crashing_jpeg2000(), png_bomb(), png_with_long_chunk()]
    images = dict(zip(("0.jp2", "1.jp2", "2.png", "3.png"), harmful, strict=True))
    write_shard(folder, {**images, "4.jpg": KEPT["jpeg rgb"][0]})
    said = {split: load(folder, folder / f"{split}.jsonl", split)[1] for split in ("train", "valid")}
    said["verify"] = {finding.member: finding.detail for finding in verify(str(folder), num_workers=1).findings}
    reasons = decoder()([*images.values()])[1]
    said["predict"] = {name: reasons[i] for i, name in enumerate(images)}
    (folder / "in" / "a").mkdir(parents=True)
    for name, image in {**images, "4.jpg": KEPT["jpeg rgb"][0]}.items():
        (folder / "in" / "a" / name).write_bytes(image)
    convert(folder / "in", folder / "out", Options(), num_workers=1)
    lines = map(json.loads, (folder / "out" / "rejected.jsonl").read_text().splitlines())
    said["convert"] = {Path(line["path"]).name: line["reason"] for line in lines}
    print(json.dumps([said, peak_megabytes()]))


def test_dangerous_images_reach_no_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    script = f"from pathlib import Path; from tests.pipelines.test_kinds import *; use_everywhere(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, megabytes = json.loads(done.stdout.splitlines()[-1])
    jpeg2000 = "jpeg2000 image, which can crash the training decoder: `shards convert` encodes such images anew"
    unread = "jpeg2000 image that the training decoder cannot read"  # nor can Pillow
    too_many = "30000x30000 pixels, more than the limit of 89,478,485 (--max-pixels)"
    in_training = too_many.replace("--", "--data.")
    beyond = "damaged png image (a chunk ends beyond the file)"
    assert said == {
        "train": {"0.jp2": jpeg2000, "1.jp2": jpeg2000, "2.png": in_training, "3.png": beyond},
        "valid": {"0.jp2": jpeg2000, "1.jp2": jpeg2000, "2.png": in_training, "3.png": beyond},
        "verify": {"0.jp2": jpeg2000, "1.jp2": unread, "2.png": too_many, "3.png": beyond},
        "predict": {"0.jp2": jpeg2000, "1.jp2": jpeg2000, "2.png": too_many, "3.png": beyond},
        "convert": {"0.jp2": "damaged JPEG2000 image", "1.jp2": unread, "2.png": too_many, "3.png": beyond},
    }
    assert megabytes < 1500  # 900 million pixels take 2,700 as RGB, and all else 350


def test_verify_and_predict_report_them(tmp_path: Path) -> None:
    """Shards from other tools may hold such images."""
    write_shard(tmp_path, {name: FILES[kind] for name, kind in NAMES.items()})
    wanted = {*ENCODED_ANEW, *REFUSED}
    for level in ("decode", "structure"):
        found = {NAMES[finding.member]: finding for finding in verify(str(tmp_path), level=level).findings if finding.member}  # type: ignore[arg-type]
        assert set(found) == wanted
        assert {finding.kind for finding in found.values()} == {"bad-image"}
    _, bad = decoder()([*FILES.values(), short_bmp()])
    assert {[*FILES, "short"][i] for i in bad} == {*wanted, "short"}
    assert bad[len(FILES)] == "damaged bmp image"
