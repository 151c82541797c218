"""Resizing on the CPU, by torch: the antialiased bilinear filter that Pillow has, several times faster than DALI's.

torch has one for pixels of 8 bits with vector instructions (`interpolate`), which works in one thread. It is called
from a graph with a batch of images as DLPack capsules; torch lets go of Python's lock while it computes.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

# DALI runs the CPU operators of a graph one after the other, so the threads that decode wait while these resize. On two cores a
# pool of two was slower all the same (665 images/s to 744): each image takes turns with Python's lock. More are not measured.
THREADS_PER_WORKER = 2

# Of the longer side to the shorter: what is further out is cut off before an image is resized, as no crop shows it and a line
# of 65,000 pixels by one would become gigabytes.
LONGEST = 16


@dataclass(frozen=True, kw_only=True)
class BatchResize(ABC):
    """Images uint8 `(H, W, 3)` of any sizes to such images `size` x `size`, as DLPack capsules on both sides.

    Attributes:
        size: Side of the images that it gives, pixels.
        num_threads: Of the pipeline.
    """

    size: int
    num_threads: int

    def __call__(self, images: Sequence[Any]) -> list[Any]:
        num_workers = -(-self.num_threads // THREADS_PER_WORKER)
        if num_workers == 1:
            return self._all(images)
        parts = [images[i::num_workers] for i in range(num_workers)]
        done = [iter(part) for part in _pool(num_workers).map(self._all, parts)]
        return [next(done[i % num_workers]) for i in range(len(images))]

    def _all(self, images: Sequence[Any]) -> list[Any]:
        return [to_dlpack(self.resized(from_dlpack(image))) for image in images]

    @abstractmethod
    def resized(self, image: Tensor) -> Tensor:
        """One image."""


class WholeResize(BatchResize):
    """All of the image, in whatever proportions it has."""

    def resized(self, image: Tensor) -> Tensor:
        return _resized(image, self.size, self.size)


@dataclass(frozen=True, kw_only=True)
class CenterCropResize(BatchResize):
    """Torchvision's `Resize(resize_shorter)` and `CenterCrop(size)`, with their rounding.

    Attributes:
        resize_shorter: To what the shorter side is resized before the crop, pixels; at least `size`.
    """

    resize_shorter: int

    def resized(self, image: Tensor) -> Tensor:
        image = _middle(image)
        height, width, _ = image.shape
        shorter = min(height, width)
        height, width = height * self.resize_shorter // shorter, width * self.resize_shorter // shorter
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        resized = _resized(image, height, width)
        return resized[top : top + self.size, left : left + self.size].contiguous()


def _middle(image: Tensor) -> Tensor:
    """At most `LONGEST` times the shorter side of an image's longer one, the same number of pixels cut off at both ends."""
    height, width, _ = image.shape
    longest = LONGEST * min(height, width)
    top, left = (max(0, side - longest + 1) // 2 for side in (height, width))
    return image[top : height - top, left : width - left]


@functools.cache
def _pool(num_workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_workers, "resize")


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    # The strides of channels_last, with which torch takes the fast way.
    batch = image[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0)
