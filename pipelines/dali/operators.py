"""The pieces of the DALI graph that are not an augmentation: decoding, resizing and normalization.

CPU and GPU differ in how they resize and normalize. On a CPU, torch does both after the graph (cpu_finish.py), and resizes
within it only before an augmentation. Both filter bilinearly with antialiasing, as Pillow's bilinear filter does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

from pipelines.augment import HorizontalFlip
from pipelines.dali.cpu_resize import CenterCropResize, Resize, WholeResize
from pipelines.loader import MEAN, STD, resize_shorter_for

if TYPE_CHECKING:
    from pipelines.config import DataConfig

Stage = Literal["decode", "resize", "normalize"]
Images: TypeAlias = DataNode | tuple[DataNode, DataNode]  # with another property of each image
Color = tuple[float, float, float]  # red, green and blue, in [0, 1]


@dataclass(frozen=True)
class Preprocessing:
    """How images are resized for validation, and normalized. The defaults are those of the loader.

    Attributes:
        resize_shorter: Length of the shorter side before the center crop, in pixels. By default `resize_shorter_for(size)`.
        mean: Subtracted from the channels.
        std: Divides the channels.
    """

    resize_shorter: int | None = None
    mean: Color = MEAN
    std: Color = STD

    def shorter(self, size: int) -> int:
        """Returns the length of the shorter side before a center crop of `size`."""
        return self.resize_shorter or resize_shorter_for(size)


def training_images(
    encoded: DataNode,
    config: "DataConfig",
    preprocessing: Preprocessing,
    *,
    size: int,
    dtype: DALIDataType,
    resize: Resize | None,
    until: Stage = "normalize",
) -> Images:
    """Decodes, crops, augments and normalizes images.

    Args:
        encoded: Encoded images, 1-D uint8 on the CPU.
        config: Names the crop and the augmentations.
        preprocessing: Normalizes.
        size: Image side, in pixels.
        dtype: Dtype of the normalized images, on a GPU.
        resize: Resizes on a CPU. Without it, the images are made on a GPU.
        until: Last stage, for measurements. "decode" gives uint8 images of any size; on a GPU, "resize" gives those of `size`.

    Returns:
        Images HWC. On a CPU they are not normalized, nor resized unless an augmentation needed it; the second output is 1 for
        images to mirror.
    """
    options = _decoder_options(resize, config.hw_decoder_load, is_whole=False)
    # Decodes only the part of a JPEG that the crop needs.
    images = fn.decoders.image_random_crop(
        encoded, random_area=config.crop.scale, random_aspect_ratio=config.crop.ratio, **options
    )
    if until == "decode":
        return images
    if resize is None:
        images = fn.resize(images, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
    elif not are_only_flipped(config):
        assert isinstance(resize, WholeResize)
        images = _by_torch(resize, images, layout="HWC")
    if until == "resize":
        return images
    mirror: DataNode | None = None
    for augmentation in config.augment:
        if isinstance(augmentation, HorizontalFlip) and mirror is None:
            mirror = augmentation.draw()
        else:
            images = augmentation(images)
    if resize is None:
        return _normalize(images, dtype, preprocessing, mirror=0 if mirror is None else mirror)
    return images if mirror is None else (images, mirror)


def validation_images(
    encoded: DataNode,
    preprocessing: Preprocessing,
    *,
    size: int,
    dtype: DALIDataType,
    resize: Resize | None,
    until: Stage = "normalize",
    hw_decoder_load: float | None = None,
) -> Images:
    """Decodes and normalizes images, after torchvision's `Resize(resize_shorter)` and `CenterCrop(size)`.

    Args:
        encoded: Encoded images, 1-D uint8 on the CPU.
        preprocessing: Names `resize_shorter`, and normalizes.
        size: Image side, in pixels.
        dtype: Dtype of the normalized images, on a GPU.
        resize: As for `training_images`.
        until: As for `training_images`.
        hw_decoder_load: See `DataConfig`.

    Returns:
        Images HWC. On a CPU, the parts of images that the crop needs, and the shapes of the whole images.
    """
    shape = fn.peek_image_shape(encoded)
    if resize is None:
        images = fn.decoders.image(encoded, **_decoder_options(resize, hw_decoder_load, is_whole=True))
        if until == "decode":
            return images
        images = resample_center(images, shape, size, preprocessing.shorter(size))
        return _normalize(images, dtype, preprocessing) if until == "normalize" else images
    assert isinstance(resize, CenterCropResize)
    region = _by_torch(resize.regions, shape)
    options = _decoder_options(resize, None, is_whole=False)
    images = fn.decoders.image_slice(encoded, start=region[:2], end=region[2:], axis_names="HW", **options)
    return images if until == "decode" else (images, shape)


def resample_center(images: DataNode, shape: DataNode, size: int, resize_shorter: int) -> DataNode:
    """Resamples the region of each image that the center crop shows, in a single step of DALI.

    Rounds as torchvision does: truncates the new length of the longer side, and rounds the corner of the crop half to even.
    GPUs use this; it works on a CPU too, but slower than torch.
    """
    height_width = shape[:2]
    resized = height_width * resize_shorter // fn.reductions.min(height_width)
    margin = resized - size
    half = margin // 2
    corner = half + (margin - 2 * half) * (half - half // 2 * 2)
    # From pixels of the resized image, which never exists, to pixels of the original.
    to_original = fn.cast(height_width, dtype=types.FLOAT) / fn.cast(resized, dtype=types.FLOAT)
    return fn.resize(
        images,
        size=[size, size],
        roi_start=fn.cast(corner, dtype=types.FLOAT) * to_original,
        roi_end=fn.cast(corner + size, dtype=types.FLOAT) * to_original,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


def are_only_flipped(config: "DataConfig") -> bool:
    """Whether the crop is the only other change of training images."""
    return len(config.augment) <= 1 and all(isinstance(step, HorizontalFlip) for step in config.augment)


def _decoder_options(resize: Resize | None, hw_decoder_load: float | None, *, is_whole: bool) -> dict[str, Any]:
    """Returns the options of DALI's decoders for RGB images: on a CPU if there is a `resize`.

    A GPU decodes whole images with interpolated chroma, as libjpeg-turbo does on CPUs and in other programs. nvJPEG's default
    repeats chroma pixels. Decoding a part of an image with interpolation needs nvJPEG 13.2. With an older version (DALI for
    CUDA 12 ships 12.4) nvImageCodec would decode that part on the CPU.
    """
    if resize is not None:
        return {"device": "cpu", "output_type": types.RGB}
    load = {} if hw_decoder_load is None else {"hw_decoder_load": hw_decoder_load}
    # "mixed" is DALI's name for decoding that starts on the CPU and ends on the GPU.
    return {"device": "mixed", "output_type": types.RGB, "jpeg_fancy_upsampling": is_whole, **load}


def _normalize(images: DataNode, dtype: DALIDataType, preprocessing: Preprocessing, mirror: "DataNode | int" = 0) -> DataNode:
    mean, std = ([255 * value for value in color] for color in (preprocessing.mean, preprocessing.std))
    return fn.crop_mirror_normalize(images, mirror=mirror, dtype=dtype, output_layout="HWC", mean=mean, std=std)


def _by_torch(function: Callable[..., Any], *inputs: DataNode, layout: str | None = None) -> DataNode:
    return fn.dl_tensor_python_function(*inputs, function=function, batch_processing=True, output_layouts=layout)
