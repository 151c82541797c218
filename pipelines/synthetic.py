"""Batches that cost nothing: what the model could do if data were never in the way."""

from collections.abc import Mapping
from typing import Any

import torch

from pipelines.loader import Batch, Loader, check_state, rank_extent
from pipelines.segments import num_train_batches


class SyntheticLoader(Loader):
    """The same random batch again and again, already on the device; as many as a loader of that many samples would give.

    Args:
        num_samples: In the split.
        train: Training has whole batches only, equally many on each rank; validation each sample once.
        batch_size: Samples a batch, on this rank.
        image_size: Side of the images, pixels.
        device: Where the batch lies.
        dtype: Of the images.
        num_classes: Labels are below it.
        seed: Of the batch.
        rank: Which share of the samples.
        world_size: How many shares there are.

    Raises:
        ValueError: Training on fewer samples than make one batch on every rank.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        train: bool,
        batch_size: int,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype,
        num_classes: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        first, last = rank_extent(num_samples, rank, world_size)
        self._share = num_train_batches(num_samples, batch_size, world_size) * batch_size if train else last - first
        self._batch_size, self._train, self._epoch, self._delivered, self._is_fresh = batch_size, train, 0, 0, True
        self._settings: dict[str, int | str] = {
            "data set": f"{num_samples:,} synthetic samples",
            "seed": seed,
            "batch size": batch_size,
            "number of ranks": world_size,
            "rank": rank,
            "image size": image_size,
        }
        generator = torch.Generator().manual_seed(seed)
        image = torch.rand((batch_size, 3, image_size, image_size), generator=generator) * 4 - 2
        target = torch.randint(num_classes, (batch_size,), generator=generator)
        self._image = image.to(device, dtype, memory_format=torch.channels_last)
        self._target = target.to(device)

    def __len__(self) -> int:
        return -(-self._share // self._batch_size)

    def next(self) -> Batch | None:
        if self._delivered >= len(self):
            return None
        count = min(self._batch_size, self._share - self._delivered * self._batch_size)
        self._delivered += 1
        self._is_fresh = False
        return {"image": self._image[:count], "target": self._target[:count]}

    def reset(self) -> None:
        if not self._is_fresh:
            self._epoch, self._delivered, self._is_fresh = self._epoch + 1, 0, True

    def state_dict(self) -> dict[str, Any]:
        at_end = self._delivered == len(self)
        epoch, batch = (self._epoch + 1, 0) if at_end else (self._epoch, self._delivered)
        return {"settings": self._settings, "epoch": epoch, "batch": batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(state, self._settings)
        self._epoch, self._delivered, self._is_fresh = state["epoch"], state["batch"], True

    def close(self) -> None:
        self._share = 0
