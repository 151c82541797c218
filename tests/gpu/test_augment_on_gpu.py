"""Augmentation and mixing on a GPU."""

from pathlib import Path

import pytest
import torch

from pipelines.augment import Augmentation
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.mix import MixConfig, mix
from tests.pipelines.test_augment import EVERY

LISTS = [*((step,) for step in EVERY), EVERY]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("augmentations", LISTS, ids=lambda steps: "+".join(s.name for s in steps))
def test_augmentation(shards: Path, augmentations: tuple[Augmentation, ...], dtype: torch.dtype) -> None:
    def first_batch(augment: tuple[Augmentation, ...]) -> torch.Tensor:
        config = DataConfig(train=str(shards), augment=augment)
        options = {"batch_size": 16, "image_size": 64, "device": torch.device("cuda", 0), "dtype": dtype}
        with build_loader(config, LoaderSpec(split="train", **options)) as loader:  # type: ignore[arg-type]
            batch = loader.next()
        assert batch is not None
        return batch["image"]

    plain, image, again = first_batch(()), first_batch(augmentations), first_batch(augmentations)
    assert image.shape == (16, 3, 64, 64)
    assert image.dtype == dtype
    assert image.device == torch.device("cuda", 0)
    assert image.isfinite().all()
    assert -2.2 < image.min().item() < image.max().item() < 2.7
    assert torch.equal(image, again)
    changed = (image != plain).flatten(1).any(1).sum().item()
    assert changed >= 2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("config", [MixConfig(mixup_alpha=1.0), MixConfig(cutmix_alpha=1.0)])
def test_mixing_does_not_wait_for_the_device(config: MixConfig) -> None:
    image = torch.randn(8, 3, 32, 32, device="cuda").half().to(memory_format=torch.channels_last)
    target = torch.arange(8, device="cuda")
    expected = mix(config, image.cpu(), target.cpu(), num_classes=8, step=3, seed=0)
    try:
        torch.cuda.set_sync_debug_mode("error")
        mixed, soft = mix(config, image, target, num_classes=8, step=3, seed=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(mixed.cpu(), expected[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(soft.cpu(), expected[1])
