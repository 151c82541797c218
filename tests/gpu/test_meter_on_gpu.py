"""The meter on a CUDA stream."""

import time

import pytest
import torch

from pipelines.meter import Meter
from pipelines.spec import LoaderSpec
from pipelines.synthetic import SyntheticLoader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize(("host_seconds", "cycles", "percent"), [(0.01, 1_000_000, 100.0), (0.0, 20_000_000, 0.0)])
def test_launch_bound_share(host_seconds: float, cycles: int, percent: float) -> None:
    """Steps take about 0.5 ms on the device and 10 ms on the host, then 10 ms and almost none."""
    spec = LoaderSpec(split="train", batch_size=8, image_size=32, device=DEVICE, dtype=torch.float16, num_classes=2)
    loader = SyntheticLoader(80, spec)
    meter = Meter(DEVICE)
    for _ in meter.batches(loader):
        time.sleep(host_seconds)
        torch.cuda._sleep(cycles)
    rates = meter.take()
    assert rates.launch_bound_percent == percent
    assert rates.images == 80
    assert rates.data_wait_percent < 5
