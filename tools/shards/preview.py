"""`shards preview`: draws samples as they are stored, and as training and validation present them to the model."""

import io
import math
import os
import random
import tempfile
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.augment import Augmentation, RandomResizedCrop
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.files import replace_bytes
from pipelines.loader import MEAN, STD
from pipelines.location import expand_location
from pipelines.mix import MixConfig
from pipelines.mix import mix as mix_batch
from pipelines.notation import write_augmentation
from pipelines.printable import counted
from pipelines.remote.object_store import is_url
from pipelines.shards.index import read_index, write_index
from pipelines.shards.members import read_member, require_members
from pipelines.shards.shard_set import ShardSet, open_shards, read_label
from tools.shards.check import ImageCheck

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
# These limits keep a sheet within memory, and within the limits of viewers and of JPEG.
LIMITS = {"samples": (1, 100), "views": (1, 24), "image-size": (32, 1024)}

Pixels = NDArray[np.uint8]
Color = tuple[int, int, int]

NO_MIX = MixConfig()
SMALLEST_CELL = 96  # pixels; smaller images are enlarged by an integer factor
GAP, MARGIN = 8, 16
HEAD_HEIGHT, CAPTION_HEIGHT = 80, 28
LEAST_WIDTH = 640  # leaves space for titles and names above few columns
TITLE_SIZE, TEXT_SIZE = 16, 13
BACKGROUND: Color = (255, 255, 255)
CELL: Color = (236, 236, 236)
TEXT: Color = (20, 20, 20)
FAINT: Color = (105, 105, 105)
ALARM: Color = (176, 0, 32)


@dataclass(frozen=True)
class Row:
    """A row of the sheet. `views` are the training views and the validation view, or empty if the image is unreadable."""

    name: str
    details: str
    stored: Pixels | None
    views: tuple[Pixels, ...]
    problem: str


def preview(
    shards: str,
    output: Path,
    *,
    split: str = "train",
    index_dir: str = "",
    label_key: str = "",
    class_file: str = "",
    image_key: str = "",
    samples: int = 8,
    views: int = 6,
    image_size: int = 224,
    seed: int = 0,
    crop: RandomResizedCrop = DataConfig.crop,
    augment: tuple[Augmentation, ...] = DataConfig.augment,
    mix: MixConfig = NO_MIX,
) -> str:
    """Writes the contact sheet, and returns a line that describes it. The arguments are the options of `shards preview`.

    Raises:
        ValueError: There are no such shards, or the output cannot be written, or a number is out of range.
    """
    _check_arguments(output, samples, views, image_size)
    shards = expand_location(shards)
    if is_url(shards):
        raise ValueError(f"{shards}: a preview needs local shards; copy some to a local folder and name that folder")
    config = DataConfig(crop=crop, augment=augment)
    shard_set, check = open_shards(shards, split, index_dir, label_key, class_file, image_key), ImageCheck()
    numbers = choose(shard_set.num_samples, samples, seed)
    rows = [_row(shard_set, number, check, config, views, image_size, seed + number) for number in numbers]
    source = f"{shards}, {split}" if os.path.isdir(shards) else shards
    title = f"{len(rows):,} of {shard_set.num_samples:,} samples of {source}"
    subtitle = f"training: at {image_size} pixels, {_describe(config, mix)}"
    sheet = _draw_sheet(title, subtitle, _mix_columns(rows, mix, views, seed), views, image_size)
    file = io.BytesIO()
    sheet.save(file, FORMATS[output.suffix.lower()])
    replace_bytes(output, file.getvalue())
    unreadable = sum(bool(row.problem) for row in rows)
    see = "; `shards verify` finds all of them" if unreadable else ""
    return (
        f"{output}: {counted(len(rows), 'sample')}, {unreadable} of them unreadable{see}; {sheet.width} x {sheet.height} pixels"
    )


def _check_arguments(output: Path, num_samples: int, num_views: int, image_size: int) -> None:
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"--output {output}: the name must end in {', '.join(FORMATS)}")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}; create it first")
    for (option, (low, high)), value in zip(LIMITS.items(), (num_samples, num_views, image_size), strict=True):
        if not low <= value <= high:
            raise ValueError(f"--{option} {value}: {low} to {high} is the range")


