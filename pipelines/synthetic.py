"""Batches that cost nothing, to measure a model without data loading."""

import torch

from pipelines.loader import Batch, Loader
from pipelines.shards.order import InOrder
from pipelines.spec import LoaderSpec


class SyntheticLoader(Loader):
    """Repeats one random batch, which lies on the device. An epoch has as many batches as with real samples.

    Args:
        num_samples: Number of samples in an epoch of all ranks.
        spec: Describes the batches; `num_classes` must be set.
    """

    def __init__(self, num_samples: int, spec: LoaderSpec) -> None:
        settings = {"data set": f"{num_samples:,} synthetic samples", **spec.settings()}
        super().__init__(spec.deal(InOrder([num_samples], 1)), settings)
        assert spec.num_classes is not None
        generator = torch.Generator().manual_seed(spec.seed)
        image = torch.rand((spec.batch_size, 3, spec.image_size, spec.image_size), generator=generator) * 4 - 2
        target = torch.randint(spec.num_classes, (spec.batch_size,), generator=generator)
        self._image = image.to(spec.device, spec.dtype, memory_format=torch.channels_last)
        self._target = target.to(spec.device)

    def next(self) -> Batch | None:
        if self._batch == len(self):
            return None
        count = len(self._deal.plan(self._epoch, self._batch, self._offset).samples)
        self._batch += 1
        self._is_fresh = False
        return {"image": self._image[:count], "target": self._target[:count]}

    def close(self) -> None:
        """Does nothing: the batch is freed with the loader."""
