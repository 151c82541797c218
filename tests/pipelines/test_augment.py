"""Effects of the augmentations on pixels, and their notation on the command line."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image

from pipelines.augment import (
    AUGMENTATIONS,
    GRAY,
    Augmentation,
    AutoAugment,
    ColorJitter,
    HorizontalFlip,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    Rotate,
    TrivialAugmentWide,
    VerticalFlip,
)
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import MEAN, STD
from pipelines.notation import parse_augmentation, write_augmentation
from tests.conftest import write_image
from tests.helpers.runs import environment
from tools.augmentation_lists import AUGMENTATION_LISTS
from tools.shards.convert import convert
from tools.shards.plan import Options

ROOT = Path(__file__).parents[2]
COUNT, SIZE = 64, 48
WHOLE = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))  # leaves a square image unchanged
AUTO = (TrivialAugmentWide(), RandAugment(), AutoAugment())
EVERY = (
    HorizontalFlip(),
    VerticalFlip(),
    Rotate(probability=0.5),
    ColorJitter(0.4, 0.3, 0.5, 0.1),
    RandomErasing(),
    *AUTO,
)

Pixels = NDArray[np.float32]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of square images. Each has its own class, so that its label identifies it."""
    folder = tmp_path_factory.mktemp("augment")
    for i in range(COUNT):
        write_image(folder / "images" / f"{i:02d}" / "image.png", i, (SIZE, SIZE))
    convert(folder / "images", folder / "shards", Options(name="train", shard_samples=100), num_workers=1)
    return folder


def augmented(stored: Path, *augmentations: Augmentation) -> Pixels:
    """Augments the images. Returns them in the order of their classes: `(COUNT, SIZE, SIZE, 3)`, from 0 to 255."""
    config = DataConfig(train=str(stored / "shards"), crop=WHOLE, augment=augmentations)
    with build_loader(
        config, LoaderSpec(split="train", batch_size=COUNT, image_size=SIZE, device=torch.device("cpu"), num_threads=2)
    ) as loader:
        [batch] = loader
    images = batch["image"][batch["target"].argsort()].permute(0, 2, 3, 1).numpy()
    pixels: Pixels = 255 * (images * np.array(STD, np.float32) + np.array(MEAN, np.float32))
    return pixels


def originals(stored: Path) -> Pixels:
    return np.array([np.asarray(Image.open(stored / "images" / f"{i:02d}" / "image.png")) for i in range(COUNT)], np.float32)


def same(left: Pixels, right: Pixels) -> NDArray[np.bool_]:
    """Whether each image is the same in both, within the rounding of normalization."""
    return (abs(left - right) < 0.01).all(axis=(1, 2, 3))


def every_image(stored: Path, tmp_path: Path, pixels: NDArray[np.uint8], *augmentations: Augmentation) -> Pixels:
    """Augments one image COUNT times."""
    shutil.copytree(stored / "images", tmp_path / "images")
    for path in (tmp_path / "images").rglob("*.png"):
        Image.fromarray(pixels).save(path)
    convert(tmp_path / "images", tmp_path / "shards", Options(name="train", shard_samples=100), num_workers=1)
    return augmented(tmp_path, *augmentations)


def test_no_augmentation_leaves_the_crop(stored: Path) -> None:
    assert same(augmented(stored), originals(stored)).all()


def test_horizontal_flip_mirrors_exactly_and_half_of_the_images(stored: Path) -> None:
    before = originals(stored)
    assert same(augmented(stored, HorizontalFlip(1.0)), before[:, :, ::-1]).all()
    assert same(augmented(stored, HorizontalFlip(0.0)), before).all()
    after = augmented(stored, HorizontalFlip())
    flipped = same(after, before[:, :, ::-1])
    assert (flipped | same(after, before)).all()
    assert 16 < flipped.sum() < 48


def test_two_horizontal_flips_are_two(stored: Path) -> None:
    """Only one flip can happen during normalization."""
    assert same(augmented(stored, HorizontalFlip(1.0), HorizontalFlip(1.0)), originals(stored)).all()


