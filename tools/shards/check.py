"""Whether an image can be decoded in training, tried with the very decoder that the pipeline uses."""

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

PNG_END, PNG_END_WITHIN = b"IEND", 4096  # some editors leave bytes of their own behind it


@dataclass(frozen=True)
class Verdict:
    """What a check found out about the bytes of an image file.

    Attributes:
        extension: That of the image's own format, where it is one that training can decode; else None.
        reason: Why not, for people; empty where it can be.
        foreign_format: The format's name where it is one that Pillow knows and training does not, as GIF.
        height: Pixels, before any rotation that its EXIF data asks for; 0 where unknown.
        width: The same.
        pixels: uint8 `(height, width, 3)` RGB, rotated as EXIF says, from a check that decodes.
    """

    extension: str | None
    reason: str = ""
    foreign_format: str = ""
    height: int = 0
    width: int = 0
    pixels: NDArray[np.uint8] | None = None


class ImageCheck:
    """Tells images that training can decode from others.

    Args:
        level: "decode" decodes every image completely. "structure" reads the header and, for JPEG and PNG, looks for the
            mark at the end: it finds what is no image or was cut short, and not what is damaged within.
        num_threads: CPU threads to decode with.
    """

    def __init__(self, level: Literal["decode", "structure"] = "decode", num_threads: int = 1) -> None:
        self._level = level
        self._decoder = cpu_decoder(num_threads)

    def __call__(self, images: Sequence[bytes]) -> list[Verdict]:
        """A verdict for each image, given as the bytes of its file."""
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
    """Why training cannot make out these bytes, where Pillow may know more."""
    if not encoded:
        return Verdict(None, "empty file")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            known = str(image.format)
    except Exception:  # its plugins raise a dozen kinds for bytes that are no image or a damaged one
        return Verdict(None, "not an image")
    if known.lower() in EXTENSIONS:
        return Verdict(None, f"damaged {known.lower()} image")
    return Verdict(None, f"{known} is a format that the training decoder cannot read", foreign_format=known)
