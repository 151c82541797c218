"""Encoded images from anywhere, made ready for the network by the graph that validation has."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import Color
from pipelines.bad_samples.decoder_check import decoders_silenced
from pipelines.bad_samples.diagnosis import undecodable
from pipelines.bad_samples.jpeg import CUT_SHORT, is_cut_short
from pipelines.dali.graph import decoding_pipeline, describe
from pipelines.dali.to_torch import HandOver


class ValidationDecoder:
    """Decodes, resizes, crops to the centre and normalizes batches of images, and tells those that cannot be decoded.

    Args:
        batch_size: Images that it is given at a time, at the most.
        image_size: Side of the images that it gives, pixels.
        resize_shorter: To what the shorter side is resized before the crop, pixels.
        mean: Of red, green and blue in [0, 1], subtracted.
        std: The same, divided by.
        device: Where the images are to lie; "cpu", or a CUDA device with its index.
        num_threads: CPU threads.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        image_size: int,
        resize_shorter: int,
        mean: Color,
        std: Color,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self._make = lambda: decoding_pipeline(
            device="gpu" if device.type == "cuda" else "cpu",
            device_id=device.index if device.type == "cuda" else None,
            batch_size=batch_size,
            num_threads=num_threads,
            image_size=image_size,
            resize_shorter=resize_shorter,
            mean=mean,
            std=std,
        )
        self._pipeline = self._make()
        self._hand_over = HandOver(device)
        self._empty = torch.empty(0, 3, image_size, image_size, device=device)

    def __call__(self, images: Sequence[bytes]) -> tuple[Tensor, dict[int, str]]:
        """The images, given as the bytes of their files, but for those that cannot be decoded.

        Returns:
            `(N, 3, image_size, image_size)` float32 with channels_last strides, in order; and by their places among `images`
            those that are not in it, with what is wrong with each.

        Raises:
            OSError: DALI stopped, and not because of an image.
        """
        bad = {i: CUT_SHORT for i, image in enumerate(images) if is_cut_short(image)}
        while good := {i: image for i, image in enumerate(images) if i not in bad}:
            try:
                return self._run(list(good.values())), bad
            except RuntimeError as error:
                self._pipeline = self._make()  # what has stopped is of no use any more
                found = self._undecodable(list(good.values()))
                if not found:
                    raise OSError(describe(error)) from error
                bad |= {place: found[i] for i, place in enumerate(good) if i in found}
        return self._empty, bad

    def _undecodable(self, images: Sequence[bytes]) -> dict[int, str]:
        return undecodable(images, lambda i: self._stops_alone(images[i]))

    def _run(self, images: Sequence[bytes]) -> Tensor:
        with decoders_silenced():
            [batch] = self._pipeline.run(encoded=[np.frombuffer(image, np.uint8) for image in images])
        # NHWC seen as NCHW is channels_last.
        return self._hand_over(batch.as_tensor()).permute(0, 3, 1, 2)

    def _stops_alone(self, image: bytes) -> bool:
        try:
            self._run([image])
        except RuntimeError:
            self._pipeline = self._make()
            return True
        return False
