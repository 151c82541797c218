"""The meter, on a clock that the test moves."""

from types import SimpleNamespace

import pytest
import torch

from pipelines import Batch
from pipelines.meter import Meter
from pipelines.synthetic import SyntheticLoader


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class SlowLoader(SyntheticLoader):
    """Four batches of 8, each after 3 seconds."""

    def __init__(self, clock: Clock) -> None:
        cpu = torch.device("cpu")
        super().__init__(32, train=True, batch_size=8, image_size=1, device=cpu, dtype=torch.float32, num_classes=2)
        self.clock = clock

    def next(self) -> Batch | None:
        batch = super().next()
        self.clock.now += 3 if batch is not None else 0
        return batch


def test_wait_and_rate_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("pipelines.meter.time", SimpleNamespace(perf_counter=clock))
    meter = Meter(torch.device("cpu"))
    for _ in range(2):
        clock.now += 1000  # a validation pause, which does not count
        for _ in meter.batches(SlowLoader(clock)):
            clock.now += 1  # the step
        rates = meter.take()
        assert rates.images_per_second == pytest.approx(32 / 16)
        assert rates.data_wait_percent == pytest.approx(75)
    assert meter.total.images == 64
    assert meter.total.seconds == pytest.approx(32)
    assert meter.total.data_wait_percent == pytest.approx(75)


@pytest.mark.parametrize(("step_seconds", "idle_seconds"), [(1.0, 9.0), (12.0, 3.0)])
def test_wait_on_a_gpu_is_what_its_stream_idles(
    monkeypatch: pytest.MonkeyPatch, step_seconds: float, idle_seconds: float
) -> None:
    """The host only queues work. The device starts a step when the batch is there and the step before is done.

    With steps of 1 second it idles as long as the loader takes, but for the step that runs meanwhile; with steps of 12 seconds
    only for the first batch.
    """
    clock, device = Clock(), SimpleNamespace(done=100.0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            device.done = max(device.done, clock.now)  # an event comes after what was queued before it
            self.at = device.done

        def synchronize(self) -> None:
            clock.now = max(clock.now, device.done)

        def elapsed_time(self, other: "Event") -> float:
            return 1000 * (other.at - self.at)

    monkeypatch.setattr("pipelines.meter.time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    meter = Meter(torch.device("cuda", 0))
    for _ in meter.batches(SlowLoader(clock)):
        device.done = max(device.done, clock.now) + step_seconds
    clock.now = max(clock.now, device.done)  # reading the loss waits for the device
    rates = meter.take()
    assert rates.wait_seconds == pytest.approx(idle_seconds)
    assert rates.images == 32
