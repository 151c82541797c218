"""Pictures for TensorBoard: a batch as the network sees it, what it gets wrong, and which classes it takes for which.

All are uint8 arrays of `(height, width, 3)`, RGB: `add_image(name, picture, step, dataformats="HWC")`.
"""

import math
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.loader import MEAN, STD

Pixels = NDArray[np.uint8]
Color = tuple[int, int, int]

# Together they keep a sheet below 2,200 x 1,300 pixels.
MOST_IMAGES, COLUMNS = 32, 8
SMALLEST_CELL, LARGEST_CELL = 128, 256  # pixels; between them images keep their size
GAP, TEXT_SIZE, LINE_HEIGHT, CAPTION_LINES = 8, 13, 17, 2
BACKGROUND: Color = (255, 255, 255)
TEXT: Color = (20, 20, 20)

MOST_CLASSES = 50  # in a confusion picture
SMALLEST_SQUARE, LARGEST_SQUARE, ALL_SQUARES = 20, 64, 640  # pixels
LONGEST_NAME = 150  # pixels
EMPTY: Color = (238, 243, 250)  # a square that holds nothing of its row
FULL: Color = (8, 48, 107)  # and one that holds all of it


def captions(target: Tensor, classes: Sequence[str] | None) -> list[str]:
    """The names of what images show: `cat`, or of mixed images `cat 0.7 / dog 0.3`.

    Args:
        target: `(N,)` int64 class numbers, or `(N, C)` floating probabilities, of which the two largest are named.
        classes: Names, or None, where numbers take their place.
    """
    if target.ndim == 1:
        return [_name(number, classes) for number in target.tolist()]
    shares, numbers = target.float().topk(min(2, target.shape[1]))
    return [_mixed(*pair, classes) for pair in zip(numbers.tolist(), shares.tolist(), strict=True)]


def mistake_captions(target: Tensor, said: Tensor, confidence: Tensor, classes: Sequence[str] | None) -> list[str]:
    """What images show and what they were taken for: `cat, said dog 0.93`.

    Args:
        target: `(N,)` int64 class numbers.
        said: The same of the classes that were given the highest probability.
        confidence: `(N,)` floating, that probability.
        classes: Names, or None, where numbers take their place.
    """
    pairs = zip(captions(target, classes), captions(said, classes), confidence.tolist(), strict=True)
    return [f"{shown}, said {taken_for} {probability:.2f}" for shown, taken_for, probability in pairs]


def _name(number: int, classes: Sequence[str] | None) -> str:
    return classes[number] if classes and number < len(classes) else str(number)


def _mixed(numbers: list[int], shares: list[float], classes: Sequence[str] | None) -> str:
    """Without shares that round to nothing, and without a share where there is one class alone."""
    named = [(_name(number, classes), round(share, 2)) for number, share in zip(numbers, shares, strict=True)]
    shown = [(name, share) for name, share in named if share > 0]
    return shown[0][0] if len(shown) == 1 and shown[0][1] == 1 else " / ".join(f"{name} {share:g}" for name, share in shown)


