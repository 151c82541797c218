"""Checks, resizes and encodes images."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tools.shards.check import ImageCheck, Verdict
from tools.shards.shape import Shape, Shaped

ENCODERS = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}


class Encoder:
    """Checks, resizes and encodes."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._wanted = {"keep": None, "jpeg": "jpg", "webp": "webp"}[shape.format]
        self._header = ImageCheck("structure")
        self._decoder = ImageCheck("decode")
        if shape.resize is not None:
            import torch

            torch.set_num_threads(1)  # there is a process for each core

    def __call__(self, images: Sequence[bytes]) -> list[Shaped]:
        """The images in shape, from the bytes of their files."""
        headers = self._header(images)
        anew = [header.extension is not None and self._to_encode(header) for header in headers]
        decode = [yes or self._shape.check == "decode" for yes in anew]
        decoded = iter(self._decoder([data for data, yes in zip(images, decode, strict=True) if yes]))
        shaped = []
        for data, header, encode, yes in zip(images, headers, anew, decode, strict=True):
            verdict = next(decoded) if yes else header
            shaped.append(self._encode_anew(header, verdict) if encode else self._keep_or_rescue(data, verdict))
        return shaped

    def _to_encode(self, header: Verdict) -> bool:
        too_large = self._shape.resize is not None and min(header.height, header.width) > self._shape.resize
        return too_large or (self._wanted or header.extension) != header.extension

    def _keep_or_rescue(self, data: bytes, verdict: Verdict) -> Shaped:
        """The bytes as they are; those that only Pillow can read are encoded anew."""
        if verdict.extension is not None:
            return Shaped(verdict.extension, data=data)
        if not verdict.foreign_format:
            return Shaped(None, verdict.reason)
        try:
            with Image.open(io.BytesIO(data)) as image:
                upright = ImageOps.exif_transpose(image)
                # A palette's transparency goes by way of RGBA: Pillow warns of losing it otherwise.
                pixels = np.array((upright.convert("RGBA") if upright.mode == "P" else upright).convert("RGB"))
        except Exception:  # see `check`: of as many kinds as there are plugins
            return Shaped(None, f"damaged {verdict.foreign_format} image")
        return self._encode(pixels, self._wanted or "jpg", f"{verdict.foreign_format} encoded as {{}}")

    def _encode_anew(self, header: Verdict, verdict: Verdict) -> Shaped:
        if verdict.pixels is None:
            return Shaped(None, verdict.reason)
        extension = self._wanted or header.extension
        assert extension is not None
        return self._encode(
            verdict.pixels,
            extension if extension in ENCODERS else "jpg",
            "resized" if extension == header.extension else f"{header.extension} encoded as {{}}",
        )

    def _encode(self, pixels: NDArray[np.uint8], extension: str, change: str) -> Shaped:
        if self._shape.resize is not None and min(pixels.shape[:2]) > self._shape.resize:
            pixels = resize_shorter(pixels, self._shape.resize)
        encoded = io.BytesIO()
        try:
            Image.fromarray(pixels).save(encoded, ENCODERS[extension], quality=self._shape.quality)
        except (OSError, ValueError) as error:  # WebP ends at 16,383 pixels, JPEG at 65,535
            return Shaped(None, f"cannot be encoded as {ENCODERS[extension]}: {error}")
        return Shaped(extension, change=change.format(extension), data=encoded.getvalue())


def resize_shorter(pixels: NDArray[np.uint8], shorter: int) -> NDArray[np.uint8]:
    """The image with its shorter side of that length and the longer one truncated, as torchvision has it.

    Bilinear with antialiasing, which is what the pipeline does. torch's kernel takes a third of the time of Pillow's,
    and agrees with it within 2 of 255.

    Args:
        pixels: uint8 `(height, width, 3)`.
        shorter: Pixels.

    Returns:
        uint8 `(new height, new width, 3)`.
    """
    import torch  # takes seconds to import, and most conversions do without

    height, width = pixels.shape[:2]
    size = (shorter * height // min(height, width), shorter * width // min(height, width))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # seen as channels_last: no copy
    resized = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
