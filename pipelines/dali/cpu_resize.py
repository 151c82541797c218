"""Resizing on the CPU, by torch: the antialiased bilinear filter that Pillow has, several times faster than DALI's.

torch has one for pixels of 8 bits with vector instructions (`interpolate`), which works in one thread. It is called
from a graph with a batch of images as DLPack capsules; torch lets go of Python's lock while it computes.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

# DALI runs the CPU operators of a graph one after the other: threads that decode wait while these resize, so there are as many.
# An image holds Python's lock for an eighth of its time, so that more than these would wait for it.
MOST_WORKERS = 8

# Resizing a part of an image gives what resizing all of it gives, where the part begins on whole pixels of both; this near, in
# pixels of the original, is as good as whole, and further than that before the crop nobody looks for such a place.
WHOLE, FURTHEST = 0.002, 4096


@dataclass(frozen=True, kw_only=True)
class BatchResize(ABC):
    """Images uint8 `(H, W, 3)` of any sizes to such images `size` x `size`, as DLPack capsules on both sides.

    Attributes:
        size: Side of the images that it gives, pixels.
        num_threads: Of the pipeline.
    """

    size: int
    num_threads: int

    def __call__(self, *inputs: Sequence[Any]) -> list[Any]:
        """For each image what is made of it, `inputs` having one sequence for each argument of `resized`."""
        samples = [*zip(*inputs, strict=True)]
        num_workers = min(self.num_threads, MOST_WORKERS)
        if num_workers == 1:
            return self._all(samples)
        parts = [samples[i::num_workers] for i in range(num_workers)]
        done = [iter(part) for part in _pool(num_workers).map(self._all, parts)]
        return [next(done[i % num_workers]) for i in range(len(samples))]

    def _all(self, samples: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [to_dlpack(self.resized(*map(from_dlpack, sample))) for sample in samples]

    @abstractmethod
    def resized(self, *inputs: Tensor) -> Tensor:
        """One image."""


class WholeResize(BatchResize):
    """All of the image, in whatever proportions it has."""

    def resized(self, *inputs: Tensor) -> Tensor:
        [image] = inputs
        return _resized(image, (self.size, self.size), None)


@dataclass(frozen=True, kw_only=True)
class CenterCropResize(BatchResize):
    """Torchvision's `Resize(resize_shorter)` and `CenterCrop(size)`, with their rounding, of the part that the crop needs.

    Attributes:
        resize_shorter: To what the shorter side is resized before the crop, pixels; at least `size`.
    """

    resize_shorter: int

    def regions(self, shapes: Sequence[Any]) -> list[Any]:
        """Of images of these shapes `(H, W, C)` the part that is needed: int32 top, left, bottom and right."""
        sides = [self._sides(from_dlpack(shape)) for shape in shapes]
        return [to_dlpack(torch.tensor([y.start, x.start, y.stop, x.stop], dtype=torch.int32)) for y, x in sides]

    def resized(self, *inputs: Tensor) -> Tensor:
        """Of that part of an image, and the shape that the whole image has."""
        region, shape = inputs
        y, x = self._sides(shape)
        resized = _resized(region, (y.margin + self.size, x.margin + self.size), (1 / y.scale, 1 / x.scale))
        return resized[y.margin :, x.margin :].contiguous()

    def _sides(self, shape: Tensor) -> "tuple[_Side, _Side]":
        height, width, _ = shape.tolist()
        shorter = min(height, width)
        return _side(height, shorter, self.size, self.resize_shorter), _side(width, shorter, self.size, self.resize_shorter)


class _Side(NamedTuple):
    """What a crop needs of one side of an image.

    Attributes:
        start: First pixel of the original.
        stop: After the last one.
        scale: Pixels of the original in one of the resized image.
        margin: Pixels of the resized image between `start` and the crop.
    """

    start: int
    stop: int
    scale: float
    margin: int


@functools.lru_cache(1 << 16)  # most of a data set's images have one of a few sizes
def _side(length: int, shorter: int, size: int, resize_shorter: int) -> _Side:
    resized = length * resize_shorter // shorter
    scale, corner = length / resized, round((resized - size) / 2)
    support = max(1.0, scale)  # of the filter on each side of a pixel's centre, which is at a half

    def distance(position: int) -> float:
        return abs(position * scale - round(position * scale))

    first = int(max(0.0, (corner + 0.5) * scale - support))
    furthest = max(0, corner - resize_shorter - FURTHEST)  # the filter reaches back `resize_shorter` where it spreads one pixel
    positions = [i for i in range(corner, furthest - 1, -1) if round(i * scale) <= first]
    begin = next((i for i in positions if distance(i) < WHOLE), None)
    if begin is None:
        begin = min(positions, key=distance)
    stop = min(length, int((corner + size - 0.5) * scale + support) + 1)
    return _Side(round(begin * scale), stop, scale, corner - begin)


@functools.cache
def _pool(num_workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_workers, "resize")


def _resized(image: Tensor, height_width: tuple[int, int], factors: tuple[float, float] | None) -> Tensor:
    """Resized by these factors, by default those of the sizes."""
    # What `interpolate` calls, which takes sizes or factors. The strides are those of channels_last: torch's fast way.
    batch = image[None].permute(0, 3, 1, 2)
    resized: Tensor = torch.ops.aten._upsample_bilinear2d_aa(batch, height_width, False, *(factors or (None, None)))
    return resized[0].permute(1, 2, 0)
