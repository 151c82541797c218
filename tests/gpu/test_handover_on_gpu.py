"""A batch is valid until the last kernel has read it, and memory use does not grow."""

from pathlib import Path

import pytest
import torch

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import Loader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DEVICE = torch.device("cuda", 0)
CYCLES = 20_000_000  # of the device's clock, about 10 ms


def make_loader(shards: Path) -> Loader:
    data = DataConfig(train=str(shards), valid=str(shards))
    return build_loader(
        data, LoaderSpec(split="train", batch_size=8, image_size=64, device=DEVICE, dtype=torch.float16, num_threads=2, seed=3)
    )


def fingerprint(image: torch.Tensor) -> torch.Tensor:
    """Returns an integer checksum, which does not depend on the order of summation."""
    return image.view(torch.int16).flatten().to(torch.int64).square().sum()


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
def test_batch_is_not_overwritten_while_kernels_read_it(shards: Path, own_stream: bool) -> None:
    """The host runs far ahead: Python drops each batch long before its kernel starts."""
    with make_loader(shards) as loader:
        expected = []
        for _ in range(8):
            for batch in loader:
                torch.cuda.synchronize()
                expected.append(fingerprint(batch["image"]).item())
    stream = torch.cuda.Stream(DEVICE) if own_stream else torch.cuda.current_stream(DEVICE)
    with make_loader(shards) as loader, torch.cuda.stream(stream):
        late = []
        for _ in range(8):
            for batch in loader:
                torch.cuda._sleep(CYCLES)
                late.append(fingerprint(batch["image"]))
                del batch
        torch.cuda.synchronize()
    assert [each.item() for each in late] == expected


def test_memory_does_not_grow(shards: Path) -> None:
    """Measures torch's memory and the device's, which includes DALI's, over 200 epochs."""
    with make_loader(shards) as loader:

        def used() -> tuple[int, int]:
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info(DEVICE)
            return torch.cuda.memory_allocated(DEVICE), total - free

        for _ in range(20):
            for _ in loader:
                pass
        allocated, in_use = used()
        for _ in range(180):
            for _ in loader:
                pass
        assert used()[0] == allocated
        assert used()[1] <= in_use + 64 * 2**20
