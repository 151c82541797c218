"""What happens to images between their encoded bytes and the network, as pieces of a DALI graph.

The graph is the same for CPU and GPU but for resizing: bilinear with antialiasing throughout, which is what Pillow's bilinear
filter does, and which on a CPU torch does (pipelines/dali/cpu_resize.py).

The dataclasses are the settings of `--data.crop` and `--data.augment`, and build their piece of the graph. DALI and torch are
imported where a piece is built, so that the settings can be had without them.
"""

import contextlib
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipelines.loader import MEAN, STD, resize_shorter_for

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode
    from nvidia.dali.types import DALIDataType

    from pipelines.dali.cpu_resize import BatchResize

Device = Literal["cpu", "gpu"]
Stage = Literal["decode", "resize", "normalize"]
Color = tuple[float, float, float]  # red, green and blue, in [0, 1]
# "mixed" is DALI's name for decoding that starts on the CPU and ends on the GPU.
_DECODER = {"cpu": "cpu", "gpu": "mixed"}
MEAN_COLOR = [round(255 * value) for value in MEAN]
# What fills the corners where an image was moved: DALI's warping operators take one value for all channels.
GRAY = 128


def _decoder_options(device: Device, hw_decoder_load: float | None, *, is_whole: bool) -> dict[str, Any]:
    """Of DALI's decoders: RGB on `device`; there is a decoder in hardware on GPUs alone.

    A GPU decodes whole images with chroma interpolated, as libjpeg-turbo does it on CPUs and in other programs; by itself
    nvJPEG repeats chroma's pixels. For parts of images nvImageCodec has that from nvJPEG 13.2 on. With an older one (DALI for
    CUDA 12 brings 12.4) it would decode them on the CPU.
    """
    from nvidia.dali import types

    options: dict[str, Any] = {"device": _DECODER[device], "output_type": types.RGB}
    if device == "gpu":
        options["jpeg_fancy_upsampling"] = is_whole
        if hw_decoder_load is not None:
            options["hw_decoder_load"] = hw_decoder_load
    return options


@dataclass(frozen=True)
class RandomResizedCrop:
    """How a random part of each training image is cut out: "Going Deeper with Convolutions", section 6."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of the crop, as a part of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width/height of the crop."""

    def __post_init__(self) -> None:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"crop.{name} {low} {high}: two positive numbers are needed, the smaller first")
        if self.scale[1] > 1:
            raise ValueError(f"crop.scale {self.scale[0]} {self.scale[1]}: a crop cannot be larger than the image, 1.0")

    def decode(self, encoded: "DataNode", device: Device, hw_decoder_load: float | None = None) -> "DataNode":
        """The crop of each image, uint8 HWC RGB, in the size that it has there; only the crop's part of a JPEG is decoded."""
        from nvidia.dali import fn

        options = _decoder_options(device, hw_decoder_load, is_whole=False)
        return fn.decoders.image_random_crop(encoded, random_area=self.scale, random_aspect_ratio=self.ratio, **options)


@dataclass(frozen=True)
class Augmentation(ABC):
    """A step of `--data.augment`: each subclass in this file is one, named after its class, with its fields as parameters.

    Called while the graph is built, with images uint8 HWC RGB, square and of one size, on CPU or GPU; gives such images.
    What differs from sample to sample is drawn by `fn.random.uniform` or `coin_flip`, outside of any `if` on a node of the
    graph: inside, a sample's draw would depend on how many of its neighbours got there. Fields are int, float,
    str, or a pair of these, with defaults.
    """

    name: str = field(init=False, default="")  # a field, so that config.json says what each entry of the list is

    def __init_subclass__(cls) -> None:
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    @abstractmethod
    def __call__(self, images: "DataNode") -> "DataNode": ...

    def require(self, parameter: str, low: float, high: float) -> None:
        """Raises ValueError where a parameter is not from `low` to `high`; of a pair both numbers, the smaller one first."""
        value = getattr(self, parameter)
        numbers = value if isinstance(value, tuple) else (value,)
        shown = "..".join(str(number) for number in numbers)
        if not all(low <= number <= high for number in numbers):
            raise ValueError(f"{self.name}: {parameter} {shown}: from {low:g} to {high:g} is possible")
        if list(numbers) != sorted(numbers):
            raise ValueError(f"{self.name}: {parameter} {shown}: the smaller number comes first")


def uniform(low: float, high: float) -> "DataNode":
    """For each sample a number from `low` to `high`, which may be the same; `fn.random.uniform` takes no empty range."""
    from nvidia.dali import fn

    return low + (high - low) * fn.random.uniform(range=[0, 1])


