"""The meter on a clock that the test controls, and the verdict on its figures."""

from types import SimpleNamespace

import pytest
import torch

from pipelines.loader import Batch
from pipelines.meter import Meter, Rates, verdict
from pipelines.spec import LoaderSpec
from pipelines.synthetic import SyntheticLoader


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class SlowLoader(SyntheticLoader):
    """Gives batches of 8 samples after 3 seconds each. The first one may be slower."""

    def __init__(self, clock: Clock, num_batches: int = 4, first_seconds: float = 3) -> None:
        spec = LoaderSpec(split="train", batch_size=8, image_size=1, device=torch.device("cpu"), num_classes=2)
        super().__init__(8 * num_batches, spec)
        self.clock, self.first_seconds, self.is_first = clock, first_seconds, True

    def next(self) -> Batch | None:
        batch = super().next()
        if batch is not None:
            self.clock.now += self.first_seconds if self.is_first else 3
            self.is_first = False
        return batch


def test_wait_and_rate_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("pipelines.meter.time", SimpleNamespace(perf_counter=clock))
    meter = Meter(torch.device("cpu"))
    for _ in range(2):
        clock.now += 1000  # validation, which does not count
        for _ in meter.batches(SlowLoader(clock)):
            clock.now += 1  # the step
        rates = meter.take()
        assert rates.images_per_second == pytest.approx(32 / 16)
        assert rates.data_wait_percent == pytest.approx(75)
    assert meter.total.images == 64
    assert meter.total.seconds == pytest.approx(32)
    assert meter.total.data_wait_percent == pytest.approx(75)


def test_the_first_batches_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each epoch, wherever the rates are taken. The totals include them."""
    clock = Clock()
    monkeypatch.setattr("pipelines.meter.time", SimpleNamespace(perf_counter=clock))
    meter = Meter(torch.device("cpu"))
    for take_after in (2, 3, 5):
        taken = Rates()
        for number, _ in enumerate(meter.batches(SlowLoader(clock, num_batches=5, first_seconds=60)), 1):
            clock.now += 40 if number == 1 else 1
            if number in (take_after, 5):
                taken.add(meter.take())
                clock.now += 0.5  # logging, which counts for the next step
        slow = 0.5 if take_after == 2 else 0
        assert meter.warm_up == Rates(images=24, seconds=60 + 40 + 2 * (3 + 1) + slow, wait_seconds=60 + 2 * 3)
        slow = 0.5 if take_after == 3 else 0
        assert meter.steady == Rates(images=16, seconds=2 * (3 + 1) + slow, wait_seconds=2 * 3)
        meter.warm_up.add(meter.steady)
        assert meter.warm_up == taken
    assert meter.total.images == 3 * 40
    next(meter.batches(SlowLoader(clock)))
    assert meter.steady == meter.warm_up == Rates()


@pytest.mark.parametrize(
    ("device_type", "wait", "own", "cause", "text"),
    [
        ("cuda", 0.7, None, "", "GPU-bound: 99.3 % of the model's own rate"),
        ("cpu", 4.9, None, "", "compute-bound: 95.1 % of the model's own rate"),
        ("cpu", 0.4, 88.0, " by decode", "compute-bound: 88.0 % of the model's own rate"),
        ("cuda", 23.4, None, "", "data-bound: waits 23 % of the time for data"),
        ("cpu", 5.0, 94.0, " by decode: loader 9 img/s", "data-bound by decode: loader 9 img/s"),
    ],
)
def test_verdict(device_type: str, wait: float, own: float | None, cause: str, text: str) -> None:
    assert verdict(device_type, wait, own, cause) == text


def test_verdict_where_the_host_is_too_slow() -> None:
    assert verdict("cuda", 1.0, launch_bound_percent=93.2).startswith("launch-bound: in 93 % of the steps the GPU waited")
    assert verdict("cuda", 5.0, launch_bound_percent=93.2) == "data-bound: waits 5 % of the time for data"
    assert verdict("cuda", 1.0, launch_bound_percent=50.0) == "GPU-bound: 99.0 % of the model's own rate"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The host's clock, and a GPU's stream: the host only queues work, and the device finishes it at `done`."""
    clock = Clock()
    device = SimpleNamespace(done=100.0, clock=clock)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            device.done = max(device.done, clock.now)  # an event follows the work queued before it
            self.at = device.done

        def synchronize(self) -> None:
            clock.now = max(clock.now, device.done)

        def elapsed_time(self, other: "Event") -> float:
            return 1000 * (other.at - self.at)

    monkeypatch.setattr("pipelines.meter.time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return device


@pytest.mark.parametrize(("step_seconds", "idle_seconds"), [(1.0, 9.0), (12.0, 3.0)])
def test_wait_on_a_gpu_is_what_its_stream_idles(gpu: SimpleNamespace, step_seconds: float, idle_seconds: float) -> None:
    """The device starts a step once the batch has arrived and the previous step is done.

    With steps of 1 second it idles while it waits for the loader. With steps of 12 seconds it idles only for the first batch.
    """
    clock, device = gpu.clock, gpu
    meter = Meter(torch.device("cuda", 0))
    for _ in meter.batches(SlowLoader(clock)):
        device.done = max(device.done, clock.now) + step_seconds
    rates = meter.take()
    assert clock.now == device.done  # the caller is about to read the loss
    assert rates.seconds == pytest.approx(3 + 3 * max(3, step_seconds) + step_seconds)
    assert (meter.warm_up.images, meter.steady.images) == (24, 8)
    assert rates.wait_seconds == pytest.approx(idle_seconds)
    assert rates.images == 32


@pytest.mark.parametrize(
    ("launch_seconds", "kernel_seconds", "percent"),
    [(10.0, 4.0, 100.0), (10.0, 9.0, 100.0), (5.0, 12.0, 0.0), (0.1, 12.0, 0.0)],
)
def test_a_gpu_that_waits_for_the_host_is_told(
    gpu: SimpleNamespace, launch_seconds: float, kernel_seconds: float, percent: float
) -> None:
    """The host launches the ten kernels of a step one by one. The loader is slow at first, then takes 3 seconds."""
    meter = Meter(torch.device("cuda", 0))
    loader = SlowLoader(gpu.clock, num_batches=6, first_seconds=500)
    for _ in meter.batches(loader):
        for _ in range(10):
            gpu.clock.now += launch_seconds / 10
            gpu.done = max(gpu.done, gpu.clock.now) + kernel_seconds / 10
    assert meter.take().launch_bound_percent == percent
    assert meter.steady.launch_bound_percent == meter.warm_up.launch_bound_percent == percent
