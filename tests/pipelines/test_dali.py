"""Images and labels from the DALI pipeline."""

import contextlib
import gc
import io
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from PIL import Image

from pipelines.augment import AUGMENTATIONS, RandomResizedCrop
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.dali.cpu_finish import Finish
from pipelines.dali.cpu_resize import CenterCropResize, WholeResize
from pipelines.dali.image_pipeline import ImagePipeline
from pipelines.dali.operators import resample_center
from pipelines.dali.part import Graph
from pipelines.loader import MEAN, STD, Loader, resize_shorter_for
from pipelines.pillow import resized_center_crop
from tests.conftest import write_image
from tests.helpers.loader_contract import make_loader, same, saved, take
from tools.bench.linked import LinkedShards, small
from tools.shards.convert import convert
from tools.shards.plan import Options

CPU = torch.device("cpu")
# These cover every rounding of the resized length and of the crop's corner.
SIZES = [(500, 375), (375, 500), (256, 256), (301, 256), (256, 259), (1000, 777), (640, 427), (83, 120), (224, 91)]


def valid_loader(shards: Path | str, backend: str = "dali", image_size: int = 224, batch_size: int = 4) -> Loader:
    config = DataConfig(train="", valid=str(shards), backend=backend)  # type: ignore[arg-type]
    return build_loader(
        config,
        LoaderSpec(split="valid", batch_size=batch_size, image_size=image_size, device=CPU, dtype=torch.float32, num_threads=1),
    )


def mean_differences(shards: Path, image_size: int) -> list[float]:
    """Returns the mean absolute difference to Pillow's pixels, of 255, for each image."""
    differences: list[float] = []
    with valid_loader(shards, "dali", image_size) as dali, valid_loader(shards, "pillow", image_size) as pillow:
        for ours, reference in zip(dali, pillow, strict=True):
            assert torch.equal(ours["target"], reference["target"])
            difference = (ours["image"] - reference["image"]).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
            differences += difference.mean(dim=(1, 2, 3)).tolist()
    return differences


@pytest.mark.parametrize("image_size", [32, 64, 224])
def test_valid_pixels_are_pillows(tmp_path: Path, image_size: int) -> None:
    for i, size in enumerate(SIZES):
        write_image(tmp_path / "images" / "a" / f"{i}.png", i, size)
        write_image(tmp_path / "images" / "b" / f"{i}.jpg", 100 + i, size, quality=92)
    convert(tmp_path / "images", tmp_path / "shards", Options(name="valid", shard_samples=100), num_workers=1)
    differences = mean_differences(tmp_path / "shards", image_size)
    assert len(differences) == 2 * len(SIZES)
    assert max(differences[: len(SIZES)]) < 0.01  # PNG
    assert max(differences) < 0.15  # JPEG decoders differ slightly


@pytest.mark.parametrize("image_size", [32, 64, 224])
def test_the_gpus_resizing_is_pillows(tmp_path: Path, image_size: int) -> None:
    """Runs the operators of validation on a GPU on the CPU."""
    paths = [tmp_path / f"{i}.png" for i in range(len(SIZES))]
    for i, path in enumerate(paths):
        write_image(path, i, SIZES[i])
    encoded = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]

    @pipeline_def(batch_size=len(SIZES), num_threads=1, device_id=None)
    def pipeline() -> Any:
        images = fn.external_source(lambda: encoded, batch=True, dtype=types.UINT8, ndim=1)
        shape = fn.peek_image_shape(images)
        return resample_center(fn.decoders.image(images), shape, image_size, resize_shorter_for(image_size))

    [images] = pipeline().run()
    for i, path in enumerate(paths):
        reference = np.asarray(resized_center_crop(Image.open(path), image_size), np.float32)
        # They differ by half a gray value if the resized sides are rounded.
        assert np.abs(np.asarray(images.at(i), np.float32) - reference).mean() < 0.3


