"""Images for TensorBoard: their layout, their size, and their captions."""

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.loader import MEAN, STD
from tools.run.tensorboard_images import EMPTY, FULL, batch_picture, captions, confusion_picture, mistake_captions

CLASSES = ("ant", "bee", "cat")


def batch(pixels: Tensor) -> Tensor:
    """Returns pixels `(N, 3, H, W)`, uint8, as a loader normalizes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).to(memory_format=torch.channels_last)


def noise(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def enlarged(image: Tensor, zoom: int) -> NDArray[np.uint8]:
    """Returns an image `(3, H, W)` as `(zoom * H, zoom * W, 3)`."""
    return image.permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)


def test_captions() -> None:
    assert captions(torch.tensor([2, 0]), CLASSES) == ["cat", "ant"]
    assert captions(torch.tensor([2, 0, 7]), None) == ["2", "0", "7"]
    assert captions(torch.tensor([7]), CLASSES) == ["7"]
    mixed = torch.tensor([[0.3, 0, 0.7], [0, 1, 0], [0.004, 0.996, 0], [0.5, 0.3, 0.2], [0, 0, 0.55]])
    assert captions(mixed, CLASSES) == ["cat 0.7 / ant 0.3", "bee", "bee", "ant 0.5 / bee 0.3", "cat 0.55"]
    assert captions(mixed[:1].half(), None) == ["2 0.7 / 0 0.3"]
    assert captions(torch.ones(1, 1), ["ant"]) == ["ant"]
    said = mistake_captions(torch.tensor([2]), torch.tensor([1]), torch.tensor([0.931], dtype=torch.bfloat16), CLASSES)
    assert said == ["cat, said bee 0.93"]


@pytest.mark.parametrize(("count", "size", "zoom"), [(40, 32, 4), (5, 48, 3), (1, 224, 1)])
def test_a_batch_is_drawn_pixel_by_pixel(count: int, size: int, zoom: int) -> None:
    pixels = noise(count, size)
    sheet = batch_picture(batch(pixels), [""] * count)
    assert sheet.dtype == np.uint8
    cell, columns, rows = zoom * size, min(count, 8), 4 if count > 8 else 1
    assert sheet.shape == (rows * (cell + 34 + 8) + 8, columns * (cell + 8) + 8, 3)
    expected = np.full_like(sheet, 255)
    for i, (row, column) in enumerate(itertools.product(range(rows), range(columns))):
        y, x = 8 + row * (cell + 42), 8 + column * (cell + 8)
        expected[y : y + cell, x : x + cell] = enlarged(pixels[i], zoom)
    np.testing.assert_array_equal(sheet, expected)


def test_large_images_are_made_smaller_and_none_give_an_empty_sheet() -> None:
    pixels = torch.full((32, 3, 150, 300), 200, dtype=torch.uint8)
    sheet = batch_picture(batch(pixels), ["cat"] * 32)
    assert sheet.shape == (4 * (128 + 42) + 8, 8 * (256 + 8) + 8, 3)
    assert (sheet[8 : 8 + 128, 8 : 8 + 256] == 200).all()
    assert (batch_picture(torch.zeros(0, 3, 32, 32), []) == 255).all()


def test_an_image_that_is_no_number_is_black() -> None:
    images = batch(noise(2, 32)).half()
    images[0] = torch.nan
    images[1, :, 0, 0] = torch.inf
    sheet = batch_picture(images, ["a", "b"])
    assert (sheet[8 : 8 + 128, 8 : 8 + 128] == 0).all()
    assert (sheet[8:12, 144:148] == 0).all()
    assert sheet[12 : 8 + 128, 148 : 144 + 128].mean() > 100


def ink(sheet: NDArray[np.uint8], column: int) -> tuple[bool, bool]:
    """Returns whether each of the two lines below an image of 128 pixels in the first row has text."""
    x = 8 + 136 * column
    text = sheet[136 : 136 + 34, x - 4 : x + 132].min(2) < 128
    assert not text[:, 132:].any(), "it reaches into the next column"
    return bool(text[2:19].any()), bool(text[19:].any())


def test_captions_stand_below_their_image_in_up_to_two_lines() -> None:
    texts = ["", "cat", "cat 0.7 / wire-haired fox terrier 0.3", "x" * 500, "a b " * 100]
    sheet = batch_picture(batch(noise(5, 32)), texts)
    assert [ink(sheet, i) for i in range(5)] == [(False, False), (True, False), (True, True), (True, False), (True, True)]
    for unusual, drawn in (("größe", "gro?e"), ("José\n日本", "Jose ??")):
        first, second = (batch_picture(batch(noise(1, 32)), [text]) for text in (unusual, drawn))
        np.testing.assert_array_equal(first, second)


def square(picture: NDArray[np.uint8], row: int, column: int, number: int, side: int) -> NDArray[np.uint8]:
    """Returns the pixels of a square of a confusion picture, whose squares end 8 pixels before the edge."""
    y, x = (picture.shape[0] - 8 - (number - i) * side for i in (row, column))
    return picture[y : y + side - 1, x : x + side - 1]


def test_confusion_is_shaded_by_rows() -> None:
    counts = torch.tensor([[90, 10, 0], [0, 5, 0], [0, 0, 0]])
    picture = confusion_picture(counts, CLASSES)
    assert picture.dtype == np.uint8
    corners = np.array([[square(picture, row, column, 3, 64)[0, 0] for column in range(3)] for row in range(3)])
    assert corners[1, 1].tolist() == list(FULL)
    for row, column in ((0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)):
        assert (square(picture, row, column, 3, 64) == EMPTY).all(), "neither colour nor count"
    for column, share in ((0, 0.9), (1, 0.1)):
        expected = np.array(EMPTY) + share**0.5 * (np.array(FULL) - EMPTY)
        np.testing.assert_allclose(corners[0, column], expected, atol=0.51)
    for row, column in ((0, 0), (0, 1), (1, 1)):
        inner = square(picture, row, column, 3, 64)
        written = (inner != inner[0, 0]).any(2)
        assert 20 < written.sum() < 500
        assert not written[:16].any()
        assert not written[-16:].any()


def test_counts_are_left_out_where_they_do_not_fit() -> None:
    small, large = (confusion_picture(torch.full((50, 50), count, dtype=torch.int32), None) for count in (7, 1234567))
    assert all((square(small, i, i, 50, 20) != square(small, i, i, 50, 20)[0, 0]).any() for i in range(50))
    assert all((square(large, i, j, 50, 20) == square(large, 0, 0, 50, 20)[0, 0]).all() for i in range(50) for j in range(50))


@pytest.mark.parametrize("number", [1, 2, 17, 50])
@pytest.mark.parametrize("named", ["none", "long", "unusual"])
def test_every_class_has_its_square_and_its_name_on_both_axes(number: int, named: str) -> None:
    classes = {"none": None, "long": ["long " * 50] * number, "unusual": ["größe\n日本"] * number}[named]
    picture = confusion_picture(torch.eye(number), classes)
    side = min(max(640 // number, 20), 64)
    margin = len(picture) - 8 - number * side
    assert picture.shape == (len(picture), len(picture), 3)
    assert len(picture) <= 1200
    diagonal = [square(picture, i, i, number, side)[0, 0].tolist() for i in range(number)]
    assert diagonal == [list(FULL)] * number
    dark = picture.min(2) < 128
    for i in range(number):
        place = slice(margin + i * side, margin + (i + 1) * side)
        assert dark[place, 17:margin].any(), "truth"
        assert dark[17:margin, place].any(), "predicted"
    assert dark[margin:, :17].any(), "the title of the rows"
    assert dark[:17, margin:].any(), "the title of the columns"
    assert not dark[:margin, :margin].any()
