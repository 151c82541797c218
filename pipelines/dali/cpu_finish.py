"""What a CPU does after the graph: resizes, flips and normalizes each image into its place in the batch."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipelines.dali.cpu_resize import Resize


class Finish:
    """Resizes, flips and normalizes images in the calling thread.

    Args:
        resize: Resizes the images.
        mean: Subtracted from red, green and blue in [0, 1].
        std: Divides them.
    """

    def __init__(self, resize: Resize, mean: Sequence[float], std: Sequence[float]) -> None:
        self._resize = resize
        # A row of pixels: torch repeats a row much faster than a pixel of three numbers.
        with torch.inference_mode(False):
            self._factor = (1 / (255 * torch.tensor(std))).repeat(resize.size)
            self._offset = (-torch.tensor(mean) / torch.tensor(std)).repeat(resize.size)

    def __call__(self, outputs: Sequence[Any], target: Tensor) -> None:
        """Finishes the images of a graph.

        Args:
            outputs: The graph's outputs: DALI's lists of tensors, as operators.py describes them.
            target: Memory for the images, float32 `(N, size, size, 3)`.
        """
        for image, place in zip(resized(self._resize, outputs), target, strict=True):
            place.copy_(image)
            rows = place.view(self._resize.size, -1)
            torch.addcmul(self._offset, rows, self._factor, out=rows)


def resized(resize: Resize, outputs: Sequence[Any]) -> Iterator[Tensor]:
    """Yields the images of a graph, uint8 `(size, size, 3)`. `outputs` are DALI's lists of tensors, as for `Finish`."""
    images, *others = outputs
    for image, *other in zip(images, *(each.as_array().tolist() for each in others), strict=True):
        yield resize.resized(from_dlpack(image), *other)


class BatchMemory:
    """Memory for the batches of a pipeline. It is used again when nobody holds the batch in it any more.

    The kernel clears new memory page by page, which takes 0.2 ms of CPU time for an image of 224 pixels.

    Args:
        shape: `(N, H, W, C)` of a batch.
        most: Number of batches to keep memory for. If more are held, the others get new memory.
    """

    def __init__(self, shape: tuple[int, ...], most: int) -> None:
        self._shape, self._most = shape, most
        self._kept = list[tuple[np.ndarray[Any, np.dtype[np.float32]], weakref.ref[Any]]]()

    def take(self, num_images: int) -> Tensor:
        """Returns memory for a batch of this many images, float32 `(num_images, H, W, C)`, with any content."""
        free = next((i for i, (_, user) in enumerate(self._kept) if user() is None), None)
        memory = np.empty(self._shape, np.float32) if free is None else self._kept.pop(free)[0]
        view = memory[:num_images]  # the tensor refers to this array, and not to the memory itself
        if len(self._kept) < self._most:
            self._kept.append((memory, weakref.ref(view)))
        with torch.inference_mode(False):  # other threads could not write to a tensor of that mode
            return torch.from_numpy(view)