def test_a_line_is_an_image(tmp_path: Path) -> None:
    """Resized as a whole, 20,000 pixels by one would take 4 GB. The crop shows the middle of a strip, as with Pillow."""
    for i, size in enumerate([(20_000, 1), (1, 20_000), (2000, 90), (90, 2001)]):
        write_image(tmp_path / "images" / str(i) / "0.png", i, size)
    convert(tmp_path / "images", tmp_path / "shards", Options(name="valid", shard_samples=4), num_workers=1)
    with valid_loader(tmp_path / "shards") as dali:
        [batch] = dali
    pixels = 255 * (batch["image"] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
    for image, label in zip(pixels, batch["target"].tolist(), strict=True):
        if label >= 2:
            reference = np.asarray(resized_center_crop(Image.open(tmp_path / "images" / str(label) / "0.png"), 224), np.float32)
            assert np.abs(image.permute(1, 2, 0).numpy() - reference).mean() < 0.3


@pytest.mark.parametrize("split", ["train", "valid"])
def test_threads_change_nothing(shards: Path, split: Literal["train", "valid"]) -> None:
    epochs = []
    for num_threads in (1, 5):  # with more than one, several threads resize a batch
        options: dict[str, Any] = {"batch_size": 10, "image_size": 32, "device": CPU, "num_threads": num_threads}
        with build_loader(DataConfig(train=str(shards), valid=str(shards)), LoaderSpec(split=split, **options)) as loader:
            epochs.append([batch["image"] for batch in loader])
    assert all(torch.equal(one, other) for one, other in zip(*epochs, strict=True))
    assert len(epochs[0]) > 1


@pytest.mark.parametrize("split", ["train", "valid"])
def test_threads_resize_at_the_same_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, split: str) -> None:
    """Python nodes of DALI's graphs run one after the other, also those of different graphs."""
    kind = WholeResize if split == "train" else CenterCropResize
    resized, both = kind.resized, threading.Barrier(2, timeout=60)
    monkeypatch.setattr(kind, "resized", lambda *arguments: (both.wait(), resized(*arguments))[1])
    write_image(tmp_path / "1.png", 1)
    spec = LoaderSpec(split=split, batch_size=4, image_size=32, device=CPU, num_threads=2)  # type: ignore[arg-type]
    with contextlib.closing(ImagePipeline(DataConfig(), spec)) as pipeline:
        pipeline.feed([np.fromfile(tmp_path / "1.png", np.uint8)] * 4, 0, 0)
        assert len(pipeline.images()) == 4


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("end", "seconds"), [("loader.close(); ", 2), ("", 2), ("", 0.3)])
def test_the_garbage_collector_comes_in_a_pipelines_own_thread(
    shards: Path, num_threads: int, end: str, seconds: float
) -> None:
    """It runs while the pipeline still works on batches, and only a reference cycle holds the pipeline.

    The process ends after these batches, or during them.
    """
    script = f"""
import gc, sys, time, torch
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.dali.cpu_resize import WholeResize
failures, resized = [], WholeResize.resized
sys.unraisablehook = lambda raised: failures.append(raised.exc_value)
def slowly(self, *inputs):
    time.sleep(0.02)
    gc.collect()
    return resized(self, *inputs)
WholeResize.resized = slowly
gc.disable()
spec = LoaderSpec(split="train", batch_size=8, image_size=32, device=torch.device("cpu"), num_threads={num_threads})
loader = build_loader(DataConfig(train={str(shards)!r}), spec)
loader.next()
loader.itself, pipeline = loader, loader._pipeline
pipeline.itself = pipeline
{end}del loader, pipeline
time.sleep({seconds})
sys.exit(str(failures) if failures else None)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pipeline_that_an_error_stopped_ends_without_the_garbage_collector() -> None:
    """`predict` replaces one for each batch with an image that cannot be decoded."""
    before = threading.active_count()
    gc.disable()
    try:
        for _ in range(3):
            spec = LoaderSpec(split="valid", batch_size=4, image_size=32, device=CPU, num_threads=2)
            pipeline = ImagePipeline(DataConfig(), spec)
            for _ in range(2):
                pipeline.feed([np.zeros(9, np.uint8)] * 4, 0, 0)
            try:
                pipeline.images()
            except RuntimeError:
                del pipeline
        deadline = time.monotonic() + 60
        while threading.active_count() > before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        gc.enable()


def test_the_first_batch_has_the_cores_to_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = list[str]()
    feed, finish = Graph.feed, Finish.__call__
    monkeypatch.setattr(Graph, "feed", lambda *arguments: (feed(*arguments), done.append("decoding"))[0])
    monkeypatch.setattr(Finish, "__call__", lambda *arguments: (finish(*arguments), done.append("finished"))[0])
    write_image(tmp_path / "1.png", 1)
    spec = LoaderSpec(split="train", batch_size=4, image_size=32, device=CPU, num_threads=1)
    with contextlib.closing(ImagePipeline(DataConfig(), spec)) as pipeline:
        for place in (0, 4, 8):
            pipeline.feed([np.fromfile(tmp_path / "1.png", np.uint8)] * 4, 0, place)
        for _ in range(3):
            assert len(pipeline.images()) == 4
    assert done[:2] == ["decoding", "finished"]
    assert sorted(done) == ["decoding"] * 3 + ["finished"] * 3


def test_a_stopped_pipeline_refuses_more() -> None:
    spec = LoaderSpec(split="valid", batch_size=4, image_size=32, device=CPU, num_threads=1)
    with contextlib.closing(ImagePipeline(DataConfig(), spec)) as pipeline:
        for _ in range(3):
            pipeline.feed([np.zeros(9, np.uint8)] * 4, 0, 0)
            with pytest.raises(RuntimeError):
                pipeline.images()


def test_formats_and_colour_modes(tmp_path: Path) -> None:
    """Each format and mode that the converter accepts becomes RGB in the right orientation, as with Pillow."""
    folder = tmp_path / "images" / "a"
    for name in ("1.jpg", "2.png", "3.webp", "4.bmp", "5.tif", "6.ppm", "7.JPEG"):
        write_image(folder / name, 7)
    source = Image.open(folder / "2.png")
    source.convert("L").save(folder / "gray.jpg")
    source.convert("P").save(folder / "palette.png")
    source.convert("RGBA").save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by a quarter turn
    source.save(folder / "rotated.jpg", exif=exif)
    summary = convert(tmp_path / "images", tmp_path / "shards", Options(name="valid", shard_samples=100), num_workers=1)
    assert summary.rejected == {}
    differences = mean_differences(tmp_path / "shards", 48)
    assert len(differences) == 11
    assert max(differences) < 1.5  # decoders of lossy formats differ slightly; a wrong orientation gives about 40


def test_training_crops_and_flips(tmp_path: Path) -> None:
    """Random crops of a horizontal ramp keep a gradient, and flips reverse half of them."""
    ramp = np.broadcast_to(np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None], (96, 128, 3))
    for i in range(200):
        path = tmp_path / "images" / "ramp" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(ramp)).save(path)
    convert(tmp_path / "images", tmp_path / "shards", Options(name="train", shard_samples=100), num_workers=1)
    config = DataConfig(train=str(tmp_path / "shards"), crop=RandomResizedCrop(scale=(0.25, 0.5)))
    with build_loader(
        config, LoaderSpec(split="train", batch_size=100, image_size=32, device=CPU, dtype=torch.float32, num_threads=1)
    ) as loader:
        columns = torch.cat([batch["image"][:, 0].mean(dim=1) for batch in loader]) * STD[0]
    span = columns[:, -1] - columns[:, 0]
    assert 60 < (span < 0).sum() < 140
    # A crop of area 0.25 to 0.5 and aspect 3/4 to 4/3 is between 0.375 and 0.71 of this image's width.
    assert span.abs().min() > 0.3
    assert span.abs().max() < 0.75
    assert span.abs().std() > 0.05


def test_a_pass_over_the_training_split_has_each_sample_once(tmp_path: Path) -> None:
    """Each image has its own gray value, which identifies it. The batch size divides the number of samples."""
    for i in range(48):
        path = tmp_path / "images" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (5 * i, 5 * i, 5 * i)).save(path)
    convert(tmp_path / "images", tmp_path / "shards", Options(name="train", shard_samples=10), num_workers=1)
    orders = []
    with make_loader(tmp_path / "shards", "dali", "train", CPU) as loader:
        for _ in range(3):
            images = torch.cat([batch["image"][:, 0, 0, 0] for batch in loader]) * STD[0] + 0.485
            order = (images * 255 / 5).round().int().tolist()
            assert sorted(order) == list(range(48))
            orders.append(order)
    assert orders[0] != orders[1]
    assert orders[1] != orders[2]
    assert orders[0] != orders[2]
    assert orders[0] != list(range(48))


def test_resumed_with_every_augmentation(shards: Path) -> None:
    augmentations = tuple(kind() if name != "color-jitter" else kind(hue=0.1) for name, kind in AUGMENTATIONS.items())
    assert len(augmentations) >= 8
    options = {"data": {"augment": augmentations}}
    with make_loader(shards, "dali", "train", CPU, **options) as loader:
        batches, states = [], []
        for _ in range(12):
            states.append(saved(loader.state_dict()))
            batches += take(loader, 1)
    for position in (1, 3, 6, 8, 10):  # within and at the beginning of epochs
        with make_loader(shards, "dali", "train", CPU, **options) as loader:
            loader.load_state_dict(states[position])
            assert same(take(loader, 2), batches[position : position + 2]), position


def test_few_open_files(tmp_path: Path) -> None:
    """A process with a low limit of open files can read many shards."""
    folder = LinkedShards(tmp_path / "made", small).make(100, 1000)
    script = (
        "import os, resource, time, torch\n"
        "from pipelines.build import LoaderSpec, build_loader\n"
        "from pipelines.config import DataConfig\n"
        "counted = lambda: len(os.listdir('/proc/self/fd'))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (80, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "spec = LoaderSpec(split='train', batch_size=50, image_size=32, device=torch.device('cpu'), num_threads=1)\n"
        f"with build_loader(DataConfig(train={str(folder)!r}), spec) as loader:\n"
        "    print(sum(len(batch['target']) for _ in range(2) for batch in loader))\n"
        # The first batches of the next epoch may not have been read yet.
        "    before = min(time.sleep(0.05) or counted() for _ in range(60))\n"
        "print(before - counted() <= 10)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2000\nTrue\n"), done.stderr


def test_libraries_that_are_not_needed_are_not_missed() -> None:
    """DALI looks for cuFFT and NPP before its first graph for a GPU, and would warn."""
    script = "import pipelines.dali.graph, nvidia.dali.backend; nvidia.dali.backend.check_cuda_runtime()"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_loader_imports_no_more_than_it_needs(shards: Path) -> None:
    """A second decoder is for samples that have to be judged, and tyro for command lines."""
    script = f"""
