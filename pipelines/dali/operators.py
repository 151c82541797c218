"""The pieces of the DALI graph that are not an augmentation: decoding, resizing and normalization.

CPU and GPU differ only in how they resize. Both filter bilinearly with antialiasing, as Pillow's bilinear filter does; on a CPU
torch resizes (pipelines/dali/cpu_resize.py).
"""

from typing import TYPE_CHECKING, Any, Literal

from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType

from pipelines.augment import HorizontalFlip
from pipelines.dali.cpu_resize import BatchResize, CenterCropResize, WholeResize
from pipelines.loader import MEAN, STD, resize_shorter_for

if TYPE_CHECKING:
    from pipelines.config import DataConfig

Device = Literal["cpu", "gpu"]
Stage = Literal["decode", "resize", "normalize"]
Color = tuple[float, float, float]  # red, green and blue, in [0, 1]


def training_images(
    encoded: DataNode, config: "DataConfig", *, size: int, device: Device, dtype: DALIDataType, until: Stage = "normalize"
) -> DataNode:
    """Decodes, crops, augments and normalizes images.

    Args:
        encoded: Encoded images, 1-D uint8 on the CPU.
        config: Names the crop and the augmentations.
        size: Image side, in pixels.
        device: Device of the result.
        dtype: Dtype of the normalized images.
        until: Last stage, for measurements. "decode" gives uint8 images of any size, "resize" uint8 images of `size`.

    Returns:
        Images HWC.
    """
    options = _decoder_options(device, config.hw_decoder_load, is_whole=False)
    # Decodes only the part of a JPEG that the crop needs.
    images = fn.decoders.image_random_crop(
        encoded, random_area=config.crop.scale, random_aspect_ratio=config.crop.ratio, **options
    )
    if until == "decode":
        return images
    if device == "gpu":
        images = fn.resize(images, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
    else:
        images = _resize_on_cpu(WholeResize(size=size, num_threads=_num_threads()), images)
    if until == "resize":
        return images
    mirror: DataNode | None = None
    for augmentation in config.augment:
        if isinstance(augmentation, HorizontalFlip) and mirror is None:
            mirror = augmentation.draw()
        else:
            images = augmentation(images)
    return _normalize(images, dtype, MEAN, STD, mirror=0 if mirror is None else mirror)


def validation_images(
    encoded: DataNode,
    *,
    size: int,
    device: Device,
    dtype: DALIDataType,
    resize_shorter: int | None = None,
    mean: Color = MEAN,
    std: Color = STD,
    until: Stage = "normalize",
    hw_decoder_load: float | None = None,
) -> DataNode:
    """Decodes and normalizes images, after torchvision's `Resize(resize_shorter)` and `CenterCrop(size)`.

    Args:
        encoded: Encoded images, 1-D uint8 on the CPU.
        size: Image side, in pixels.
        device: Device of the result.
        dtype: Dtype of the normalized images.
        resize_shorter: Length of the shorter side before the crop, in pixels. By default `resize_shorter_for(size)`.
        mean: Subtracted from the channels.
        std: Divides the channels.
        until: As for `training_images`.
        hw_decoder_load: See `DataConfig`.

    Returns:
        Images HWC.
    """
    resize_shorter = resize_shorter or resize_shorter_for(size)
    shape = fn.peek_image_shape(encoded)
    if device == "gpu":
        images = fn.decoders.image(encoded, **_decoder_options(device, hw_decoder_load, is_whole=True))
        if until != "decode":
            images = resample_center(images, shape, size, resize_shorter)
    else:
        resize = CenterCropResize(size=size, resize_shorter=resize_shorter, num_threads=_num_threads())
        region = fn.dl_tensor_python_function(shape, function=resize.regions, batch_processing=True)
        options = _decoder_options(device, None, is_whole=False)
        images = fn.decoders.image_slice(encoded, start=region[:2], end=region[2:], axis_names="HW", **options)
        if until != "decode":
            images = _resize_on_cpu(resize, images, shape)
    return _normalize(images, dtype, mean, std) if until == "normalize" else images


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


def _decoder_options(device: Device, hw_decoder_load: float | None, *, is_whole: bool) -> dict[str, Any]:
    """Returns the options of DALI's decoders for RGB images on `device`.

    A GPU decodes whole images with interpolated chroma, as libjpeg-turbo does on CPUs and in other programs. nvJPEG's default
    repeats chroma pixels. Decoding a part of an image with interpolation needs nvJPEG 13.2. With an older version (DALI for
    CUDA 12 ships 12.4) nvImageCodec would decode that part on the CPU.
    """
    if device == "cpu":
        return {"device": "cpu", "output_type": types.RGB}
    load = {} if hw_decoder_load is None else {"hw_decoder_load": hw_decoder_load}
    # "mixed" is DALI's name for decoding that starts on the CPU and ends on the GPU.
    return {"device": "mixed", "output_type": types.RGB, "jpeg_fancy_upsampling": is_whole, **load}


def _normalize(images: DataNode, dtype: DALIDataType, mean: Color, std: Color, mirror: "DataNode | int" = 0) -> DataNode:
    mean_std = {"mean": [255 * value for value in mean], "std": [255 * value for value in std]}
    return fn.crop_mirror_normalize(images, mirror=mirror, dtype=dtype, output_layout="HWC", **mean_std)


def _resize_on_cpu(resize: BatchResize, *inputs: DataNode) -> DataNode:
    return fn.dl_tensor_python_function(*inputs, function=resize, batch_processing=True, output_layouts="HWC")


def _num_threads() -> int:
    """Returns the number of threads of the pipeline that is being built."""
    return int(Pipeline.current().num_threads)
