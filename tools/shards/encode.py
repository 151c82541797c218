"""Checks, resizes and encodes images."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.bad_samples.kinds import WAY_OUT
from tools.shards.check import BOMBS, ImageCheck, Verdict, open_with_pillow, rgb_pixels, too_large
from tools.shards.shape import Shape, Shaped

ENCODERS = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}


class Encoder:
    """Checks, resizes and encodes images. With `shape.resize` it limits torch to one thread in this process."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._wanted = {"keep": None, "jpeg": "jpg", "webp": "webp"}[shape.format]
        self._header = ImageCheck("structure", shape.max_pixels)
        self._decoder = ImageCheck("decode", shape.max_pixels)
        if shape.resize is not None:
            import torch

            torch.set_num_threads(1)  # there is one process per core

    def __call__(self, images: Sequence[bytes]) -> list[Shaped]:
        """Returns the images in the form to store, given the bytes of their files."""
        headers = list(self._header(images))
        encode = [header.extension is not None and self._must_encode(header) for header in headers]
        decode = [must_encode or self._shape.check == "decode" for must_encode in encode]
        decoded = self._decoder([data for data, must_decode in zip(images, decode, strict=True) if must_decode])
        shaped = []
        for data, header, must_encode, must_decode in zip(images, headers, encode, decode, strict=True):
            verdict = next(decoded) if must_decode else header
            shaped.append(self._reencode(header, verdict) if must_encode else self._keep_or_rescue(data, verdict))
        return shaped

    def _must_encode(self, header: Verdict) -> bool:
        too_large = self._shape.resize is not None and min(header.height, header.width) > self._shape.resize
        return too_large or (self._wanted or header.extension) != header.extension

    def _keep_or_rescue(self, data: bytes, verdict: Verdict) -> Shaped:
        """Keeps the bytes of a good image, and re-encodes an image that only Pillow can read."""
        if verdict.extension is not None:
            return Shaped(verdict.extension, data=data)
        if not verdict.foreign_format:
            return Shaped(None, verdict.reason)
        try:
            with open_with_pillow(data, self._shape.max_pixels) as image:
                pixels = rgb_pixels(image)
        except BOMBS:
            return Shaped(None, too_large(self._shape.max_pixels))
        except UnidentifiedImageError:
            return Shaped(None, f"{verdict.foreign_format}, which Pillow cannot read either: save it as PNG")
        except Exception:  # each plugin raises errors of its own, see `check`
            return Shaped(None, f"damaged {verdict.foreign_format} image")
        if pixels is None:
            return Shaped(None, f"{verdict.foreign_format}, whose samples have more than 8 bits: {WAY_OUT}")
        return self._encode(pixels, self._wanted or "jpg", f"{verdict.foreign_format} encoded as {{}}")

    def _reencode(self, header: Verdict, verdict: Verdict) -> Shaped:
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
            pixels = _resize_shorter(pixels, self._shape.resize)
        encoded = io.BytesIO()
        try:
            Image.fromarray(pixels).save(encoded, ENCODERS[extension], quality=self._shape.quality)
        except (OSError, ValueError) as error:  # WebP is limited to 16,383 pixels per side, JPEG to 65,535
            return Shaped(None, f"cannot be encoded as {ENCODERS[extension]}: {error}")
        return Shaped(extension, change=change.format(extension), data=encoded.getvalue())


def _resize_shorter(pixels: NDArray[np.uint8], shorter: int) -> NDArray[np.uint8]:
    """Resizes the shorter side to `shorter` pixels. The longer side is rounded down, as in torchvision.

    The method is bilinear with antialiasing, as in the pipeline. torch's kernel takes a third of the time of Pillow's, and
    their results differ by at most 2 of 255.

    Args:
        pixels: uint8 `(height, width, 3)`.
        shorter: Length of the shorter side, in pixels.

    Returns:
        uint8 `(new height, new width, 3)`.
    """
    import torch  # takes seconds to import, and most conversions do not need it

    height, width = pixels.shape[:2]
    size = (shorter * height // min(height, width), shorter * width // min(height, width))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # a channels_last view, not a copy
    resized = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
