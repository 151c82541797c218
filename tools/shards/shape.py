"""What the bytes of an image become on their way into a shard, as the user asked for it."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, Protocol

from pipelines.shards import IMAGE_EXTENSIONS

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
        data: The bytes of its file.
        extension: Of its format; None where the image is rejected.
        reason: Why it is rejected.
        change: What was done to it, for people; empty where the bytes are the original's.
    """

    data: bytes
    extension: str | None
    reason: str = ""
    change: str = ""


class Shaper(Protocol):
    """Brings images into shape, one by one."""

    def __call__(self, name: str, data: bytes) -> Shaped:
        """The image in shape; `name`, that of its file, says what it is where nothing is checked."""


def make_shaper(shape: Shape) -> Shaper:
    """What does it: `Encoder`, or only a look at the names where that is enough."""
    if shape.check == "none" and shape.resize is None and shape.format == "keep":
        return TrustNames(shape)
    from tools.shards.encode import Encoder  # its libraries take a while to import

    return Encoder(shape)


class TrustNames:
    """Passes bytes through whose name says that training can decode them."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._encoder: Shaper | None = None

    def __call__(self, name: str, data: bytes) -> Shaped:
        extension = PurePath(name).suffix[1:].lower()
        if extension in IMAGE_EXTENSIONS:
            return Shaped(data, "jpg" if extension == "jpeg" else extension)
        if self._encoder is None:
            from tools.shards.encode import Encoder

            self._encoder = Encoder(self._shape)
        return self._encoder(name, data)
