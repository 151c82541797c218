"""What the meter says of a real stream."""

import time

import pytest
import torch

from pipelines.meter import Meter
from pipelines.shards.order import Deal, InOrder
from pipelines.synthetic import SyntheticLoader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize(("host_seconds", "cycles", "percent"), [(0.01, 1_000_000, 100.0), (0.0, 20_000_000, 0.0)])
def test_which_of_host_and_device_sets_the_pace(host_seconds: float, cycles: int, percent: float) -> None:
    """Steps of some 0.5 ms on the device and 10 on the host, and the other way round."""
    deal = Deal(InOrder([80], 1), True, 8, 0, 1)
    loader = SyntheticLoader(deal, image_size=32, device=DEVICE, dtype=torch.float16, num_classes=2)
    meter = Meter(DEVICE)
    for _ in meter.batches(loader):
        time.sleep(host_seconds)
        torch.cuda._sleep(cycles)
    rates = meter.take()
    assert rates.launch_bound_percent == percent
    assert rates.images == 80
    assert rates.data_wait_percent < 5
