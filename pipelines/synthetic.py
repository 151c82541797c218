"""Batches that cost nothing: what the model could do if data were never in the way."""

from collections.abc import Mapping
from typing import Any

import torch

from pipelines.loader import Batch, Loader, check_state
from pipelines.shards.order import Deal


class SyntheticLoader(Loader):
    """The same random batch again and again, already on the device; as many as a loader of that many samples would give.

    Args:
        deal: Says how large the batches of this rank are, and how many.
        image_size: Side of the images, pixels.
        device: Where the batch lies.
        dtype: Of the images.
        num_classes: Labels are below it.
        seed: Of the batch.
    """

    def __init__(
        self, deal: Deal, *, image_size: int, device: torch.device, dtype: torch.dtype, num_classes: int, seed: int = 0
    ) -> None:
        self._deal, self._epoch, self._batch, self._offset, self._is_fresh, self._is_closed = deal, 0, 0, 0, True, False
        self._settings: dict[str, int | str] = {
            "data set": f"{deal.order.num_places:,} synthetic samples",
            "seed": seed,
            "batch size": deal.batch_size,
            "number of ranks": deal.world_size,
            "rank": deal.rank,
            "image size": image_size,
        }
        generator = torch.Generator().manual_seed(seed)
        image = torch.rand((deal.batch_size, 3, image_size, image_size), generator=generator) * 4 - 2
        target = torch.randint(num_classes, (deal.batch_size,), generator=generator)
        self._image = image.to(device, dtype, memory_format=torch.channels_last)
        self._target = target.to(device)

    def __len__(self) -> int:
        return 0 if self._is_closed else self._deal.num_batches(self._offset)

    def next(self) -> Batch | None:
        if self._batch >= len(self):
            return None
        count = len(self._deal.plan(self._epoch, self._batch, self._offset).samples)
        self._batch += 1
        self._is_fresh = False
        return {"image": self._image[:count], "target": self._target[:count]}

    def reset(self) -> None:
        if not self._is_fresh:
            self._epoch, self._batch, self._offset, self._is_fresh = self._epoch + 1, 0, 0, True

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self._settings, **self._deal.state(self._epoch, self._batch, self._offset)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(state, self._settings, is_elastic=self._deal.train)
        self._epoch, self._batch, self._offset = self._deal.position(state["epoch"], state["place"])
        self._is_fresh = True

    def close(self) -> None:
        self._is_closed = True
