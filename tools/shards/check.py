"""Whether an image can be decoded in training, tried with the very decoder that the pipeline uses."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

# nvImageCodec logs each image that it cannot decode to the standard error; here that is a result, not an accident.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec

# The names of nvImageCodec's codecs, and the extension that the pipeline's reader looks for.
EXTENSIONS = {
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "bmp": "bmp",
    "tiff": "tif",
    "jpeg2k": "jp2",
    "pnm": "ppm",
}


@dataclass(frozen=True)
class Verdict:
    """`extension` for the image's own format where it can be decoded; else None, and the `reason` why not."""

    extension: str | None
    reason: str = ""


class DecodeCheck:
    """Decodes images completely, on all CPU cores."""

    def __init__(self) -> None:
        # Without the list of backends the decoder asks for a CUDA device, also when told to do without.
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        )

    def __call__(self, images: Sequence[bytes]) -> list[Verdict]:
        """A verdict for each image, given as the bytes of its file."""
        verdicts = []
        for encoded, decoded in zip(images, self._decoder.decode(list(images)), strict=True):
            codec = _codec(encoded)
            if decoded is not None and codec in EXTENSIONS:
                verdicts.append(Verdict(EXTENSIONS[codec]))
            elif codec in EXTENSIONS:
                verdicts.append(Verdict(None, f"damaged {codec} image"))
            else:
                verdicts.append(Verdict(None, _unreadable(encoded)))
        return verdicts


def _codec(encoded: bytes) -> str | None:
    try:
        return str(nvimgcodec.CodeStream(encoded).codec_name)
    except RuntimeError:  # what it raises for bytes that it cannot make out
        return None


def _unreadable(encoded: bytes) -> str:
    if not encoded:
        return "empty file"
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            known = image.format
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError):
        return "not an image"
    name = str(known).lower()
    return f"damaged {name} image" if name in EXTENSIONS else f"{known} is a format that the training decoder cannot read"
