"""Settings that change only the speed of the loader, on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.loader_contract import make_loader, same, take

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_load_of_the_hardware_decoder(shards: Path, split: str) -> None:
    """Every load gives the same samples and crops, and nearly the same pixels."""
    epochs = []
    for load in (None, 0.0, 1.0):
        with make_loader(shards, "dali", split, GPU, data={"hw_decoder_load": load}) as loader:
            epochs.append(list(loader))
    for batches in epochs[1:]:
        for ours, reference in zip(batches, epochs[0], strict=True):
            assert torch.equal(ours["target"], reference["target"])
            assert (ours["image"] - reference["image"]).abs().mean().item() < 0.05


@pytest.mark.parametrize("prefetch", [1, 4])
def test_prefetch_changes_no_batch(shards: Path, prefetch: int) -> None:
    def batches(**data: Any) -> list[Any]:
        with make_loader(shards, "dali", "train", GPU, data=data) as loader:
            return take(loader, 16)

    assert same(batches(prefetch=prefetch), batches())
