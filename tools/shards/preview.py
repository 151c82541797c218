"""`shards preview`: a contact sheet of samples as stored, and as training and validation show them to the model."""

import math
import os
import random
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.augment import Augmentation, RandomResizedCrop
from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.loader import MEAN, STD
from pipelines.mix import MixConfig, mix
from pipelines.notation import write_augmentation
from pipelines.remote.object_store import is_url
from pipelines.shards.index import Sample, read_index, write_index
from pipelines.shards.labels import LabelReader
from pipelines.shards.shard_set import IMAGE_EXTENSIONS, ShardSet, find_component, open_shards, read_label
from tools.shards.check import ImageCheck, Verdict

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
# What keeps a sheet within memory, and within what viewers and JPEG can hold.
LIMITS = {"samples": (1, 100), "views": (1, 24), "image-size": (32, 1024)}

Pixels = NDArray[np.uint8]
Color = tuple[int, int, int]

NO_MIX = MixConfig()
SMALLEST_CELL = 96  # pixels; smaller images are enlarged by a whole number
GAP, MARGIN = 8, 16
HEAD_HEIGHT, CAPTION_HEIGHT = 80, 28
LEAST_WIDTH = 640  # so that titles and names find room over few columns
TITLE_SIZE, TEXT_SIZE = 16, 13
BACKGROUND: Color = (255, 255, 255)
CELL: Color = (236, 236, 236)
TEXT: Color = (20, 20, 20)
FAINT: Color = (105, 105, 105)
ALARM: Color = (176, 0, 32)


@dataclass(frozen=True)
class StoredSample:
    """One sample of a shard: its members, their bytes, and what the decoder makes of the image."""

    tar: Path
    members: Sample
    label: int
    num_bytes: int
    key: str
    verdict: Verdict


@dataclass(frozen=True)
class Row:
    """One row of the sheet; `views` are the training views and then validation's, none where the image is unreadable."""

    name: str
    details: str
    stored: Pixels | None
    views: tuple[Pixels, ...]
    problem: str


def preview(
    pattern: str,
    output: Path,
    *,
    split: str = "train",
    index_dir: str = "",
    label_key: str = "",
    class_file: str = "",
    num_samples: int = 8,
    num_views: int = 6,
    image_size: int = 224,
    seed: int = 0,
    crop: RandomResizedCrop = DataConfig.crop,
    augmentations: tuple[Augmentation, ...] = DataConfig.augment,
    mix_config: MixConfig = NO_MIX,
) -> str:
    """Writes the contact sheet; gives a line that says what it shows.

    Args:
        pattern: Shards, as for `open_shards`.
        output: A `.png` or `.jpg` in a folder that is there; replaced where there is one.
        split: Which, where the pattern is a folder with several.
        index_dir: The same.
        label_key: The same.
        class_file: The same.
        num_samples: Rows; fewer where there are fewer samples.
        num_views: Random training views of each sample.
        image_size: Side of the images, pixels.
        seed: Of the choice of samples and of the augmentation.
        crop: See `DataConfig`.
        augmentations: See `DataConfig.augment`.
        mix_config: Each column of training views is taken for a batch and mixed.

    Raises:
        ValueError: There are no such shards, or the picture cannot be called that, or a number is out of range.
    """
    _check_arguments(output, num_samples, num_views, image_size)
    config = DataConfig(crop=crop, augment=augmentations)
    if is_url(pattern):
        raise ValueError(f"{pattern}: a preview reads samples here and there; copy some shards to a local folder and name that")
    shards = open_shards(pattern, split, index_dir, label_key, class_file)
    check = ImageCheck()
    rows = []
    for number in choose(shards.num_samples, num_samples, seed):
        sample = read_sample(shards, number, check)
        rows.append(_row(sample, shards.label_reader, config, num_views, image_size, seed + number))
    source = f"{pattern}, {split}" if os.path.isdir(pattern) else pattern
    title = f"{len(rows):,} of {shards.num_samples:,} samples of {source}"
    subtitle = f"training: at {image_size} pixels, {describe(config, mix_config)}"
    sheet = draw_sheet(title, subtitle, mix_columns(rows, mix_config, num_views, seed), num_views, image_size)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        sheet.save(temporary, FORMATS[output.suffix.lower()])
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    unreadable = sum(bool(row.problem) for row in rows)
    return f"{output}: {len(rows)} samples, {unreadable} of them unreadable; {sheet.width} x {sheet.height} pixels"


