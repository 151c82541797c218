"""The pictures of the embedded demo: ten kinds of figures on cluttered backgrounds, drawn from a seed.

They stand in for photographs if there is no data set and no internet connection. Position, scale, rotation, colour, texture,
light, background, clutter, blur, noise, image size, JPEG quality and colour mode vary. Colours are independent of the class, so
a model must recognize shapes and patterns.
"""

import io
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Figure = Callable[[Floats, Floats], tuple[Mask, Mask]]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in Pillow's gray conversion


# A figure is a function of coordinates, and lies within their unit circle. It returns the mask of the figure and the
# mask of its second colour.


def _checkerboard(x: Floats, y: Floats) -> tuple[Mask, Mask]:
    return np.maximum(abs(x), abs(y)) < 0.8, (np.floor(x * 1.9) + np.floor(y * 1.9)) % 2 == 0


def _crescent(x: Floats, y: Floats) -> tuple[Mask, Mask]:
    return (np.hypot(x, y) < 1) & (np.hypot(x - 0.45, y) > 0.75), np.hypot(x, y) > 0.86


def _die(x: Floats, y: Floats) -> tuple[Mask, Mask]:
    pips = [(-0.45, -0.45), (0.45, -0.45), (0, 0), (-0.45, 0.45), (0.45, 0.45)]
    ink = np.any([np.hypot(x - px, y - py) < 0.17 for px, py in pips], axis=0)
    return np.maximum(abs(x), abs(y)) < 0.8, ink


def _flower(x: Floats, y: Floats) -> tuple[Mask, Mask]:
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    return radius < 0.68 + 0.32 * np.cos(6 * angle), radius < 0.28


def _lattice(x: Floats, y: Floats) -> tuple[Mask, Mask]:
    bars = (abs(x * 2 - np.round(x * 2)) < 0.2) | (abs(y * 2 - np.round(y * 2)) < 0.2)
    return bars & (np.maximum(abs(x), abs(y)) < 0.85), np.zeros_like(x, bool)


def _spiral(x: Floats, y: Floats) -> tuple[Mask, Mask]:
    radius, turns = np.hypot(x, y), np.arctan2(y, x) / (2 * math.pi)
    return radius < 1, (1.7 * radius - turns) % 1 < 0.5


def _star(x: Floats, y: Floats) -> tuple[Mask, Mask]:
    # In each of ten mirrored sectors, the edge is a straight line from the tip (radius 1) to the notch (radius 0.4).
    sector = abs((np.arctan2(x, -y) / (2 * math.pi / 5) + 0.5) % 1 - 0.5) * (2 * math.pi / 5)
    along, across = np.hypot(x, y) * np.cos(sector), np.hypot(x, y) * np.sin(sector)
    notch_along, notch_across = 0.4 * math.cos(math.pi / 5), 0.4 * math.sin(math.pi / 5)
    return across < (1 - along) * notch_across / (1 - notch_along), np.zeros_like(x, bool)


def _stripes(x: Floats, y: Floats) -> tuple[Mask, Mask]:
    return (abs(x) < 0.9) & (abs(y) < 0.7), np.floor(y / 0.28) % 2 == 0


def _target(x: Floats, y: Floats) -> tuple[Mask, Mask]:
    return np.hypot(x, y) < 1, np.floor(np.hypot(x, y) * 3) % 2 == 0


def _wheel(x: Floats, y: Floats) -> tuple[Mask, Mask]:
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    spokes = radius * abs(np.sin(4 * angle)) < 0.22
    return (radius < 1) & ((radius > 0.78) | (radius < 0.2) | spokes), radius < 0.2


FIGURES: dict[str, Figure] = {
    figure.__name__.removeprefix("_"): figure
    for figure in (_checkerboard, _crescent, _die, _flower, _lattice, _spiral, _star, _stripes, _target, _wheel)
}


def draw_jpeg(
    figure: str,
    rng: np.random.Generator,
    size: tuple[int, int] | None = None,
    noise: float | None = None,
    quality: int | None = None,
) -> bytes:
    """Draws a picture of the figure, in RGB or (one in eight) gray, and returns the bytes of a JPEG file.

    Args:
        figure: A key of `FIGURES`.
        rng: Source of all variation.
        size: Width and height in pixels, by default random from 72 to 200.
        noise: Standard deviation on the scale of 0 to 255, by default random from 1 to 12.
        quality: JPEG quality, by default random from 40 to 95.
    """
    width, height = size or (int(side) for side in rng.integers(72, 201, 2))
    back, first, second = _colours(rng)
    pixels = _surface(rng, width, height, back)
    opacity = _clutter(rng, width, height)[..., None]
    pixels += (rng.uniform(0, 255, 3).astype(np.float32) - pixels) * opacity
    inside, ink = FIGURES[figure](*_coordinates(rng, width, height))
    pixels[inside] = _surface(rng, width, height, first)[inside]
    pixels[inside & ink] = _surface(rng, width, height, second)[inside & ink]
    pixels += rng.normal(0, noise or rng.uniform(1, 12), pixels.shape)

    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.1)))
    if rng.random() < 1 / 8:
        image = image.convert("L")
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality or int(rng.integers(40, 96)))
    return encoded.getvalue()


def _coordinates(rng: np.random.Generator, width: int, height: int) -> tuple[Floats, Floats]:
    """Returns x and y of each pixel, `(height, width)` each, in the coordinates of a randomly placed figure."""
    short = min(width, height)
    radius = short * rng.uniform(0.32, 0.46)
    slack = short * 0.47 - radius  # the figure stays within the centre square that validation crops
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x -= width / 2 + rng.uniform(-slack, slack)
    y -= height / 2 + rng.uniform(-slack, slack)
    angle = rng.uniform(-math.pi, math.pi)
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    return cos * x + sin * y, cos * y - sin * x


def _colours(rng: np.random.Generator) -> list[Floats]:
    """Returns a background colour and the two colours of the figure, which have random hues and distinct brightness.

    The figure is always lighter than the background: otherwise a network needs several times as many training steps.
    """
    colours = []
    for darkest, lightest in ((20, 80), (150, 230), (70, 130)):
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        colours.append(colour + (rng.uniform(darkest, lightest) - colour @ LUMA))
    return colours


def _smooth_noise(rng: np.random.Generator, width: int, height: int, cells: int) -> Floats:
    """Returns cloud-like noise in [-1, 1], `(height, width)`: an enlarged coarse random grid."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))


def _surface(rng: np.random.Generator, width: int, height: int, colour: Floats) -> Floats:
    """Returns a textured, unevenly lit surface of about one colour: `(height, width, 3)`, values about 0-255."""
    grain = _smooth_noise(rng, width, height, int(rng.integers(8, 24))) * rng.uniform(0, 16)
    light = _smooth_noise(rng, width, height, int(rng.integers(1, 5))) * rng.uniform(0, 35)
    return colour + (grain + light)[..., None]


def _clutter(rng: np.random.Generator, width: int, height: int) -> Floats:
    """Returns the opacity of lines and blots that are unrelated to the class: `(height, width)` in [0, 1]."""
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for _ in range(rng.integers(0, 7)):
        (x0, x1), (y0, y1) = rng.uniform(0, width, 2), rng.uniform(0, height, 2)
        draw.line((x0, y0, x1, y1), fill=int(rng.integers(80, 256)), width=int(rng.integers(1, 5)))
    for _ in range(rng.integers(0, 7)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(1, min(width, height) / 12)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=int(rng.integers(80, 256)))
    return np.asarray(mask, np.float32) / np.float32(255)
