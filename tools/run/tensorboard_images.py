"""Images for TensorBoard: a training batch, the worst mistakes, and the confusion matrix.

All are RGB uint8 arrays `(height, width, 3)`, for `add_image(name, picture, step, dataformats="HWC")`.
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

# These keep a sheet below 2,200 x 1,300 pixels.
MOST_IMAGES, COLUMNS = 32, 8
SMALLEST_CELL, LARGEST_CELL = 128, 256  # pixels; images between these sizes are not scaled
GAP, TEXT_SIZE, LINE_HEIGHT, CAPTION_LINES = 8, 13, 17, 2
BACKGROUND: Color = (255, 255, 255)
TEXT: Color = (20, 20, 20)

MOST_CLASSES = 50  # in a confusion matrix
SMALLEST_SQUARE, LARGEST_SQUARE, ALL_SQUARES = 20, 64, 640  # pixels
LONGEST_NAME = 150  # pixels
EMPTY: Color = (238, 243, 250)  # a cell without samples
FULL: Color = (8, 48, 107)  # a cell with all samples of its row


def captions(target: Tensor, classes: Sequence[str] | None) -> list[str]:
    """Returns the class names of images: `cat`, or `cat 0.7 / dog 0.3` for a mixed image.

    Args:
        target: `(N,)` int64 class numbers, or `(N, C)` floating probabilities. The two largest are named.
        classes: Class names, or `None` to show numbers.
    """
    if target.ndim == 1:
        return [_name(number, classes) for number in target.tolist()]
    shares, numbers = target.float().topk(min(2, target.shape[1]))
    return [_mixed(*pair, classes) for pair in zip(numbers.tolist(), shares.tolist(), strict=True)]


def mistake_captions(target: Tensor, said: Tensor, confidence: Tensor, classes: Sequence[str] | None) -> list[str]:
    """Returns the true and the predicted classes of images: `cat, said dog 0.93`.

    Args:
        target: `(N,)` int64 true class numbers.
        said: `(N,)` int64 predicted class numbers.
        confidence: `(N,)` floating probabilities of the predictions.
        classes: Class names, or `None` to show numbers.
    """
    pairs = zip(captions(target, classes), captions(said, classes), confidence.tolist(), strict=True)
    return [f"{shown}, said {taken_for} {probability:.2f}" for shown, taken_for, probability in pairs]


def _name(number: int, classes: Sequence[str] | None) -> str:
    return classes[number] if classes and number < len(classes) else str(number)


def _mixed(numbers: list[int], shares: list[float], classes: Sequence[str] | None) -> str:
    """Formats a mixed target. Shares that round to zero are omitted, as is the share of a single class."""
    named = [(_name(number, classes), round(share, 2)) for number, share in zip(numbers, shares, strict=True)]
    shown = [(name, share) for name, share in named if share > 0]
    return shown[0][0] if len(shown) == 1 and shown[0][1] == 1 else " / ".join(f"{name} {share:g}" for name, share in shown)


def batch_picture(images: Tensor, captions: Sequence[str]) -> Pixels:
    """Draws a sheet of the first 32 images with captions below.

    Images below 128 pixels are enlarged by an integer factor, and images above 256 pixels are reduced.

    Args:
        images: `(N, 3, H, W)` floating, normalized as the loaders do, on any device. Non-finite values are drawn black.
        captions: N texts. Two lines of each are shown.

    Returns:
        The sheet. It is empty if there are no images.
    """
    assert len(images) == len(captions)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    # A batch that went wrong is the most interesting one, so NaN must not stop the drawing.
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
    """Draws a confusion matrix as a heat map: true classes as rows, predictions as columns.

    A darker cell holds a larger share of its row. Counts above 0 are printed where they fit.

    Args:
        counts: `(C, C)` whole numbers of any dtype, C from 1 to 50.
        classes: C names, or `None` to show numbers.
    """
    number = len(counts)
    assert counts.shape == (number, number)
    assert number <= MOST_CLASSES
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
    """Draws titles and names. Column names are vertical, so they fit above narrow columns."""
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
    # A good model has almost all counts on the diagonal. The square root makes the few per cent beside it visible.
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
    """Returns the size at which an image is drawn, in pixels."""
    zoom = max(1, math.ceil(SMALLEST_CELL / max(width, height)))
    scale = min(1.0, LARGEST_CELL / max(width, height))
    return max(1, round(zoom * scale * width)), max(1, round(zoom * scale * height))


def _two_lines(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks a text into two lines between words, and cuts lines that are too long."""
    words = _drawable(text).split(" ")
    first = 1
    while first < len(words) and font.getlength(" ".join(words[: first + 1])) <= width:
        first += 1
    return [_cut(" ".join(line), font, width) for line in (words[:first], words[first:]) if line]


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Returns the text, shortened with three dots if it is too long."""
    if font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), float(width), key=lambda length: font.getlength(f"{text[:length]}..."))
    return f"{text[: max(fitting - 1, 0)]}..."


def _drawable(text: str) -> str:
    """Returns the text on one line in ASCII, which Pillow's font has. Accents are dropped, and other letters become `?`."""
    letters = (letter for letter in unicodedata.normalize("NFKD", " ".join(text.split())) if not unicodedata.combining(letter))
    return "".join(letter if letter.isascii() else "?" for letter in letters)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels include FreeType
    return font