@dataclass(frozen=True)
class HorizontalFlip(Augmentation):
    """Left and right exchanged. Wherever it stands in the list, it happens while normalizing, where it costs nothing."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        self.require("probability", 0, 1)

    def draw(self) -> "DataNode":
        """For each sample 1 where it is to be flipped, and otherwise 0."""
        from nvidia.dali import fn

        return fn.random.coin_flip(probability=self.probability)

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali import fn

        return fn.flip(images, horizontal=self.draw())


@dataclass(frozen=True)
class VerticalFlip(Augmentation):
    """Top and bottom exchanged."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        self.require("probability", 0, 1)

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali import fn

        return fn.flip(images, horizontal=0, vertical=fn.random.coin_flip(probability=self.probability))


@dataclass(frozen=True)
class Rotate(Augmentation):
    """Turned about the centre by an angle from -degrees to degrees; the corners become gray."""

    degrees: float = 15.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        self.require("degrees", 0, 180)
        self.require("probability", 0, 1)

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali import fn, types

        angle = uniform(-self.degrees, self.degrees)
        if fn.random.coin_flip(probability=self.probability, dtype=types.BOOL):  # by far the dearest, so only where it is due
            images = fn.rotate(images, angle=angle, keep_size=True, fill_value=GRAY)
        return images


@dataclass(frozen=True)
class ColorJitter(Augmentation):
    """Factors for brightness, contrast and saturation from 1 - x (at least 0) to 1 + x, a turn of the hue from -x to x.

    The ranges are torchvision's, hue as a part of the circle. All four happen in one pass over the pixels, in a fixed order and
    contrast about the middle gray; torchvision has a random order and contrast about the image's mean.
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
    """A rectangle becomes the mean colour: arXiv 1708.04896."""

    probability: float = 0.5
    area: tuple[float, float] = (0.02, 0.33)
    """Of the rectangle, as a part of the image's."""
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
        # So that neither side is longer than the image's: its square is area * ratio, or area / ratio.
        log_ratio = dali_math.clamp(log_ratio, dali_math.log(area), -dali_math.log(area))
        ratio = dali_math.exp(log_ratio)
        height_width = fn.stack(dali_math.sqrt(area * ratio), dali_math.sqrt(area / ratio))
        height_width = height_width * fn.random.coin_flip(probability=self.probability)
        corner = fn.random.uniform(range=[0, 1], shape=2) * (1 - height_width)
        return fn.erase(images, anchor=corner, shape=height_width, normalized=True, axis_names="HW", fill_value=MEAN_COLOR)


# The largest offset by which the following three move an image, as a part of its side; torchvision's, for 224 pixels. DALI's
# are numbers of pixels, and AutoAugment's, 250 of them, moves an image of 224 out of sight.
WIDE_OFFSET, OFFSET = 32 / 224, 150 / 331


@dataclass(frozen=True)
class TrivialAugmentWide(Augmentation):
    """One of 14 operations, of random strength: arXiv 2103.10158."""

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali.auto_aug.trivial_augment import trivial_augment_wide

        with _without_deprecations():
            return trivial_augment_wide(images, shape=images.shape(), fill_value=GRAY, max_translate_rel=WIDE_OFFSET)


@dataclass(frozen=True)
class RandAugment(Augmentation):
    """`n` of 14 operations one after the other, of strength `m`: arXiv 1909.13719."""

    n: int = 2
    m: int = 9
    """From 0 to 30."""

    def __post_init__(self) -> None:
        self.require("n", 1, 14)
        self.require("m", 0, 30)

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali.auto_aug.rand_augment import rand_augment

        with _without_deprecations():
            return rand_augment(images, self.n, self.m, shape=images.shape(), fill_value=GRAY, max_translate_rel=OFFSET)


@dataclass(frozen=True)
class AutoAugment(Augmentation):
    """One of 25 pairs of operations that were found for ImageNet: arXiv 1805.09501."""

    def __call__(self, images: "DataNode") -> "DataNode":
        from nvidia.dali.auto_aug.auto_augment import auto_augment_image_net

        with _without_deprecations():
            return auto_augment_image_net(images, shape=images.shape(), fill_value=GRAY, max_translate_rel=OFFSET)


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Without the warnings about old names of operators that DALI raises, past all filters, for its own use of them."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if not issubclass(warning.category, DeprecationWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def training_images(
    encoded: "DataNode",
    crop: RandomResizedCrop,
    augmentations: tuple[Augmentation, ...],
    *,
    size: int,
    device: Device,
    dtype: "DALIDataType",
    until: Stage = "normalize",
    hw_decoder_load: float | None = None,
) -> "DataNode":
    """Encoded images, 1-D uint8 on the CPU, cropped, augmented and normalized: HWC of `dtype` on `device`.

    With `until`, for measurements, what they are after that stage: uint8 HWC, decoded in any size or resized.
    `hw_decoder_load` is that of `DataConfig`.
    """
    images = crop.decode(encoded, device, hw_decoder_load)
    if until == "decode":
        return images
    images = _resized_whole(images, size, device)
    if until == "resize":
        return images
    mirror: DataNode | None = None
    for augmentation in augmentations:
        if isinstance(augmentation, HorizontalFlip) and mirror is None:
            mirror = augmentation.draw()
        else:
            images = augmentation(images)
    return _normalized(images, dtype, 0 if mirror is None else mirror)


