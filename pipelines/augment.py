"""The settings of `--data.crop` and `--data.augment`. Each augmentation also builds its piece of the DALI graph.

DALI is imported where a piece is built, so that the settings can be read without it.
"""

import contextlib
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.loader import MEAN

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

MEAN_COLOR = [round(255 * value) for value in MEAN]
GRAY = 128  # fills the corners of moved images: DALI's warping operators take one value for all channels


@dataclass(frozen=True)
class RandomResizedCrop:
    """The random crop of each training image: "Going Deeper with Convolutions", section 6."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of the crop, as a fraction of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width/height of the crop."""

    def __post_init__(self) -> None:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high < math.inf:
                raise ValueError(f"crop.{name} {low} {high}: two finite numbers above 0 are needed, the smaller first")
        if self.scale[1] > 1:
            raise ValueError(f"crop.scale {self.scale[0]} {self.scale[1]}: a crop cannot be larger than the image, 1.0")


AUGMENTATIONS: dict[str, type["Augmentation"]] = {}  # by name


@dataclass(frozen=True)
class Augmentation(ABC):
    """A step of `--data.augment`. Each subclass defines one: its name follows from the class, its parameters are the fields.

    `__call__` runs while the graph is built. It takes and returns uint8 HWC RGB images, square and of one size, on CPU or GPU.
    Draw with `uniform`, `fn.random.uniform` or `fn.random.coin_flip`, outside of any `if` on a graph node. Inside, a sample's
    draw would depend on how many of its neighbors take the branch. Fields have defaults, and are int, float, str or pairs of
    these.
    """

    name: str = field(init=False, default="")  # a field, so that config.json names each entry of the list

    def __init_subclass__(cls) -> None:
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
        AUGMENTATIONS[cls.name] = cls

    @abstractmethod
    def __call__(self, images: "DataNode") -> "DataNode": ...

    def require(self, parameter: str, low: float, high: float) -> None:
        """Raises ValueError unless a parameter, or each number of a pair, lies in `low` to `high`, and a pair is in order."""
        value = getattr(self, parameter)
        numbers = value if isinstance(value, tuple) else (value,)
        shown = "..".join(str(number) for number in numbers)
        if not all(low <= number <= high for number in numbers):
            raise ValueError(f"{self.name}: {parameter} {shown}: from {low:g} to {high:g} is possible")
        if list(numbers) != sorted(numbers):
            raise ValueError(f"{self.name}: {parameter} {shown}: the smaller number comes first")


def uniform(low: float, high: float) -> "DataNode":
    """Draws a number from `low` to `high` per sample. Unlike in `fn.random.uniform`, the two may be equal."""
    from nvidia.dali import fn

    return low + (high - low) * fn.random.uniform(range=[0, 1])


@dataclass(frozen=True)
class HorizontalFlip(Augmentation):
    """Mirrors left and right. The first one in the list happens during normalization, where it costs nothing."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        self.require("probability", 0, 1)

    def draw(self) -> "DataNode":
        """Draws, for each sample, 1 to flip it or 0 to leave it."""
        from nvidia.dali import fn

        return fn.random.coin_flip(probability=self.probability)

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali import fn

        return fn.flip(images, horizontal=self.draw())


@dataclass(frozen=True)
class VerticalFlip(Augmentation):
    """Mirrors top and bottom."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        self.require("probability", 0, 1)

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali import fn

        return fn.flip(images, horizontal=0, vertical=fn.random.coin_flip(probability=self.probability))


@dataclass(frozen=True)
class Rotate(Augmentation):
    """Rotates about the center by an angle from -degrees to degrees. The corners become gray."""

    degrees: float = 15.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        self.require("degrees", 0, 180)
        self.require("probability", 0, 1)

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali import fn, types

        angle = uniform(-self.degrees, self.degrees)
        # By far the most expensive augmentation, so it runs only where it applies.
        if fn.random.coin_flip(probability=self.probability, dtype=types.BOOL):
            images = fn.rotate(images, angle=angle, keep_size=True, fill_value=GRAY)
        return images


