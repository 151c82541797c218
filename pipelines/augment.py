"""From encoded bytes to pixels of one size, as pieces of a DALI graph; the same code for CPU and GPU.

Each function takes encoded images (1-D uint8, on the CPU) and gives uint8 HWC RGB of `size` x `size` on `device`. Resizing is
bilinear with antialiasing throughout, which is what Pillow's bilinear filter does.
"""

from typing import Literal

import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali.data_node import DataNode

Device = Literal["cpu", "gpu"]
# "mixed" is DALI's name for decoding that starts on the CPU and ends on the GPU.
_DECODER = {"cpu": "cpu", "gpu": "mixed"}


def random_resized_crop(
    encoded: DataNode, size: int, device: Device, scale: tuple[float, float], ratio: tuple[float, float]
) -> DataNode:
    """A random region, resized: "Going Deeper with Convolutions", section 6; only the region's part of a JPEG is decoded.

    Args:
        encoded: Encoded images.
        size: Side of the result, pixels.
        device: Where decoding ends and the result lies.
        scale: Smallest and largest area of the region, as a part of the image's.
        ratio: Smallest and largest width/height of the region.
    """
    pixels = fn.decoders.image_random_crop(
        encoded, device=_DECODER[device], output_type=types.RGB, random_area=scale, random_aspect_ratio=ratio
    )
    return fn.resize(pixels, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)


def resized_center_crop(encoded: DataNode, size: int, resize_shorter: int, device: Device) -> DataNode:
    """The shorter side resized to `resize_shorter`, then the centre `size` x `size`: torchvision's `Resize` and `CenterCrop`.

    Both happen in one resampling of the region that the crop shows, with torchvision's rounding: the longer side's new length
    is truncated, the crop's corner is rounded half to even.
    """
    height_width = fn.peek_image_shape(encoded)[:2]
    resized = height_width * resize_shorter // fn.reductions.min(height_width)
    margin = resized - size
    half = margin // 2
    corner = half + (margin - 2 * half) * (half - half // 2 * 2)
    # From pixels of the resized image, which never exists, to pixels of the original.
    to_original = fn.cast(height_width, dtype=types.FLOAT) / fn.cast(resized, dtype=types.FLOAT)
    pixels = fn.decoders.image(encoded, device=_DECODER[device], output_type=types.RGB)
    return fn.resize(
        pixels,
        size=[size, size],
        roi_start=fn.cast(corner, dtype=types.FLOAT) * to_original,
        roi_end=fn.cast(corner + size, dtype=types.FLOAT) * to_original,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
