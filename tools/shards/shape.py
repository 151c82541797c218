"""The form in which images are stored in a shard."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, TypeVar

from pipelines.bad_samples.limits import MAX_PIXELS
from pipelines.shards.members import IMAGE_EXTENSIONS

# Images that are read and decoded together. The decoder is a tenth faster with several, but large images need much memory.
IMAGES_AT_ONCE = 16
BYTES_AT_ONCE = 8 << 20

Level = Literal["decode", "structure", "none"]
Format = Literal["keep", "jpeg", "webp"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Shape:
    """The options of `shards convert` that determine how images are checked, resized and encoded."""

    check: Level = "decode"
    resize: int | None = None
    quality: int = 90
    format: Format = "keep"
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class Shaped:
    """An image as it goes into a shard.

    Attributes:
        extension: Extension of its format, or None if the image is rejected.
        reason: Reason of the rejection.
        change: How the image was changed, in words. Empty if its bytes are the original ones.
        data: Bytes of the image file. None if the image is rejected, or if it is copied without being read before.
    """

    extension: str | None
    reason: str = ""
    change: str = ""
    data: bytes | None = None


def trusted_extension(shape: Shape, name: str) -> str | None:
    """Returns the extension for an image that can be stored without reading it first, or None if it must be read."""
    extension = PurePath(name).suffix[1:].lower()
    if shape.check != "none" or shape.resize is not None or shape.format != "keep" or extension not in IMAGE_EXTENSIONS:
        return None
    if extension == "jp2":  # training leaves JPEG 2000 out, so it is encoded anew
        return None
    return "jpg" if extension == "jpeg" else extension


def image_batches(images: Iterable[Item], size: Callable[[Item], int], most: int = BYTES_AT_ONCE) -> Iterator[list[Item]]:
    """Groups images into batches that are decoded together. `size` returns the bytes of an image, and a batch has `most`."""
    batch: list[Item] = []
    num_bytes = 0
    for image in images:
        if batch and (len(batch) == IMAGES_AT_ONCE or num_bytes + size(image) > most):
            yield batch
            batch, num_bytes = [], 0
        batch.append(image)
        num_bytes += size(image)
    if batch:
        yield batch