@dataclass(frozen=True)
class ColorJitter(Augmentation):
    """Draws factors for brightness, contrast and saturation from max(0, 1 - x) to 1 + x, and turns the hue by -x to x.

    The ranges are torchvision's; hue is a fraction of the color circle. All four happen in one pass over the pixels, in a fixed
    order, with contrast about middle gray. torchvision draws the order, and takes contrast about the image's mean.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for parameter in ("brightness", "contrast", "saturation"):
            self.require(parameter, 0, 10)
        self.require("hue", 0, 0.5)
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise ValueError(f"{self.name}: all parameters are 0; say what to vary, as in {self.name}:brightness=0.4,hue=0.1")

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali import fn

        brightness, contrast, saturation = (
            uniform(max(0.0, 1 - value), 1 + value) for value in (self.brightness, self.contrast, self.saturation)
        )
        hue = uniform(-360 * self.hue, 360 * self.hue)  # degrees
        return fn.color_twist(images, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)


@dataclass(frozen=True)
class RandomErasing(Augmentation):
    """Fills a rectangle with the mean color: arXiv 1708.04896."""

    probability: float = 0.5
    area: tuple[float, float] = (0.02, 0.33)
    """Area of the rectangle, as a fraction of the image's area."""
    ratio: tuple[float, float] = (0.3, 3.3)
    """Height/width of the rectangle, drawn on a logarithmic scale."""

    def __post_init__(self) -> None:
        self.require("probability", 0, 1)
        self.require("area", 1e-6, 1)
        self.require("ratio", 1e-3, 1e3)

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali import fn
        from nvidia.dali import math as dali_math

        area = uniform(*self.area)
        log_ratio = uniform(*(math.log(limit) for limit in self.ratio))
        # Keeps both sides within the image: their squares are area * ratio and area / ratio.
        log_ratio = dali_math.clamp(log_ratio, dali_math.log(area), -dali_math.log(area))
        ratio = dali_math.exp(log_ratio)
        height_width = fn.stack(dali_math.sqrt(area * ratio), dali_math.sqrt(area / ratio))
        height_width = height_width * fn.random.coin_flip(probability=self.probability)
        corner = fn.random.uniform(range=[0, 1], shape=2) * (1 - height_width)
        return fn.erase(images, anchor=corner, shape=height_width, normalized=True, axis_names="HW", fill_value=MEAN_COLOR)


# Largest translations in the three augmentations below, as fractions of the image's side. torchvision has the same for 224
# pixels. DALI's defaults are in pixels, and AutoAugment's 250 would move an image of 224 pixels out of sight.
WIDE_OFFSET, OFFSET = 32 / 224, 150 / 331


@dataclass(frozen=True)
class TrivialAugmentWide(Augmentation):
    """Applies one of 14 operations with random strength: arXiv 2103.10158."""

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali.auto_aug.trivial_augment import trivial_augment_wide

        with _without_deprecations():
            return trivial_augment_wide(images, shape=images.shape(), fill_value=GRAY, max_translate_rel=WIDE_OFFSET)


@dataclass(frozen=True)
class RandAugment(Augmentation):
    """Applies `n` of 14 operations in a row, with strength `m`: arXiv 1909.13719."""

    n: int = 2
    m: int = 9
    """Strength, from 0 to 30."""

    def __post_init__(self) -> None:
        self.require("n", 1, 14)
        self.require("m", 0, 30)

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali.auto_aug.rand_augment import rand_augment

        with _without_deprecations():
            return rand_augment(images, self.n, self.m, shape=images.shape(), fill_value=GRAY, max_translate_rel=OFFSET)


@dataclass(frozen=True)
class AutoAugment(Augmentation):
    """Applies one of 25 pairs of operations that were found for ImageNet: arXiv 1805.09501."""

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali.auto_aug.auto_augment import auto_augment_image_net

        with _without_deprecations():
            return auto_augment_image_net(images, shape=images.shape(), fill_value=GRAY, max_translate_rel=OFFSET)


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Drops DALI's deprecation warnings about its own use of old operator names. DALI raises them despite all filters."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if not issubclass(warning.category, DeprecationWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
