"""The loaders' contract on a GPU, and its pixels against the CPU's. Run by hand: `pytest tests/gpu`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines import Loader, open_shards
from pipelines.loader import STD
from tests import loader_contract as contract

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

GPU = torch.device("cuda", 0)


@pytest.fixture(params=[torch.float16, torch.float32], ids=["float16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def make(shards: Path, dtype: torch.dtype) -> Callable[[str], Loader]:
    return lambda split: contract.make_loader(shards, "dali", split, GPU, dtype)


def test_batches(make: Callable[[str], Loader], dtype: torch.dtype) -> None:
    contract.check_batches(make, GPU, dtype)


def test_epochs(make: Callable[[str], Loader]) -> None:
    contract.check_epochs(make)


def test_ancestors_training_loop(make: Callable[[str], Loader]) -> None:
    contract.check_ancestors_loop(make)


def test_batches_stay(make: Callable[[str], Loader]) -> None:
    contract.check_batches_stay(make)


def test_two_loaders_at_once(make: Callable[[str], Loader]) -> None:
    contract.check_two_at_once(make)


def test_every_valid_sample_exactly_once(shards: Path) -> None:
    def make_ranked(batch_size: int, rank: int, world_size: int) -> Loader:
        return contract.make_loader(shards, "dali", "valid", GPU, batch_size=batch_size, rank=rank, world_size=world_size)

    contract.check_every_sample_once(make_ranked, open_shards(str(shards), "valid").labels())


def test_the_old_pair_on_the_gpu(shards: Path) -> None:
    contract.check_batches(lambda split: contract.make_loader(shards, "pillow", split, GPU), GPU, torch.float32)


def test_valid_pixels_are_the_cpus(make: Callable[[str], Loader], shards: Path) -> None:
    """Within what another JPEG decoder (nvJPEG) and half precision leave."""
    with make("valid") as gpu, contract.make_loader(shards, "dali", "valid", torch.device("cpu")) as cpu:
        for ours, reference in zip(gpu, cpu, strict=True):
            assert torch.equal(ours["target"].cpu(), reference["target"])
            difference = (ours["image"].float().cpu() - reference["image"]) * 255 * torch.tensor(STD).view(3, 1, 1)
            assert difference.abs().mean().item() < 1.5
