"""Resizes on the CPU with torch: the same antialiased bilinear filter as Pillow's, several times faster than DALI's.

torch's `interpolate` is vectorized for 8-bit pixels and releases the GIL while it computes.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from pipelines.openmp import use_threads

# Resizing a part of an image gives the same pixels as resizing all of it if the part begins at a pixel boundary of both the
# original and the resized image. A distance of WHOLE from a boundary, in pixels of the original, is near enough. The search for
# such a place ends FURTHEST pixels before the crop.
WHOLE, FURTHEST = 0.002, 4096


@dataclass(frozen=True, kw_only=True)
class Resize(ABC):
    """Resizes uint8 images `(H, W, 3)` of any size to `size` x `size`.

    Attributes:
        size: Side of the resized images, in pixels.
    """

    size: int

    @abstractmethod
    def resized(self, image: Tensor, other: Any) -> Tensor:
        """Resizes one image, given another property of it."""


class WholeResize(Resize):
    """Resizes the whole image, whatever its proportions."""

    def __call__(self, images: Sequence[Any]) -> list[Any]:
        """Resizes a batch, as a node of a graph. `images` and the results are DLPack capsules."""
        use_threads(1)  # without AVX2, torch resizes in several
        return [to_dlpack(self.resized(from_dlpack(image)).contiguous()) for image in images]

    def resized(self, image: Tensor, mirror: int = 0) -> Tensor:
        """Resizes one image, and mirrors left and right if `mirror` is 1."""
        if image.shape[:2] != (self.size, self.size):  # an augmentation before this has resized it
            image = _resized(image, (self.size, self.size), None)
        return image.flip(1) if mirror else image


@dataclass(frozen=True, kw_only=True)
class CenterCropResize(Resize):
    """Resizes and crops like torchvision's `Resize(resize_shorter)` and `CenterCrop(size)`, with the same rounding.

    Only the part of an image that the crop needs is decoded and resized.

    Attributes:
        resize_shorter: Length of the shorter side before the crop, in pixels; at least `size`.
    """

    resize_shorter: int

    def regions(self, shapes: Sequence[Any]) -> list[Any]:
        """Returns the part of each image that is needed, as int32 top, left, bottom and right. `shapes` are `(H, W, C)`."""
        sides = [self._sides(from_dlpack(shape).tolist()) for shape in shapes]
        return [to_dlpack(torch.tensor([y.start, x.start, y.stop, x.stop], dtype=torch.int32)) for y, x in sides]

    def resized(self, image: Tensor, shape: Sequence[int]) -> Tensor:
        """Resizes the part of an image that `regions` returned, given the shape `(H, W, C)` of the whole image."""
        y, x = self._sides(shape)
        if y.scale == x.scale == 1:  # the region is the crop
            return image
        resized = _resized(image, (y.margin + self.size, x.margin + self.size), (1 / y.scale, 1 / x.scale))
        return resized[y.margin :, x.margin :]

    def _sides(self, shape: Sequence[int]) -> "tuple[_Side, _Side]":
        height, width, _ = shape
        shorter = min(height, width)
        return _side(height, shorter, self.size, self.resize_shorter), _side(width, shorter, self.size, self.resize_shorter)


class _Side(NamedTuple):
    """The part of one side of an image that a crop needs.

    Attributes:
        start: First pixel of the original.
        stop: Pixel after the last one.
        scale: Pixels of the original per pixel of the resized image.
        margin: Pixels of the resized image between `start` and the crop.
    """

    start: int
    stop: int
    scale: float
    margin: int


@functools.lru_cache(1 << 16)  # most images of a data set have one of a few sizes
def _side(length: int, shorter: int, size: int, resize_shorter: int) -> _Side:
    resized = length * resize_shorter // shorter
    scale, corner = length / resized, round((resized - size) / 2)
    if scale == 1:
        return _Side(corner, corner + size, scale, margin=0)
    support = max(1.0, scale)  # reach of the filter on each side of a pixel's center; centers lie at 0.5

    def distance(position: int) -> float:
        return abs(position * scale - round(position * scale))

    first = int(max(0.0, (corner + 0.5) * scale - support))
    furthest = max(
        0, corner - resize_shorter - FURTHEST
    )  # one pixel may become `resize_shorter` ones, all in the filter's reach
    positions = [i for i in range(corner, furthest - 1, -1) if round(i * scale) <= first]
    begin = next((i for i in positions if distance(i) < WHOLE), None)
    if begin is None:
        begin = min(positions, key=distance)
    stop = min(length, int((corner + size - 0.5) * scale + support) + 1)
    return _Side(round(begin * scale), stop, scale, corner - begin)


def _resized(image: Tensor, height_width: tuple[int, int], factors: tuple[float, float] | None) -> Tensor:
    """Resizes by the given factors, or by those that follow from the sizes."""
    # `interpolate` calls this operator, but takes either sizes or factors. channels_last strides select torch's fast path.
    batch = image[None].permute(0, 3, 1, 2)
    resized: Tensor = torch.ops.aten._upsample_bilinear2d_aa(batch, height_width, False, *(factors or (None, None)))
    return resized[0].permute(1, 2, 0)
