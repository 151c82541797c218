"""Checks whether training can decode an image, with the decoder that the pipeline uses."""

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines.bad_samples.cut_short import why_cut_short
from pipelines.bad_samples.decoder_check import EXTENSIONS, cpu_decoder, decode_whole, parse_header
from pipelines.bad_samples.kinds import misread_kind, why_unknown, why_unsafe
from pipelines.bad_samples.limits import MAX_PIXELS, too_many_pixels
from tools.shards.shape import image_batches

if TYPE_CHECKING:
    from nvidia import nvimgcodec

PIXELS_AT_ONCE = 50_000_000  # decoded together; they take three times as many bytes
# Pillow's names of the formats that training reads too.
SHARED_FORMATS = {"JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"}

# Pillow only warns of an image above its limit, and raises an error above twice its limit.
BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Verdict:
    """The result of a check of the bytes of an image file.

    Attributes:
        extension: Extension of the image's actual format, or None if training cannot decode the image.
        reason: Why training cannot decode it. Empty if it can.
        foreign_format: Name of a format or kind of image that Pillow can read but training cannot, such as GIF.
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
    """Finds images that training cannot decode, or would misread.

    Args:
        level: "decode" decodes every image completely, with one CPU thread. "structure" reads the header and, for JPEG and PNG,
            looks for the end mark. It finds non-images and truncated images, but no damage in the middle.
        max_pixels: Images with more pixels are refused.
    """

    def __init__(self, level: Literal["decode", "structure"] = "decode", max_pixels: int = MAX_PIXELS) -> None:
        self._level, self._max_pixels = level, max_pixels
        self._decoder = cpu_decoder(1)

    def __call__(self, images: Sequence[bytes]) -> Iterator[Verdict]:
        """Yields a verdict for each image, given the bytes of its file. Only a few decoded images are in memory."""
        streams = [parse_header(encoded) for encoded in images]
        refused = [self._refused(stream, encoded) for stream, encoded in zip(streams, images, strict=True)]
        good = [stream for stream, verdict in zip(streams, refused, strict=True) if stream is not None and verdict is None]
        decoded = self._decode(good) if self._level == "decode" else iter(())
        for stream, verdict in zip(streams, refused, strict=True):
            if stream is None or verdict is not None:
                assert verdict is not None
                yield verdict
            elif self._level == "decode":
                yield _decoded(stream, next(decoded))
            else:
                yield Verdict(EXTENSIONS[stream.codec_name], height=stream.height, width=stream.width)

    def _refused(self, stream: "nvimgcodec.CodeStream | None", encoded: bytes) -> Verdict | None:
        """Returns the verdict on an image that must not be decoded."""
        if stream is None:
            return _foreign(encoded, self._max_pixels)
        if too_many := too_many_pixels(stream.width, stream.height, self._max_pixels):
            return Verdict(None, too_many)
        if unsafe := why_unsafe(encoded):
            return Verdict(None, unsafe)
        if cut_short := why_cut_short(encoded):  # the decoder does not notice it if padding follows
            return Verdict(None, cut_short)
        kind = misread_kind(stream, encoded)
        return None if kind is None else Verdict(None, kind.reason, kind.name if kind.pillow_reads_it else "")

    def _decode(self, streams: "Sequence[nvimgcodec.CodeStream]") -> "Iterator[nvimgcodec.Image | None]":
        for together in image_batches(streams, lambda stream: stream.width * stream.height, PIXELS_AT_ONCE):
            yield from decode_whole(self._decoder, together)


def _decoded(stream: "nvimgcodec.CodeStream", image: "nvimgcodec.Image | None") -> Verdict:
    if image is None:
        return Verdict(None, f"damaged {stream.codec_name} image")
    return Verdict(EXTENSIONS[stream.codec_name], height=stream.height, width=stream.width, pixels=np.asarray(image))


def _foreign(encoded: bytes, max_pixels: int) -> Verdict:
    """Returns why the decoder cannot read these bytes, as far as Pillow can tell."""
    try:
        with open_with_pillow(encoded, max_pixels) as image:
            known = str(image.format)
            if known not in SHARED_FORMATS:
                reason = why_unsafe(encoded) or f"{known} is a format that the training decoder cannot read"
                return Verdict(None, reason, foreign_format=known)
            try:
                image.load()
            except Exception:  # see below
                return Verdict(None, f"damaged {known.lower()} image")
    except BOMBS:
        return Verdict(None, too_large(max_pixels))
    except Exception:  # its plugins raise a dozen types of errors for damaged images and for other data
        return Verdict(None, why_unknown(encoded))
    unusual = f"{known.lower()} of an unusual kind"
    return Verdict(None, f"{unusual}, which the training decoder cannot read", foreign_format=unusual)


def too_large(max_pixels: int) -> str:
    """Returns why an image is refused whose size Pillow does not tell."""
    return f"more pixels than the limit of {max_pixels:,} (--max-pixels)"


def open_with_pillow(encoded: bytes, max_pixels: int) -> Image.Image:
    """Opens an image without decoding it.

    Raises:
        BOMBS: It has too many pixels.
        Exception: Pillow cannot read it. Each of its plugins raises errors of its own.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels  # it also applies to images within images, as in ICO
    return Image.open(io.BytesIO(encoded))


def rgb_pixels(image: Image.Image) -> NDArray[np.uint8] | None:
    """Decodes an image that was opened with Pillow: uint8 `(height, width, 3)` after EXIF rotation.

    Returns None for samples of 16 and 32 bits, from which Pillow cuts all values above 255. JPEG 2000 is an exception: Pillow
    scales its samples to 16 bits, so 65535 is white.
    """
    if image.format == "JPEG2000" and image.mode == "I;16":
        return np.dstack([(np.asarray(image) >> 8).astype(np.uint8)] * 3)
    if image.mode == "F" or image.mode.startswith("I"):
        return None
    upright = ImageOps.exif_transpose(image)
    # Convert the transparency of a palette to RGBA first: Pillow warns of its loss otherwise.
    return np.array((upright.convert("RGBA") if upright.mode == "P" else upright).convert("RGB"))