def _check_arguments(output: Path, num_samples: int, num_views: int, image_size: int) -> None:
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"--output {output}: the name has to end in {', '.join(FORMATS)}")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}; make it first")
    for (option, (low, high)), value in zip(LIMITS.items(), (num_samples, num_views, image_size), strict=True):
        if not low <= value <= high:
            raise ValueError(f"--{option} {value}: from {low} to {high} are possible")


def describe(config: DataConfig, mix_config: MixConfig) -> str:
    """What happens to training images, in one line."""
    scale, ratio = (f"{low:.3g} to {high:.3g}" for low, high in (config.crop.scale, config.crop.ratio))
    steps = [f"random crops of {scale} of the area, width/height {ratio}", *map(write_augmentation, config.augment)]
    mixes = (("mixup", mix_config.mixup_alpha), ("cutmix", mix_config.cutmix_alpha))
    return "; ".join(steps + [f"{name} of each column, alpha {alpha:g}" for name, alpha in mixes if alpha])


def choose(total: int, count: int, seed: int) -> list[int]:
    """`count` numbers below `total`, ascending: one at random from each of `count` equal stretches."""
    rng, count = random.Random(seed), min(count, total)
    return [rng.randrange(i * total // count, (i + 1) * total // count) for i in range(count)]


def read_sample(shards: ShardSet, number: int, check: ImageCheck) -> StoredSample:
    """The sample of that number, in the order of the shards.

    Raises:
        ValueError: It has no image or no label; says which sample.
    """
    shard = 0
    while number >= shards.lengths[shard]:
        number -= shards.lengths[shard]
        shard += 1
    tar, members = Path(shards.tars[shard]), read_index(shards.indices[shard])[number]
    image = find_component(members, IMAGE_EXTENSIONS, tar)
    with open(tar, "rb") as file:
        class_number = read_label(file, members, tar, shards.label_reader)
        file.seek(image.offset)
        [verdict] = check([file.read(image.size)])
    return StoredSample(Path(tar), members, class_number, image.size, image.name.removesuffix(f".{image.extension}"), verdict)


def _row(sample: StoredSample, labels: LabelReader, config: DataConfig, num_views: int, image_size: int, seed: int) -> Row:
    classes = labels.classes
    name = classes[sample.label] if classes and sample.label < len(classes) else ""
    verdict = sample.verdict
    size = f"{verdict.width} x {verdict.height} {verdict.extension}, " if verdict.extension else ""
    details = f"class {sample.label} · {size}{sample.num_bytes:,} bytes · {sample.key} · {sample.tar.name}"
    if verdict.pixels is None:
        return Row(name, details, None, (), f"cannot be decoded: {verdict.reason}")
    views = [
        *pipeline_views(sample, labels, config, "train", num_views, image_size, seed),
        *pipeline_views(sample, labels, config, "valid", 1, image_size, seed),
    ]
    return Row(name, details, verdict.pixels, tuple(views), "")


def pipeline_views(
    sample: StoredSample,
    labels: LabelReader,
    config: DataConfig,
    split: Literal["train", "valid"],
    count: int,
    image_size: int,
    seed: int,
) -> Iterator[Pixels]:
    """What the loader of a split makes of one sample, `count` times: uint8 `(image_size, image_size, 3)` each."""
    with tempfile.TemporaryDirectory() as folder:
        # For the reader a shard is what its index lists: one sample, as often as it is to be seen.
        index = Path(folder) / "sample.idx"
        write_index(index, [sample.members] * count)
        loader = build_loader(
            config,
            split,
            shards=ShardSet((str(sample.tar),), (index,), (count,), (sample.tar.stat().st_size,), None, labels),
            batch_size=count,
            image_size=image_size,
            device=torch.device("cpu"),
            num_classes=sample.label + 1,
            num_threads=1,
            seed=seed,
        )
        with loader:
            [batch] = loader
    normalized = batch["image"].permute(0, 2, 3, 1).numpy()
    pixels = 255 * (normalized * np.array(STD, np.float32) + np.array(MEAN, np.float32))
    yield from pixels.round().clip(0, 255).astype(np.uint8)


def mix_columns(rows: list[Row], config: MixConfig, num_views: int, seed: int) -> list[Row]:
    """The rows with each column of training views mixed like a batch; rows without views are not in it."""
    drawn = [row for row in rows if row.views]
    if not drawn:
        return rows
    batches = torch.from_numpy(np.array([row.views[:num_views] for row in drawn])).float().permute(1, 0, 4, 2, 3)
    labels = torch.zeros(len(drawn), dtype=torch.int64)  # of no interest: the sheet shows images
    mixed = [mix(config, batch, labels, num_classes=1, step=step, seed=seed)[0] for step, batch in enumerate(batches)]
    views = iter(torch.stack(mixed, 1).permute(0, 1, 3, 4, 2).round().to(torch.uint8).numpy())
    return [replace(row, views=(*next(views), row.views[num_views])) if row.views else row for row in rows]


def cell_corner(row: int, column: int, num_views: int, cell: int) -> tuple[int, int]:
    """The upper left corner of a cell of the sheet; column 0 is the stored image, the last one validation.

    Both stand a little apart from the training views between them.
    """
    apart = GAP * ((column > 0) + (column > num_views))
    return MARGIN + column * (cell + GAP) + apart, HEAD_HEIGHT + row * (CAPTION_HEIGHT + cell + GAP) + CAPTION_HEIGHT


def draw_sheet(title: str, subtitle: str, rows: list[Row], num_views: int, image_size: int) -> Image.Image:
    """The picture: a title of two lines, headings, and for each row a line of text above its images."""
    zoom = math.ceil(SMALLEST_CELL / image_size)
    cell = zoom * image_size
    right, bottom = (corner + cell for corner in cell_corner(len(rows) - 1, num_views + 1, num_views, cell))
    sheet = Image.new("RGB", (max(right + MARGIN, LEAST_WIDTH), bottom + MARGIN), BACKGROUND)
    text = _TextWriter(sheet)
    text.write((MARGIN, MARGIN), title, TITLE_SIZE)
    text.write((MARGIN, MARGIN + 22), subtitle, TEXT_SIZE, FAINT)
    for column, heading in ((0, "as stored"), (1, "training views"), (num_views + 1, "validation")):
        x, _ = cell_corner(0, column, num_views, cell)
        text.write((x, HEAD_HEIGHT - 18), heading, TEXT_SIZE, FAINT)
    for number, row in enumerate(rows):
        corners = [cell_corner(number, column, num_views, cell) for column in range(num_views + 2)]
        x, y = corners[0]
        end = text.write((x, y - 22), row.name, TITLE_SIZE, width=sheet.width // 2)
        text.write((end + 12 if row.name else x, y - 20), row.details, TEXT_SIZE, FAINT)
        if row.stored is None:
            sheet.paste(CELL, (x, y, right, y + cell))
            text.write((x + GAP, y + cell // 2 - TEXT_SIZE), row.problem, TEXT_SIZE, ALARM, right - x - 2 * GAP)
        else:
            for corner, pixels in zip(corners, (row.stored, *row.views), strict=True):
                _paste(sheet, pixels, corner, image_size, zoom)
    return sheet


def _paste(sheet: Image.Image, pixels: Pixels, corner: tuple[int, int], image_size: int, zoom: int) -> None:
    """Into the middle of the cell: what is larger than the network's images is made smaller, what is small looks it."""
    image = Image.fromarray(pixels)
    image.thumbnail((image_size, image_size), Image.Resampling.BICUBIC)
    image = image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)
    cell = Image.new("RGB", (zoom * image_size, zoom * image_size), CELL)
    cell.paste(image, ((cell.width - image.width) // 2, (cell.height - image.height) // 2))
    sheet.paste(cell, corner)


class _TextWriter:
    """Lines of text on the sheet, cut off with dots where they would leave it."""

    def __init__(self, sheet: Image.Image) -> None:
        self._draw = ImageDraw.Draw(sheet)
        self._right = sheet.width - MARGIN

    def write(self, place: tuple[int, int], text: str, size: int, color: Color = TEXT, width: int | None = None) -> int:
        """Writes at `place`, within `width` or else as far as the margin; gives the x at which the text ends."""
        font = ImageFont.load_default(size)
        width = self._right - place[0] if width is None else width
        shown = text = _drawable(text)
        while shown and font.getlength(shown) > width:
            text = text[:-1]
            shown = f"{text}..." if text else ""
        self._draw.text(place, shown, color, font)
        return place[0] + math.ceil(font.getlength(shown))


def _drawable(text: str) -> str:
    """In the letters of Pillow's own font, which has no accents, and on one line; others become question marks."""
    letters = (letter for letter in unicodedata.normalize("NFKD", " ".join(text.split())) if not unicodedata.combining(letter))
    return "".join(letter if letter.isascii() or letter == "·" else "?" for letter in letters)
