"""The loaders on a GPU."""

from pathlib import Path

import pytest
import torch

from pipelines.loader import STD
from tests.helpers.loader_contract import Make, ShardLoaderContract, make_loader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


class TestOnGPU(ShardLoaderContract):
    @pytest.fixture(params=["dali-float16", "dali-float32", "pillow-float32"])
    def kind(self, request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
        backend, dtype = request.param.split("-")
        return backend, getattr(torch, dtype)

    @pytest.fixture
    def backend(self, kind: tuple[str, torch.dtype]) -> str:
        return kind[0]

    @pytest.fixture
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    @pytest.fixture
    def dtype(self, kind: tuple[str, torch.dtype]) -> torch.dtype:
        return kind[1]

    def test_valid_pixels_match_the_cpu(self, make: Make, shards: Path) -> None:
        """The JPEG decoder (nvJPEG), DALI's resizing and half precision cause small differences."""
        with make("valid") as gpu, make_loader(shards, "dali", "valid", torch.device("cpu")) as cpu:
            for ours, reference in zip(gpu, cpu, strict=True):
                assert torch.equal(ours["target"].cpu(), reference["target"])
                difference = (ours["image"].float().cpu() - reference["image"]) * 255 * torch.tensor(STD).view(3, 1, 1)
                assert difference.abs().mean().item() < 1