def test_vertical_flip_mirrors_exactly_and_half_of_the_images(stored: Path) -> None:
    before = originals(stored)
    assert same(augmented(stored, VerticalFlip(1.0)), before[:, ::-1]).all()
    after = augmented(stored, VerticalFlip())
    flipped = same(after, before[:, ::-1])
    assert (flipped | same(after, before)).all()
    assert 16 < flipped.sum() < 48


def test_rotation_is_about_the_centre_both_ways_and_within_its_degrees(stored: Path, tmp_path: Path) -> None:
    """Of a bright half and a bright central point, the half's direction is the angle, and the point stays."""
    half = np.full((SIZE, SIZE, 3), 60, np.uint8)
    half[:, SIZE // 2 :] = 200
    half[SIZE // 2 - 2 : SIZE // 2 + 2, SIZE // 2 - 2 : SIZE // 2 + 2] = (255, 0, 255)
    after = every_image(stored, tmp_path, half, Rotate(degrees=40))
    centre = after[:, SIZE // 2 - 1 : SIZE // 2 + 1, SIZE // 2 - 1 : SIZE // 2 + 1]
    assert abs(centre - (255, 0, 255)).max() < 1
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    ring = (np.hypot(x, y) < SIZE / 2 - 1) & (np.hypot(x, y) > 4)
    bright = (after[:, :, :, 1] > 130) & ring
    angles = np.array([math.degrees(math.atan2(y[image].mean(), x[image].mean())) for image in bright])
    assert abs(angles).max() < 41
    assert angles.min() < -25
    assert angles.max() > 25
    assert angles.std() == pytest.approx(40 / math.sqrt(3), rel=0.25)
    turned_far = abs(angles) > 20
    assert abs(after[turned_far, 0, 0] - GRAY).max() < 0.01


def test_rotation_of_no_degrees_or_no_probability_changes_nothing(stored: Path) -> None:
    before = originals(stored)
    assert same(augmented(stored, Rotate(degrees=0)), before).all()
    assert same(augmented(stored, Rotate(degrees=90, probability=0)), before).all()
    assert 16 < same(augmented(stored, Rotate(degrees=90, probability=0.5)), before).sum() < 48


def test_color_jitter_has_torchvisions_ranges(stored: Path, tmp_path: Path) -> None:
    """On a flat gray of 100, brightness scales the value, contrast scales the distance to 128, and hue has no effect."""
    flat = np.full((SIZE, SIZE, 3), 100, np.uint8)
    brightness = every_image(stored, tmp_path / "1", flat, ColorJitter(brightness=0.5)).mean(axis=(1, 2, 3)) / 100
    assert 0.49 <= brightness.min() < 0.65
    assert 1.35 < brightness.max() <= 1.51
    assert brightness.std() == pytest.approx(0.5 / math.sqrt(3), rel=0.25)
    contrast = (every_image(stored, tmp_path / "2", flat, ColorJitter(contrast=1.5)).mean(axis=(1, 2, 3)) - 128) / (100 - 128)
    assert -0.02 <= contrast.min() < 0.4  # 1 - 1.5 is clamped to 0
    assert 2.1 < contrast.max() <= 2.52
    colorless = every_image(stored, tmp_path / "3", flat, ColorJitter(saturation=0.5, hue=0.5))
    assert abs(colorless - 100).max() < 1.1


def test_color_jitter_changes_hue_and_saturation(stored: Path, tmp_path: Path) -> None:
    """Saturation scales the distances between the channels; a hue of half a circle reaches every color."""
    red = np.full((SIZE, SIZE, 3), (150, 100, 100), np.uint8)
    saturated = every_image(stored, tmp_path / "1", red, ColorJitter(saturation=0.5))[:, 0, 0]
    factors = (saturated[:, 0] - saturated[:, 1]) / 50
    assert 0.47 <= factors.min() < 0.65
    assert 1.35 < factors.max() <= 1.53
    turned = every_image(stored, tmp_path / "2", red, ColorJitter(hue=0.5))[:, 0, 0]
    assert set(turned.argmax(axis=1)) == {0, 1, 2}
    slightly = every_image(stored, tmp_path / "3", red, ColorJitter(hue=0.05))[:, 0, 0]
    assert set(slightly.argmax(axis=1)) == {0}
    assert slightly.std(axis=0).min() > 0.5


def test_erasing_fills_a_rectangle_of_the_right_size_with_the_mean(stored: Path) -> None:
    before, after = originals(stored), augmented(stored, RandomErasing(probability=1.0, area=(0.1, 0.4), ratio=(0.5, 2.0)))
    areas, ratios, tops = [], [], []
    for original, image in zip(before, after, strict=True):
        changed = (abs(original - image) > 0.01).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        normalized = (image[box] / 255 - MEAN) / STD
        assert abs(normalized).max() < 0.01  # not exactly 0, because the mean was rounded to a gray value
        height, width = normalized.shape[:2]
        areas.append(height * width / SIZE**2)
        ratios.append(height / width)
        tops.append(rows[0] / max(1, SIZE - height))
        image[box] = original[box]
    assert same(before, after).all()  # outside the rectangles
    assert 0.1 - 0.03 < min(areas) < 0.16
    assert 0.34 < max(areas) < 0.4 + 0.03
    assert 0.45 < min(ratios) < 0.65
    assert 1.5 < max(ratios) < 2.2
    assert min(tops) < 0.15
    assert max(tops) > 0.85


def test_erasing_spares_images_and_keeps_its_area_where_the_ratio_does_not_fit(stored: Path) -> None:
    before = originals(stored)
    assert 4 < (~same(augmented(stored, RandomErasing(probability=0.25)), before)).sum() < 30
    assert same(augmented(stored, RandomErasing(probability=0.0)), before).all()
    large = augmented(stored, RandomErasing(probability=1.0, area=(0.8, 0.8), ratio=(3.0, 3.0)))
    shares = (abs((large / 255 - MEAN) / STD) < 0.01).all(axis=3).mean(axis=(1, 2))
    assert shares.min() > 0.77
    assert shares.max() < 0.83


@pytest.mark.parametrize("augmentation", AUTO, ids=lambda augmentation: augmentation.name)
def test_automatic_augmentations_change_most_images_and_stay_images(stored: Path, augmentation: Augmentation) -> None:
    before = originals(stored)
    with warnings.catch_warnings(record=True) as caught:  # DALI itself uses deprecated operator names
        after = augmented(stored, augmentation)
    assert not [warning for warning in caught if issubclass(warning.category, DeprecationWarning)]
    assert after.shape == before.shape
    assert after.min() > -0.01
    assert after.max() < 255.01
    assert (~same(after, before)).sum() > COUNT / 2
    # No image is moved out of sight: the gray behind a moved image does not fill the picture.
    assert (abs(after - GRAY) < 0.01).all(axis=3).mean(axis=(1, 2)).max() < 0.7


def parse(*arguments: str) -> DataConfig:
    return tyro.cli(DataConfig, args=arguments, registry=AUGMENTATION_LISTS)


def test_the_command_line() -> None:
    assert parse().augment == (HorizontalFlip(),)
    assert parse("--augment").augment == ()
    assert parse("--crop.scale", "0.35", "1", "--crop.ratio", "1", "2").crop == RandomResizedCrop((0.35, 1.0), (1.0, 2.0))
    words = (
        "horizontal-flip color-jitter:brightness=0.4,hue=0.1 trivial-augment-wide random-erasing:area=0.1..0.2 rand-augment:n=3"
    )
    steps = parse("--threads", "2", "--augment", *words.split(), "--block-shards", "9").augment
    assert steps == (
        HorizontalFlip(),
        ColorJitter(brightness=0.4, hue=0.1),
        TrivialAugmentWide(),
        RandomErasing(area=(0.1, 0.2)),
        RandAugment(n=3),
    )
    assert " ".join(map(write_augmentation, steps)) == words
    for step in EVERY:
        assert parse_augmentation(write_augmentation(step)) == step


def test_help_and_config_json_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    printed = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    assert {step.name for step in EVERY} == set(AUGMENTATIONS)
    assert all(step.name in printed for step in EVERY)
    written = json.loads(json.dumps(dataclasses.asdict(DataConfig(augment=(Rotate(30), AutoAugment())))))
    assert written["augment"] == [{"name": "rotate", "degrees": 30, "probability": 1.0}, {"name": "auto-augment"}]
    assert written["crop"]["scale"] == [0.08, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no augmentation ''; there are"),
        ("rotate:name=x", "rotate has no parameter 'name'"),
        ("rotate:degrees", "rotate:degrees: a number is needed, not ''"),
        ("rotate:probability=nan", "rotate: probability nan: from 0 to 1 is possible"),
        ("horizontal-flip:probability=2", "horizontal-flip: probability 2.0: from 0 to 1 is possible"),
        ("vertical-flip:probability=-1", "vertical-flip: probability -1.0: from 0 to 1 is possible"),
        ("rand-augment:m=31", "rand-augment: m 31: from 0 to 30 is possible"),
        ("random-erasing:area=0..0.1", "random-erasing: area 0.0..0.1: from 1e-06 to 1 is possible"),
        ("color-jitter:hue=0.6", "color-jitter: hue 0.6: from 0 to 0.5 is possible"),
    ],
)
def test_what_is_written_wrongly_is_named(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        parse_augmentation(text)
    with pytest.raises(SystemExit):
        parse("--augment", text)
    assert re.sub(r"[\s│]+", "", message) in re.sub(r"[\s│]+", "", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": (0.0, 1.0)}, r"^crop\.ratio 0\.0 1\.0: two finite numbers above 0 are needed"),
        ({"ratio": (0.5, math.inf)}, r"^crop\.ratio 0\.5 inf: two finite numbers above 0 are needed"),
    ],
)
def test_impossible_crops_are_named(options: dict[str, tuple[float, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomResizedCrop(**options)


def test_pillow_flips(stored: Path) -> None:
    before = originals(stored)
    for augment, expected in (((), before), ((HorizontalFlip(1.0),), before[:, :, ::-1])):
        config = DataConfig(train=str(stored / "shards"), backend="pillow", crop=WHOLE, augment=augment)
        with build_loader(
            config, LoaderSpec(split="train", batch_size=COUNT, image_size=SIZE, device=torch.device("cpu"), num_threads=0)
        ) as loader:
            [batch] = loader
        images = batch["image"][batch["target"].argsort()].permute(0, 2, 3, 1).numpy()
        assert same(255 * (images * np.array(STD, np.float32) + np.array(MEAN, np.float32)), expected).all()


def test_the_example_of_contributing_works_as_it_is_written(stored: Path, tmp_path: Path) -> None:
    """Once it is appended to `pipelines/augment.py`, it works under its name, without any other change."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Add an augmentation")[1].split("\n## ")[0]
    [example] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    [words] = re.findall(r"--data\.augment (.*)", section)
    shutil.copytree(ROOT / "pipelines", tmp_path / "pipelines")
    with open(tmp_path / "pipelines" / "augment.py", "a") as file:
        file.write(f"\n\n{example}")
    script = f"""
import torch, tyro
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from tools.augmentation_lists import AUGMENTATION_LISTS
arguments = ["--train", {str(stored / "shards")!r}, "--augment", *{words.split()!r}]
config = tyro.cli(DataConfig, args=arguments, registry=AUGMENTATION_LISTS)
spec = LoaderSpec(split="train", batch_size={COUNT}, image_size=32, device=torch.device("cpu"), num_threads=1)
with build_loader(config, spec) as loader:
    [batch] = loader
pixels = batch["image"] * torch.tensor({STD}).view(3, 1, 1) + torch.tensor({MEAN}).view(3, 1, 1)
gray = (pixels.amax(1) - pixels.amin(1)).amax((1, 2)) < 0.01
assert 16 < gray.sum() < 48, gray.sum()
"""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
