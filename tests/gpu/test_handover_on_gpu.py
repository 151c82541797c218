"""A batch stays what it is until the last kernel that was given it has read it; and memory does not grow."""

from pathlib import Path

import pytest
import torch

from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.loader import Loader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DEVICE = torch.device("cuda", 0)
CYCLES = 20_000_000  # of the device's clock, some 10 ms


def make_loader(shards: Path) -> Loader:
    data = DataConfig(train=str(shards), valid=str(shards))
    return build_loader(data, "train", batch_size=8, image_size=64, device=DEVICE, dtype=torch.float16, num_threads=2, seed=3)


def fingerprint(image: torch.Tensor) -> torch.Tensor:
    """A number that hardly two images have in common, exact whatever the order of the additions."""
    return image.view(torch.int16).flatten().to(torch.int64).square().sum()


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
def test_a_batch_is_not_overwritten_while_it_is_read(shards: Path, own_stream: bool) -> None:
    """The host runs far ahead: each batch is dropped in Python long before its kernel begins."""
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


def test_memory_stays_the_same(shards: Path) -> None:
    """Over 200 epochs, of torch's memory and of the device's, in which DALI's is too."""
    with make_loader(shards) as loader:

        def used() -> tuple[int, int]:
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info(DEVICE)
            return torch.cuda.memory_allocated(DEVICE), total - free

        for _ in range(20):
            for _ in loader:
                pass
        allocated, taken = used()
        for _ in range(180):
            for _ in loader:
                pass
        assert used()[0] == allocated
        assert used()[1] <= taken + 64 * 2**20
