"""The loaders on a CPU."""

import gc
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import DataConfig
from pipelines.dali.cpu_resize import WholeResize
from pipelines.dali.operators import Preprocessing
from pipelines.dali.part import Graph
from pipelines.spec import LoaderSpec
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


@pytest.mark.parametrize("what", ["loader", "graph"])
def test_a_fork_leaves_the_pipelines_of_its_parent_alone(shards: Path, what: str) -> None:
    """The workers of a DataLoader are forks. Their garbage collector may find a pipeline that nobody closed.

    On a CPU, a thread holds the graphs. On a GPU, nothing but the loader does.
    """
    device = torch.device("cpu")
    if what == "loader":
        unclosed: Any = make_loader(shards, "dali", "valid", device)
        unclosed.next()
    else:
        spec, resize = LoaderSpec(split="train", batch_size=4, device=device), WholeResize(size=32)
        unclosed = Graph(DataConfig(), spec, Preprocessing(), resize, "normalize", batch_size=4, num_threads=1)
    gc.disable()  # the worker finds it, not this process
    try:
        unclosed.itself = unclosed
        del unclosed
        worker = multiprocessing.get_context("fork").Process(target=gc.collect)
        worker.start()
        worker.join(60)
        worker.kill()
        worker.join()
        assert worker.exitcode == 0
    finally:
        gc.enable()