def batch_picture(images: Tensor, captions: Sequence[str]) -> Pixels:
    """A sheet of the first 32 images, each with its caption below it; for mistakes as well.

    Images below 128 pixels are enlarged by a whole number, those above 256 are made smaller.

    Args:
        images: `(N, 3, H, W)` floating, normalized as loaders do it, on any device. What is not finite is drawn as black.
        captions: N texts; two lines of each are shown.

    Returns:
        The sheet; with no image at all an empty one.
    """
    assert len(images) == len(captions)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    # Of a batch that went wrong a picture is wanted more than of others, so it must not fail over NaN.
    unit = (images[:MOST_IMAGES].detach().float().cpu() * std + mean).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    pixels: Pixels = (255 * unit).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    width, height = _cell_size(images.shape[3], images.shape[2])
    columns = max(1, min(COLUMNS, len(pixels)))
    rows = max(1, -(-len(pixels) // columns))
    step = (width + GAP, height + CAPTION_LINES * LINE_HEIGHT + GAP)
    sheet = Image.new("RGB", (columns * step[0] + GAP, rows * step[1] + GAP), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), _font(TEXT_SIZE)
    for i, image in enumerate(pixels):
        x, y = GAP + i % columns * step[0], GAP + i // columns * step[1]
        resampling = Image.Resampling.NEAREST if width > image.shape[1] else Image.Resampling.BICUBIC
        sheet.paste(Image.fromarray(image).resize((width, height), resampling), (x, y))
        for line, text in enumerate(_two_lines(captions[i], font, width)):
            draw.text((x, y + height + 2 + line * LINE_HEIGHT), text, TEXT, font)
    return np.array(sheet)


def confusion_picture(counts: Tensor, classes: Sequence[str] | None) -> Pixels:
    """How often images of each class (rows) were taken for each class (columns), as a heat map.

    The darker a square, the larger its part of the row. Counts above 0 are drawn where they fit.

    Args:
        counts: `(C, C)` whole numbers of any dtype, C from 1 to 50.
        classes: C names, or None, where numbers take their place.

    Raises:
        ValueError: There are more classes than can be drawn.
    """
    number = len(counts)
    assert counts.shape == (number, number)
    if number > MOST_CLASSES:
        raise ValueError(f"a confusion matrix of {number} classes cannot be drawn; {MOST_CLASSES} can")
    table = counts.detach().cpu().to(torch.int64).numpy()
    side = min(max(ALL_SQUARES // number, SMALLEST_SQUARE), LARGEST_SQUARE)
    font = _font(TEXT_SIZE)
    names = [_cut(_drawable(_name(i, classes)), font, LONGEST_NAME) for i in range(number)]
    margin = math.ceil(max(font.getlength(name) for name in names)) + LINE_HEIGHT + 2 * GAP
    end = margin + number * side
    sheet = Image.new("RGB", (end + GAP, end + GAP), BACKGROUND)
    _draw_squares(ImageDraw.Draw(sheet), table, margin, side)
    _draw_axes(sheet, names, font, margin, side)
    return np.array(sheet)


def _draw_axes(sheet: Image.Image, names: Sequence[str], font: ImageFont.FreeTypeFont, margin: int, side: int) -> None:
    """Titles and names, those of the columns upright, so that they fit over narrow ones too."""
    middle = margin + len(names) * side // 2
    for title, is_truth in (("truth", True), ("predicted", False)):
        word = _word(title, font)
        if is_truth:
            word = word.transpose(Image.Transpose.ROTATE_90)
        sheet.paste(word, (0, middle - word.height // 2) if is_truth else (middle - word.width // 2, 0))
        for i, name in enumerate(names):
            word, centre = _word(name, font), margin + i * side + side // 2
            if is_truth:
                sheet.paste(word, (margin - GAP // 2 - word.width, centre - word.height // 2))
            else:
                word = word.transpose(Image.Transpose.ROTATE_90)
                sheet.paste(word, (centre - word.width // 2, margin - GAP // 2 - word.height))


def _word(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    image = Image.new("RGB", (math.ceil(font.getlength(text)) + 1, LINE_HEIGHT), BACKGROUND)
    ImageDraw.Draw(image).text((0, 0), text, TEXT, font)
    return image


def _draw_squares(draw: ImageDraw.ImageDraw, table: NDArray[np.int64], margin: int, side: int) -> None:
    font = _font(min(TEXT_SIZE, side // 2 + 1))
    # Of a good model nearly all is on the diagonal; the root makes the few per cent beside it visible.
    shades = (table / np.maximum(table.sum(1, keepdims=True), 1)) ** 0.5
    for (row, column), count in np.ndenumerate(table):
        shade = shades[row, column]
        x, y = margin + column * side, margin + row * side
        color = tuple(round(empty + shade * (full - empty)) for empty, full in zip(EMPTY, FULL, strict=True))
        draw.rectangle((x, y, x + side - 2, y + side - 2), color)
        text = str(count)
        if count and font.getlength(text) <= side - 4:
            draw.text((x + side / 2, y + side / 2), text, BACKGROUND if shade > 0.5 else TEXT, font, "mm")


def _cell_size(width: int, height: int) -> tuple[int, int]:
    """In which an image of this size is drawn, pixels."""
    zoom = max(1, math.ceil(SMALLEST_CELL / max(width, height)))
    scale = min(1.0, LARGEST_CELL / max(width, height))
    return max(1, round(zoom * scale * width)), max(1, round(zoom * scale * height))


def _two_lines(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text broken between words, and each line cut off where it is too long."""
    words = _drawable(text).split(" ")
    first = 1
    while first < len(words) and font.getlength(" ".join(words[: first + 1])) <= width:
        first += 1
    return [_cut(" ".join(line), font, width) for line in (words[:first], words[first:]) if line]


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of its beginning as finds room before three dots."""
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), float(width), key=lambda length: font.getlength(f"{text[:length]}..."))
    return f"{text[: max(fitting - 1, 0)]}..."


def _drawable(text: str) -> str:
    """In the letters of Pillow's own font, which has no accents, and on one line; others become question marks."""
    letters = (letter for letter in unicodedata.normalize("NFKD", " ".join(text.split())) if not unicodedata.combining(letter))
    return "".join(letter if letter.isascii() else "?" for letter in letters)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels have FreeType
    return font
