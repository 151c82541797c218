"""MixUp and CutMix: pixels agree with labels, and draws depend only on seed and step."""

import pytest
import torch
from torch import Tensor

from pipelines.mix import MixConfig, mix

CLASSES, SIZE = 16, 32


def batch(count: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images that differ everywhere, each with its own class."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, 3, SIZE, SIZE, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    return image, torch.arange(count)


def mixed(config: MixConfig, step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return mix(config, *batch(), num_classes=CLASSES, step=step, seed=seed)


def shares(target: Tensor) -> float:
    """Returns the share that each sample kept. Checks that all shares are equal, and that the rest is the partner's."""
    share = float(target[0, 0])
    identity = torch.eye(CLASSES)
    torch.testing.assert_close(target, share * identity + (1 - share) * identity.flip(0))
    return share


def test_nothing_is_mixed_by_default() -> None:
    image, target = batch()
    result = mix(MixConfig(), image, target, num_classes=CLASSES, step=3, seed=0)
    assert result[0] is image
    assert result[1] is target


def test_mixup_is_the_weighted_sum_of_images_and_of_labels() -> None:
    drawn = []
    image, _ = batch()
    for step in range(60):
        result, target = mixed(MixConfig(mixup_alpha=1.0), step)
        drawn.append(shares(target))
        torch.testing.assert_close(result, drawn[-1] * image + (1 - drawn[-1]) * image.flip(0))
    # Beta(1, 1) is uniform.
    assert 0.35 < sum(drawn) / len(drawn) < 0.65
    assert min(drawn) < 0.15
    assert max(drawn) > 0.85


def test_a_small_alpha_leaves_images_almost_alone() -> None:
    drawn = [shares(mixed(MixConfig(mixup_alpha=0.1), step)[1]) for step in range(60)]
    assert sum(min(share, 1 - share) < 0.1 for share in drawn) > 36


def test_cutmix_puts_the_partners_rectangle_into_the_image_and_labels_by_area() -> None:
    image, _ = batch()
    drawn = []
    for step in range(60):
        result, target = mixed(MixConfig(cutmix_alpha=1.0), step)
        own, partner = (result == image).all(1), (result == image.flip(0)).all(1)
        assert (own ^ partner).all()
        assert (partner == partner[0]).all()  # one rectangle for all images
        drawn.append(shares(target))
        assert drawn[-1] == pytest.approx(own[0].float().mean().item(), abs=1e-6)
        rows, columns = partner[0].any(1), partner[0].any(0)
        assert torch.equal(partner[0], rows[:, None] & columns[None, :])
        for line in (rows, columns):
            assert line.int().diff().abs().sum() <= 2  # without gaps
    assert min(drawn) < 0.3
    assert max(drawn) > 0.9


def test_with_both_each_batch_is_mixed_by_one_of_them() -> None:
    image, _ = batch()
    cuts = [(mixed(MixConfig(0.4, 1.0), step)[0] == image).any().item() for step in range(60)]
    assert 15 < sum(cuts) < 45


@pytest.mark.parametrize("config", [MixConfig(mixup_alpha=1.0), MixConfig(cutmix_alpha=1.0), MixConfig(1.0, 1.0)])
def test_draws_depend_on_seed_and_step_alone(config: MixConfig) -> None:
    state = torch.get_rng_state()
    first, again = mixed(config, step=7, seed=5), mixed(config, step=7, seed=5)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], mixed(config, step=8, seed=5)[0])
    assert not torch.equal(first[0], mixed(config, step=7, seed=6)[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", [MixConfig(mixup_alpha=1.0), MixConfig(cutmix_alpha=1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_and_strides_stay_and_the_loaders_batch_too(config: MixConfig, dtype: torch.dtype) -> None:
    image, target = batch(count=5, dtype=dtype)
    before = image.clone()
    result, soft = mix(config, image, target, num_classes=CLASSES, step=2, seed=0)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(image, before)
    assert not torch.equal(result, image)
    assert soft.shape == (5, CLASSES)
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft.sum(1), torch.ones(5))
