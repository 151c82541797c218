"""The contract of `pipelines.Loader`, for each implementation that runs without a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines import Loader, open_shards
from tests import loader_contract as contract

CPU = torch.device("cpu")


@pytest.fixture(params=["dali", "pillow"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(shards: Path, backend: str) -> Callable[[str], Loader]:
    return lambda split: contract.make_loader(shards, backend, split, CPU)


def test_batches(make: Callable[[str], Loader]) -> None:
    contract.check_batches(make, CPU, torch.float32)


def test_epochs(make: Callable[[str], Loader]) -> None:
    contract.check_epochs(make)


def test_ancestors_training_loop(make: Callable[[str], Loader]) -> None:
    contract.check_ancestors_loop(make)


def test_batches_stay(make: Callable[[str], Loader]) -> None:
    contract.check_batches_stay(make)


def test_two_loaders_at_once(make: Callable[[str], Loader]) -> None:
    contract.check_two_at_once(make)


def test_reproducible(shards: Path, backend: str) -> None:
    def make_seeded(seed: int) -> Loader:
        torch.manual_seed(seed)  # Pillow's augmentation draws from torch's generator
        return contract.make_loader(shards, backend, "train", CPU, seed=seed)

    contract.check_reproducible(make_seeded)


def test_every_valid_sample_exactly_once(shards: Path, backend: str) -> None:
    def make_ranked(batch_size: int, rank: int, world_size: int) -> Loader:
        return contract.make_loader(shards, backend, "valid", CPU, batch_size=batch_size, rank=rank, world_size=world_size)

    contract.check_every_sample_once(make_ranked, open_shards(str(shards), "valid").labels())


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_have_equally_many_training_batches(shards: Path, backend: str, world_size: int) -> None:
    for rank in range(world_size):
        loader = contract.make_loader(shards, backend, "train", CPU, rank=rank, world_size=world_size)
        with loader:
            assert len(loader) == contract.NUM_TRAIN // world_size // contract.BATCH_SIZE
            for _ in range(3):
                assert len(list(loader)) == len(loader)


def test_too_few_training_samples(shards: Path, backend: str) -> None:
    with pytest.raises(ValueError, match=r"61 training samples over 1 rank\(s\) do not fill one batch of 62"):
        contract.make_loader(shards, backend, "train", CPU, batch_size=62)


def test_pillow_workers(shards: Path) -> None:
    """The pair with worker processes, as it was used."""
    with contract.make_loader(shards, "pillow", "valid", CPU, num_threads=2) as loader:
        assert sum(len(batch["target"]) for batch in loader) == contract.NUM_VALID