def validation_images(
    encoded: "DataNode",
    *,
    size: int,
    device: Device,
    dtype: "DALIDataType",
    resize_shorter: int | None = None,
    mean: Color = MEAN,
    std: Color = STD,
    until: Stage = "normalize",
    hw_decoder_load: float | None = None,
) -> "DataNode":
    """Encoded images, 1-D uint8 on the CPU, resized, cropped to the centre and normalized: HWC of `dtype` on `device`.

    `until` and `hw_decoder_load` are those of `training_images`.
    """
    resize_shorter, only_decode = resize_shorter or resize_shorter_for(size), until == "decode"
    if device == "gpu":
        images = center_crop_resampled(encoded, size, resize_shorter, device, only_decode, hw_decoder_load)
    else:
        images = _center_crop_on_cpu(encoded, size, resize_shorter, only_decode)
    return images if until in ("decode", "resize") else _normalized(images, dtype, 0, mean, std)


def _normalized(
    images: "DataNode", dtype: "DALIDataType", mirror: "DataNode | int", mean: Color = MEAN, std: Color = STD
) -> "DataNode":
    from nvidia.dali import fn

    return fn.crop_mirror_normalize(
        images,
        mirror=mirror,
        dtype=dtype,
        output_layout="HWC",
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
    )


def _resized_whole(pixels: "DataNode", size: int, device: Device) -> "DataNode":
    from nvidia.dali import fn, types

    if device == "gpu":
        return fn.resize(pixels, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
    from pipelines.dali.cpu_resize import WholeResize

    return _resized_on_cpu(WholeResize(size=size, num_threads=_num_threads()), pixels)


def _center_crop_on_cpu(encoded: "DataNode", size: int, resize_shorter: int, only_decode: bool) -> "DataNode":
    """The shorter side resized to `resize_shorter`, then the centre `size` x `size`, as by torchvision: uint8 HWC."""
    from nvidia.dali import fn, types

    from pipelines.dali.cpu_resize import CenterCropResize

    resize = CenterCropResize(size=size, resize_shorter=resize_shorter, num_threads=_num_threads())
    shape = fn.peek_image_shape(encoded)
    region = fn.dl_tensor_python_function(shape, function=resize.regions, batch_processing=True)
    pixels = fn.decoders.image_slice(
        encoded, device="cpu", start=region[:2], end=region[2:], axis_names="HW", output_type=types.RGB
    )
    return pixels if only_decode else _resized_on_cpu(resize, pixels, shape)


def center_crop_resampled(
    encoded: "DataNode",
    size: int,
    resize_shorter: int,
    device: Device,
    only_decode: bool = False,
    hw_decoder_load: float | None = None,
) -> "DataNode":
    """The same in one resampling by DALI of the region that the crop shows.

    The rounding is torchvision's: the longer side's new length is truncated, the crop's corner is rounded half to even. A GPU's
    way, which can be had on a CPU too, where it is slower.
    """
    from nvidia.dali import fn, types

    pixels = fn.decoders.image(encoded, **_decoder_options(device, hw_decoder_load, is_whole=True))
    if only_decode:
        return pixels
    height_width = fn.peek_image_shape(encoded)[:2]
    resized = height_width * resize_shorter // fn.reductions.min(height_width)
    margin = resized - size
    half = margin // 2
    corner = half + (margin - 2 * half) * (half - half // 2 * 2)
    # From pixels of the resized image, which never exists, to pixels of the original.
    to_original = fn.cast(height_width, dtype=types.FLOAT) / fn.cast(resized, dtype=types.FLOAT)
    return fn.resize(
        pixels,
        size=[size, size],
        roi_start=fn.cast(corner, dtype=types.FLOAT) * to_original,
        roi_end=fn.cast(corner + size, dtype=types.FLOAT) * to_original,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


def _resized_on_cpu(resize: "BatchResize", *inputs: "DataNode") -> "DataNode":
    from nvidia.dali import fn

    return fn.dl_tensor_python_function(*inputs, function=resize, batch_processing=True, output_layouts="HWC")


def _num_threads() -> int:
    """Of the pipeline that is being built."""
    from nvidia.dali.pipeline import Pipeline

    return int(Pipeline.current().num_threads)