def _describe(config: DataConfig, mix: MixConfig) -> str:
    """Returns the processing of training images in one line."""
    scale, ratio = (f"{low:.3g} to {high:.3g}" for low, high in (config.crop.scale, config.crop.ratio))
    steps = [f"random crops of {scale} of the area, width/height {ratio}", *map(write_augmentation, config.augment)]
    mixes = (("mixup", mix.mixup_alpha), ("cutmix", mix.cutmix_alpha))
    return "; ".join(steps + [f"{name} of each column, alpha {alpha:g}" for name, alpha in mixes if alpha])


def choose(total: int, count: int, seed: int) -> list[int]:
    """Returns `count` ascending numbers below `total`: a random one from each of `count` equal ranges."""
    rng, count = random.Random(seed), min(count, total)
    return [rng.randrange(i * total // count, (i + 1) * total // count) for i in range(count)]


def _row(
    shards: ShardSet, number: int, check: ImageCheck, config: DataConfig, num_views: int, image_size: int, seed: int
) -> Row:
    """Reads the sample with this number, counted over all shards, and makes its views."""
    shard = 0
    while number >= shards.lengths[shard]:
        number -= shards.lengths[shard]
        shard += 1
    tar, samples = Path(shards.tars[shard]), read_index(shards.indices[shard])
    members = samples[number]
    image, _ = require_members(tar, members, shards.images, shards.label_reader.extension, samples)
    with open(tar, "rb") as file:
        label = read_label(file, members, tar, shards.label_reader)
        [verdict] = check([read_member(file, image, tar)])
    name = shards.classes[label] if shards.classes and label < len(shards.classes) else ""
    size = f"{verdict.width} x {verdict.height} {verdict.extension}, " if verdict.extension else ""
    key = image.name.removesuffix(f".{image.extension}")
    details = f"class {label} · {size}{image.size:,} bytes · {key} · {tar.name}"
    if verdict.pixels is None:
        return Row(name, details, None, (), f"cannot be decoded: {verdict.reason}")
    with tempfile.TemporaryDirectory() as folder:
        # The loader reads the samples in an index, so an index can repeat one sample.
        index = Path(folder) / "sample.idx"
        write_index(index, [members] * num_views)
        one = ShardSet((str(tar),), (index,), (num_views,), (shards.sizes[shard],), None, shards.label_reader, shards.images)
        views = _pipeline_views(one, config, "train", label + 1, image_size, seed)
        write_index(index, [members])
        views += _pipeline_views(replace(one, lengths=(1,)), config, "valid", label + 1, image_size, seed)
    return Row(name, details, verdict.pixels, tuple(views), "")


def _pipeline_views(
    shards: ShardSet, config: DataConfig, split: Literal["train", "valid"], num_classes: int, image_size: int, seed: int
) -> list[Pixels]:
    """Returns the images that the loader makes of the samples: uint8 `(image_size, image_size, 3)` each."""
    spec = LoaderSpec(
        split=split,
        batch_size=shards.num_samples,
        image_size=image_size,
        device=torch.device("cpu"),
        num_classes=num_classes,
        num_threads=1,
        seed=seed,
    )
    with build_loader(config, spec, shards=shards) as loader:
        [batch] = loader
    normalized = batch["image"].permute(0, 2, 3, 1).numpy()
    pixels = 255 * (normalized * np.array(STD, np.float32) + np.array(MEAN, np.float32))
    return list(pixels.round().clip(0, 255).astype(np.uint8))


def _mix_columns(rows: list[Row], config: MixConfig, num_views: int, seed: int) -> list[Row]:
    """Mixes each column of training views like a batch. Rows without views are not part of it."""
    drawn = [row for row in rows if row.views]
    if not drawn:
        return rows
    batches = torch.from_numpy(np.array([row.views[:num_views] for row in drawn])).float().permute(1, 0, 4, 2, 3)
    labels = torch.zeros(len(drawn), dtype=torch.int64)  # unused: the sheet shows images
    mixed = [mix_batch(config, batch, labels, num_classes=1, step=step, seed=seed)[0] for step, batch in enumerate(batches)]
    views = iter(torch.stack(mixed, 1).permute(0, 1, 3, 4, 2).round().to(torch.uint8).numpy())
    return [replace(row, views=(*next(views), row.views[num_views])) if row.views else row for row in rows]


def cell_corner(row: int, column: int, num_views: int, cell: int) -> tuple[int, int]:
    """Returns the upper left corner of a cell of the sheet, in pixels.

    Column 0 is the stored image, and the last column is the validation view. Both have a wider gap to the training views.
    """
    apart = GAP * ((column > 0) + (column > num_views))
    return MARGIN + column * (cell + GAP) + apart, HEAD_HEIGHT + row * (CAPTION_HEIGHT + cell + GAP) + CAPTION_HEIGHT


def _draw_sheet(title: str, subtitle: str, rows: list[Row], num_views: int, image_size: int) -> Image.Image:
    """Draws two title lines, the headings, and for each row a caption above its images."""
    zoom = math.ceil(SMALLEST_CELL / image_size)
    cell = zoom * image_size
    right, bottom = (corner + cell for corner in cell_corner(len(rows) - 1, num_views + 1, num_views, cell))
    sheet = Image.new("RGB", (max(right + MARGIN, LEAST_WIDTH), bottom + MARGIN), BACKGROUND)
    _write(sheet, (MARGIN, MARGIN), title, TITLE_SIZE)
    _write(sheet, (MARGIN, MARGIN + 22), subtitle, TEXT_SIZE, FAINT)
    for column, heading in ((0, "as stored"), (1, "training views"), (num_views + 1, "validation")):
        x, _ = cell_corner(0, column, num_views, cell)
        _write(sheet, (x, HEAD_HEIGHT - 18), heading, TEXT_SIZE, FAINT)
    for number, row in enumerate(rows):
        corners = [cell_corner(number, column, num_views, cell) for column in range(num_views + 2)]
        x, y = corners[0]
        end = _write(sheet, (x, y - 22), row.name, TITLE_SIZE, width=sheet.width // 2)
        _write(sheet, (end + 12 if row.name else x, y - 20), row.details, TEXT_SIZE, FAINT)
        if row.stored is None:
            sheet.paste(CELL, (x, y, right, y + cell))
            place = (x + GAP, y + cell // 2 - TEXT_SIZE)
            _write(sheet, place, row.problem, TEXT_SIZE, ALARM, right - x - 2 * GAP)
        else:
            for corner, pixels in zip(corners, (row.stored, *row.views), strict=True):
                _paste(sheet, pixels, corner, image_size, zoom)
    return sheet


def _paste(sheet: Image.Image, pixels: Pixels, corner: tuple[int, int], image_size: int, zoom: int) -> None:
    """Draws an image in the centre of its cell. Images above `image_size` are reduced, smaller ones keep their size."""
    image = Image.fromarray(pixels)
    image.thumbnail((image_size, image_size), Image.Resampling.BICUBIC)
    image = image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)
    cell = Image.new("RGB", (zoom * image_size, zoom * image_size), CELL)
    cell.paste(image, ((cell.width - image.width) // 2, (cell.height - image.height) // 2))
    sheet.paste(cell, corner)


def _write(
    sheet: Image.Image, place: tuple[int, int], text: str, size: int, color: Color = TEXT, width: int | None = None
) -> int:
    """Writes a line of text, and shortens it to `width` pixels or to the margin. Returns the x coordinate of its end."""
    font = ImageFont.load_default(size)
    width = sheet.width - MARGIN - place[0] if width is None else width
    shown = text = _drawable(text)
    while shown and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text}..." if text else ""
    ImageDraw.Draw(sheet).text(place, shown, color, font)
    return place[0] + math.ceil(font.getlength(shown))


def _drawable(text: str) -> str:
    """Returns the text on one line, in letters of Pillow's font: accents are removed, other characters become "?"."""
    letters = (letter for letter in unicodedata.normalize("NFKD", " ".join(text.split())) if not unicodedata.combining(letter))
    return "".join(letter if letter.isascii() or letter == "·" else "?" for letter in letters)
