"""`shards preview`: the sheet shows the pixels of the image, of the training pipeline and of validation."""

import itertools
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.augment import HorizontalFlip, RandomResizedCrop, VerticalFlip
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import MEAN, STD
from pipelines.mix import MixConfig
from tests.conftest import write_image
from tests.tools.test_shards_command import add_member
from tools.shards.preview import CAPTION_HEIGHT, CELL, GAP, MARGIN, cell_corner, choose, preview

SIZES = [(100, 100), (100, 60), (50, 90)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # indices of these tars are useless to others


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A shard of three PNGs, for which all decoders agree, with class names that Pillow's font cannot draw."""
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i, size in enumerate(SIZES):
            write_image(tmp_path / f"{i}.png", i, size)
            add_member(tar, f"größe {i}.png", (tmp_path / f"{i}.png").read_bytes())
            add_member(tar, f"größe {i}.cls", str(i).encode())
    (tmp_path / "_info.json").write_text(json.dumps({"classes": ["größe", "日本\n日本", "\udcff" + "long " * 100]}))
    return tmp_path


def cells(sheet: Path, num_views: int, cell: int, num_rows: int = 3) -> NDArray[np.uint8]:
    """Returns the pixels of all cells, `(rows, columns, cell, cell, 3)`."""
    image = Image.open(sheet)
    corners = [[cell_corner(row, column, num_views, cell) for column in range(num_views + 2)] for row in range(num_rows)]
    return np.array([[np.asarray(image.crop((x, y, x + cell, y + cell))) for x, y in row] for row in corners])


def test_the_sheet_shows_what_is_stored_and_what_the_loaders_give(folder: Path) -> None:
    line = preview(str(folder), folder / "sheet.png", views=4, image_size=100)
    assert line.startswith(f"{folder / 'sheet.png'}: 3 samples, 0 of them unreadable; ")
    sheet = cells(folder / "sheet.png", 4, 100)
    for row, (width, height) in enumerate(SIZES):
        stored = np.full((100, 100, 3), CELL, np.uint8)
        top, left = (100 - height) // 2, (100 - width) // 2
        stored[top : top + height, left : left + width] = np.asarray(Image.open(folder / f"{row}.png"))
        np.testing.assert_array_equal(sheet[row, 0], stored)
        assert all((first != second).any() for first, second in itertools.combinations(sheet[row, 1:], 2))
    config = DataConfig(valid=str(folder))
    with build_loader(
        config, LoaderSpec(split="valid", batch_size=3, image_size=100, device=torch.device("cpu"), num_threads=1)
    ) as loader:
        [batch] = loader
    normalized = batch["image"].permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(sheet[:, -1], 255 * (normalized * STD + MEAN), atol=0.51)


def test_views_are_random_crops_as_configured_and_flipped(folder: Path) -> None:
    """A crop of a whole square image changes nothing, so only the flip does."""
    whole = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    preview(str(folder), folder / "sheet.png", samples=3, views=8, image_size=100, crop=whole)
    stored, *views = cells(folder / "sheet.png", 8, 100)[0, :-1].astype(int)
    flips = [(view == stored[:, ::-1]).all() for view in views]
    assert all(flip or (view == stored).all() for flip, view in zip(flips, views, strict=True))
    assert 0 < sum(flips) < 8


def test_views_show_the_listed_augmentations_and_mixed_columns(folder: Path) -> None:
    """A column is a batch. Its rows are mixed with the reversed ones, so the middle row of three is its own partner."""
    whole = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    steps = (VerticalFlip(1.0), HorizontalFlip(1.0))
    for name, mix_config in (("plain", MixConfig()), ("mixed", MixConfig(mixup_alpha=1.0))):
        options = {"crop": whole, "augment": steps, "mix": mix_config}
        preview(str(folder), folder / f"{name}.png", views=2, image_size=100, **options)  # type: ignore[arg-type]
    plain, mixed = (cells(folder / f"{name}.png", 2, 100).astype(float) for name in ("plain", "mixed"))
    assert (plain[0, 1] == plain[0, 0, ::-1, ::-1]).all()
    np.testing.assert_array_equal(mixed[:, [0, 3]], plain[:, [0, 3]])  # stored images and validation views
    np.testing.assert_array_equal(mixed[1], plain[1])
    for column in (1, 2):
        first, last = plain[0, column], plain[2, column]
        share = ((mixed[0, column] - last) * (first - last)).sum() / ((first - last) ** 2).sum()
        np.testing.assert_allclose(mixed[0, column], share * first + (1 - share) * last, atol=0.6)
        np.testing.assert_allclose(mixed[2, column], share * last + (1 - share) * first, atol=0.6)
        assert 0 < share < 1


def test_the_same_seed_gives_the_same_sheet(folder: Path) -> None:
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        preview(str(folder), folder / f"{name}.png", samples=1, views=2, image_size=32, seed=seed)
    first, again, other = ((folder / f"{name}.png").read_bytes() for name in ("first", "again", "other"))
    assert first == again
    assert first != other


def test_samples_are_chosen_all_over_the_split() -> None:
    chosen = choose(1000, 10, seed=0)
    assert [number // 100 for number in chosen] == list(range(10))
    assert chosen != choose(1000, 10, seed=1)
    assert choose(3, 10, seed=0) == [0, 1, 2]


def test_a_damaged_image_gets_a_row_and_the_command_a_sheet_of_every_row(folder: Path) -> None:
    with tarfile.open(folder / "broken-1.tar", "w") as tar:
        add_member(tar, "a.jpg", b"no image")
        add_member(tar, "a.cls", b"0")
        add_member(tar, "b.png", (folder / "0.png").read_bytes())
        add_member(tar, "b.cls", b"17")
    output = folder / "sheet.JPG"
    command = [sys.executable, "-m", "tools.shards", "preview", f"{folder}/broken-1.tar", "-o", str(output)]
    augment = ["--augment", "rotate:degrees=5", "horizontal-flip", "--crop.scale", "0.5", "1", "--mix.cutmix-alpha", "1"]
    done = subprocess.run([*command, "--views", "6", *augment], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 samples, 1 of them unreadable" in done.stdout
    with Image.open(output) as sheet:
        assert sheet.format == "JPEG"
        x, y = cell_corner(1, 7, 6, 224)
        assert sheet.size == (x + 224 + MARGIN, y + 224 + MARGIN)
        assert x == MARGIN + 7 * (224 + GAP) + 2 * GAP
        assert y - cell_corner(0, 7, 6, 224)[1] == 224 + GAP + CAPTION_HEIGHT
    sheet_cells = cells(output, 6, 224, num_rows=2)
    assert sheet_cells[0, 1:].std() < 2  # grey, except for compression
    assert all(cell.std() > 10 for cell in sheet_cells[1])
    assert not list(folder.glob(".*"))
