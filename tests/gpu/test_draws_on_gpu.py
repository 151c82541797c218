"""Random crops and flips do not depend on the device."""

from pathlib import Path

import pytest
import torch

from tests.helpers.loader_contract import make_loader, take

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def test_crops_and_flips_match_the_cpu(shards: Path) -> None:
    """Decoding and resizing differ by a few gray levels; another crop would differ much more."""
    found = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        with make_loader(shards, "dali", "train", device) as loader:
            found.append([(batch["image"].float().cpu(), batch["target"].cpu()) for batch in take(loader, 10)])
    for (image, target), (other, same_target) in zip(*found, strict=True):
        assert torch.equal(target, same_target)
        assert (image - other).abs().mean() < 0.1  # the values have a standard deviation of 1
