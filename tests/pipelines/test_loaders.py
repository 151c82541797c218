"""The loaders on a CPU."""

import gc
import multiprocessing
from pathlib import Path

import pytest
import torch

from tests.helpers.loader_contract import NUM_VALID, LoaderContract, ShardLoaderContract, make_loader


class OnCPU:
    @pytest.fixture
    def device(self) -> torch.device:
        return torch.device("cpu")

    @pytest.fixture
    def dtype(self) -> torch.dtype:
        return torch.float32


class TestShardsOnCPU(OnCPU, ShardLoaderContract):
    @pytest.fixture(params=["dali", "pillow"])
    def backend(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)


class TestSyntheticOnCPU(OnCPU, LoaderContract):
    @pytest.fixture
    def backend(self) -> str:
        return "synthetic"


def test_pillow_workers(shards: Path) -> None:
    """The old pair works with worker processes, too."""
    with make_loader(shards, "pillow", "valid", torch.device("cpu"), num_threads=2) as loader:
        assert sum(len(batch["target"]) for batch in loader) == NUM_VALID


def test_a_fork_leaves_the_pipelines_of_its_parent_alone(shards: Path) -> None:
    """The workers of a DataLoader are forks. Their garbage collector may find a pipeline that nobody closed."""
    loader = make_loader(shards, "dali", "valid", torch.device("cpu"))
    loader.next()
    gc.disable()  # the worker finds it, not this process
    try:
        loader.itself = loader  # type: ignore[attr-defined]
        del loader
        worker = multiprocessing.get_context("fork").Process(target=gc.collect)
        worker.start()
        worker.join(60)
        worker.kill()
        worker.join()
        assert worker.exitcode == 0
    finally:
        gc.enable()