import sys, torch
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
spec = LoaderSpec(split="train", batch_size=8, image_size=32, device=torch.device("cpu"), num_threads=1)
with build_loader(DataConfig(train={str(shards)!r}), spec) as loader:
    assert len(list(loader)) > 0
print(sorted({{"tyro", "nvidia.nvimgcodec", "webdataset", "tensorboard"}} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_progressive_sizes(shards: Path) -> None:
    """Training images grow with the epochs, also in a resumed run. Validation images do not."""
    options = {"image_size": 48, "data": {"size_schedule": ("2:32", "3:64")}}
    with make_loader(shards, "dali", "train", CPU, **options) as loader:
        epochs = [list(loader) for _ in range(4)]
        assert [epoch[0]["image"].shape[-1] for epoch in epochs] == [48, 32, 64, 64]
    with make_loader(shards, "dali", "train", CPU, **options) as loader:
        list(loader)
        take(loader, 9)
        state = loader.state_dict()
    with make_loader(shards, "dali", "train", CPU, **options) as loader:
        loader.load_state_dict(state)
        assert same(list(loader), epochs[2][2:])
    with make_loader(shards, "dali", "valid", CPU, **options) as loader:
        assert {batch["image"].shape[-1] for _ in range(3) for batch in loader} == {48}


@pytest.mark.parametrize("schedule", ["0:64", "1:64 1:80", "1:x"])
def test_wrong_size_schedules(schedule: str) -> None:
    with pytest.raises(ValueError, match=rf"--data.size-schedule {schedule}: EPOCH:SIZE is needed instead of"):
        DataConfig(size_schedule=tuple(schedule.split()))


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_foreign_tar(path: Path, labels: list[bytes]) -> None:
    """Writes a tar like other tools: label first, an upper-case extension, a folder in the key, and an unused member."""
    encoded = io.BytesIO()
    Image.new("RGB", (50, 40), (200, 100, 50)).save(encoded, "JPEG")
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            add_member(tar, f"some/folder/{i:04d}.cls", label)
            add_member(tar, f"some/folder/{i:04d}.json", b"{}")
            add_member(tar, f"some/folder/{i:04d}.JPG", encoded.getvalue())


@pytest.mark.parametrize("backend", ["dali", "pillow"])
def test_foreign_shards_without_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_foreign_tar(tmp_path / "a.tar", [b"0", b"12\n", b" 3 "])
    write_foreign_tar(tmp_path / "b.tar", [b"999"])
    for _ in range(2):  # the second time with the cached index
        with valid_loader(f"{tmp_path}/*.tar", backend, image_size=32) as loader:
            assert [batch["target"].tolist() for batch in loader] == [[0, 12, 3, 999]]
    assert len(list((tmp_path / "cache").rglob("*.idx"))) == 2


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b"cat", r"bad\.tar:\d+:some/folder/0001\.JPG: the label is 'cat'; a class number in ASCII digits is needed"),
        (b"", r"bad\.tar:\d+:some/folder/0001\.JPG: the label is empty"),
        (b"n01440764_tench", r"bad\.tar:\d+:some/folder/0001\.JPG: the label is 'n01440764_tench'; a class number"),
        (b"5", r"bad\.tar:\d+:some/folder/0001\.JPG: class 5 is out of range; there are 5 classes"),
    ],
)
def test_bad_labels_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: bytes, message: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_foreign_tar(tmp_path / "bad.tar", [b"4", label, b"0"])
    config = DataConfig(valid=str(tmp_path / "bad.tar"), on_error="stop")
    loader = build_loader(
        config,
        LoaderSpec(split="valid", batch_size=3, image_size=32, device=CPU, dtype=torch.float32, num_threads=1, num_classes=5),
    )
    with loader, pytest.raises(ValueError, match=message):
        loader.next()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", r"bad\.tar:\d+:1\.jpg: jpeg image cut short"),
        ("no image", r"bad\.tar:\d+:1\.jpg: not an image"),
        ("empty", r"bad\.tar:\d+:1\.jpg: empty file"),
        ("image missing", r"bad\.tar:\d+:1\.cls: no image"),
        ("label missing", r"bad\.tar:\d+:1\.jpg: no \.cls among"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, message: str) -> None:
    """The shards were not checked by the converter, and bad samples must not be skipped."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_image(tmp_path / "good.jpg", 1)
    good = (tmp_path / "good.jpg").read_bytes()
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for i in range(3):
            image = {"truncated": good[:-300], "no image": b"no image", "empty": b""}.get(damage, good) if i == 1 else good
            if not (i == 1 and damage == "image missing"):
                add_member(tar, f"{i}.jpg", image)
            if not (i == 1 and damage == "label missing"):
                add_member(tar, f"{i}.cls", b"0")
    config = DataConfig(valid=str(tmp_path / "bad.tar"), on_error="stop")
    with pytest.raises(ValueError, match=message) as raised:
        build_loader(
            config, LoaderSpec(split="valid", batch_size=3, image_size=32, device=CPU, num_threads=1, num_classes=1)
        ).next()
    assert "\n" not in str(raised.value)


def test_an_error_of_a_worker_process_is_one_line(shards: Path) -> None:
    config = DataConfig(valid=str(shards), backend="pillow", max_pixels=80)
    with pytest.raises(ValueError, match=r"^\S+\.tar:\d+: \d+x\d+ pixels, more than the limit of 80 \(--data\.max-pixels\)$"):
        build_loader(config, LoaderSpec(split="valid", batch_size=3, image_size=32, device=CPU, num_threads=1, num_classes=9))
