"""What the bytes of an image become on their way into a shard, as the user asked for it."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from pipelines.shards.shard_set import IMAGE_EXTENSIONS

Level = Literal["decode", "structure", "none"]
Format = Literal["keep", "jpeg", "webp"]


@dataclass(frozen=True)
class Shape:
    """How images are checked and shaped.

    Attributes:
        check: See `ImageCheck`; "none" trusts the extension of the file's name.
        resize: Length of the shorter side in pixels; smaller images stay as they are.
        quality: Of JPEG and WebP images that are encoded, 1 to 100.
        format: What images become; "keep" encodes only what was resized or cannot be decoded in training.
    """

    check: Level = "decode"
    resize: int | None = None
    quality: int = 90
    format: Format = "keep"


@dataclass(frozen=True)
class Shaped:
    """An image as it goes into a shard.

    Attributes:
        extension: Of its format; None where the image is rejected.
        reason: Why it is rejected.
        change: What was done to it, for people; empty where the bytes are the original's.
        data: The bytes of its file; None where the image is rejected, or to be copied without a look at it.
    """

    extension: str | None
    reason: str = ""
    change: str = ""
    data: bytes | None = None


def trusted_extension(shape: Shape, name: str) -> str | None:
    """The extension for an image that is stored without a look at it; None where a look is needed."""
    extension = PurePath(name).suffix[1:].lower()
    if shape.check != "none" or shape.resize is not None or shape.format != "keep" or extension not in IMAGE_EXTENSIONS:
        return None
    return "jpg" if extension == "jpeg" else extension
