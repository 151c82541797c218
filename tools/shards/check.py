"""Checks whether training can decode an image, with the decoder that the pipeline uses."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.bad_samples.decoder_check import EXTENSIONS, cpu_decoder, decoders_silenced, parse_header
from pipelines.bad_samples.jpeg import CUT_SHORT, is_cut_short

if TYPE_CHECKING:
    from nvidia import nvimgcodec

PNG_END, PNG_END_WITHIN = b"IEND", 4096  # some editors append bytes of their own


@dataclass(frozen=True)
class Verdict:
    """The result of a check of the bytes of an image file.

    Attributes:
        extension: Extension of the image's actual format, or None if training cannot decode the image.
        reason: Why training cannot decode it. Empty if it can.
        foreign_format: Name of a format that Pillow can read but training cannot, such as GIF.
        height: Height in pixels before any EXIF rotation, or 0 if unknown.
        width: Width in pixels before any EXIF rotation, or 0 if unknown.
        pixels: uint8 `(height, width, 3)` RGB after EXIF rotation, if the check decodes.
    """

    extension: str | None
    reason: str = ""
    foreign_format: str = ""
    height: int = 0
    width: int = 0
    pixels: NDArray[np.uint8] | None = None


class ImageCheck:
    """Finds images that training cannot decode.

    Args:
        level: "decode" decodes every image completely, with one CPU thread. "structure" reads the header and, for JPEG and PNG,
            looks for the end mark. It finds non-images and truncated images, but no damage in the middle.
    """

    def __init__(self, level: Literal["decode", "structure"] = "decode") -> None:
        self._level = level
        self._decoder = cpu_decoder(1)

    def __call__(self, images: Sequence[bytes]) -> list[Verdict]:
        """Returns a verdict for each image, given the bytes of its file."""
        streams = [parse_header(encoded) for encoded in images]
        if self._level == "structure":
            return [_check_structure(stream, encoded) for stream, encoded in zip(streams, images, strict=True)]
        with decoders_silenced():
            decoded = iter(self._decoder.decode([stream for stream in streams if stream is not None]))
        return [
            _foreign(encoded) if stream is None else _decoded(stream, next(decoded))
            for stream, encoded in zip(streams, images, strict=True)
        ]


def _check_structure(stream: "nvimgcodec.CodeStream | None", encoded: bytes) -> Verdict:
    if stream is None:
        return _foreign(encoded)
    if is_cut_short(encoded):
        return Verdict(None, CUT_SHORT)
    if stream.codec_name == "png" and PNG_END not in encoded[-PNG_END_WITHIN:]:
        return Verdict(None, "png image cut short")
    return Verdict(EXTENSIONS[stream.codec_name], height=stream.height, width=stream.width)


def _decoded(stream: "nvimgcodec.CodeStream", image: "nvimgcodec.Image | None") -> Verdict:
    if image is None:
        return Verdict(None, f"damaged {stream.codec_name} image")
    return Verdict(EXTENSIONS[stream.codec_name], height=stream.height, width=stream.width, pixels=np.asarray(image))


def _foreign(encoded: bytes) -> Verdict:
    """Returns why the decoder cannot read these bytes, as far as Pillow can tell."""
    if not encoded:
        return Verdict(None, "empty file")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            known = str(image.format)
    except Exception:  # its plugins raise a dozen types of errors for damaged images and for other data
        return Verdict(None, "not an image")
    if known.lower() in EXTENSIONS:
        return Verdict(None, f"damaged {known.lower()} image")
    return Verdict(None, f"{known} is a format that the training decoder cannot read", foreign_format=known)
