"""Decodes images from anywhere with the graph that validation uses."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.bad_samples.cut_short import why_cut_short
from pipelines.bad_samples.decoder_check import undecodable, why_unusable
from pipelines.bad_samples.limits import MAX_PIXELS
from pipelines.bad_samples.silence import decoders_silenced
from pipelines.config import DataConfig
from pipelines.dali.image_pipeline import ImagePipeline, describe
from pipelines.dali.operators import Color, Preprocessing
from pipelines.dali.to_torch import HandOver
from pipelines.loader import MEAN, STD
from pipelines.machine import num_cpus
from pipelines.spec import LoaderSpec, with_index


class ValidationDecoder:
    """Decodes, resizes, center-crops and normalizes batches of images, and names those that it cannot decode.

    The defaults are those of training.

    Args:
        device: Device of the images. A CUDA device without an index is torch's current one.
        batch_size: Images that are decoded at a time.
        image_size: Image side, in pixels.
        resize_shorter: Length of the shorter side before the crop, in pixels. By default 256 for 224, in proportion for others.
        mean: Subtracted from red, green and blue in [0, 1].
        std: Divides them.
        num_threads: CPU threads. By default one per CPU, at most 16.
        max_pixels: Images with more pixels are bad.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        batch_size: int = 64,
        image_size: int = 224,
        resize_shorter: int | None = None,
        mean: Color = MEAN,
        std: Color = STD,
        num_threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        device = with_index(device)
        self._max_pixels, self._batch_size = max_pixels, batch_size
        num_threads = num_threads or min(num_cpus(), 16)
        spec = LoaderSpec(split="valid", batch_size=batch_size, image_size=image_size, device=device, num_threads=num_threads)
        config, preprocessing = DataConfig(prefetch=1, max_pixels=max_pixels), Preprocessing(resize_shorter, mean, std)
        self._make = lambda: ImagePipeline(config, spec, preprocessing=preprocessing)
        self._pipeline = self._make()
        self._hand_over = HandOver(device)
        self._empty = torch.empty(0, 3, image_size, image_size, device=device)

    def __call__(self, images: Sequence[bytes]) -> tuple[Tensor, dict[int, str]]:
        """Decodes images.

        Args:
            images: Contents of the files.

        Returns:
            The images in order, without the bad ones: `(N, 3, image_size, image_size)` float32 with channels_last strides. And
            the indices of the bad ones, with what is wrong with each.

        Raises:
            OSError: DALI stopped for another reason than an image.
        """
        reasons = [why_cut_short(image) or why_unusable(image, self._max_pixels) for image in images]
        bad = {i: reason for i, reason in enumerate(reasons) if reason}
        while good := [i for i in range(len(images)) if i not in bad]:
            try:
                return self._run([images[i] for i in good]), bad
            except RuntimeError as error:
                self._renew()
                found = self._undecodable([images[i] for i in good])
                if not found:
                    raise OSError(describe(error)) from error
                bad |= {good[i]: reason for i, reason in found.items()}
        return self._empty, bad

    def _undecodable(self, images: Sequence[bytes]) -> dict[int, str]:
        return undecodable(images, lambda chosen: self._stops_at([images[i] for i in chosen]), self._max_pixels, "--max-pixels")

    def _run(self, images: Sequence[bytes]) -> Tensor:
        parts = []
        for start in range(0, len(images), self._batch_size):  # of a larger batch, DALI would return a part without an error
            encoded = [np.frombuffer(image, np.uint8) for image in images[start : start + self._batch_size]]
            with decoders_silenced():
                self._pipeline.feed(encoded, epoch=0, place=0)
                batch = self._pipeline.images(self._hand_over.stream)
            parts.append(self._hand_over(batch))
        # NHWC seen as NCHW is channels_last.
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).permute(0, 3, 1, 2)

    def _stops_at(self, images: Sequence[bytes]) -> bool:
        try:
            self._run(images)
        except RuntimeError:
            self._renew()
            return True
        return False

    def _renew(self) -> None:
        """Replaces a pipeline that was stopped by an error, and so cannot be used again."""
        self._pipeline.close()
        self._pipeline = self._make()
