"""Measures throughput and data wait, and tells whether the model or the data limits the pace."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

from pipelines.loader import Batch, Loader

# A pipeline fills its queues during the first batches of each epoch. In a run's first epoch, memory is allocated and kernels
# are selected then, too.
WARM_UP_BATCHES = 3
# Data wait from which a run counts as data-bound.
DATA_BOUND_PERCENT = 5.0
# How far the host is ahead of a GPU when it reads a loss, in steps. If the GPU limits the pace, at least one step is queued. If
# the lead is below this value, the GPU has waited for the host to launch the steps.
LAUNCH_BOUND_LEAD = 0.25

Mark = Any  # an instant: seconds on the host's clock, or an event in the GPU's stream


@dataclass
class Rates:
    """Totals over a stretch of training.

    Attributes:
        images: Training images.
        seconds: Elapsed time.
        wait_seconds: Time in which the device had no batch.
        launch_bound_images: Images in whose steps a GPU waited for the CPU to launch its work.
    """

    images: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    launch_bound_images: int = 0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def data_wait_percent(self) -> float:
        return min(100.0, 100 * self.wait_seconds / self.seconds) if self.seconds else 0.0

    @property
    def launch_bound_percent(self) -> float:
        return 100 * self.launch_bound_images / self.images if self.images else 0.0

    def add(self, other: "Rates") -> None:
        self.images += other.images
        self.seconds += other.seconds
        self.wait_seconds += other.wait_seconds
        self.launch_bound_images += other.launch_bound_images


def verdict(
    device_type: str,
    wait_percent: float,
    own_rate_percent: float | None = None,
    cause: str = "",
    launch_bound_percent: float = 0.0,
) -> str:
    """Returns one line that says what limits the pace.

    Args:
        device_type: "cuda" or "cpu".
        wait_percent: Share of the time in which the device waits for data.
        own_rate_percent: The rate relative to the model's rate without data loading. If None, 100 minus `wait_percent`.
        cause: Text about the data wait that replaces its share, if the caller knows more.
        launch_bound_percent: Share of the steps in which the GPU waited for the CPU to launch its work.
    """
    if wait_percent >= DATA_BOUND_PERCENT:
        return f"data-bound{cause or f': waits {wait_percent:.0f} % of the time for data'}"
    if launch_bound_percent > 50:
        return (
            f"launch-bound: in {launch_bound_percent:.0f} % of the steps the GPU waited for the CPU to launch its work; "
            "--compile reduce-overhead or a larger --batch-size helps"
        )
    own_rate_percent = 100 - wait_percent if own_rate_percent is None else own_rate_percent
    return f"{'GPU' if device_type == 'cuda' else 'compute'}-bound: {own_rate_percent:.1f} % of the model's own rate"


class _CPUClock:
    """The host's clock: on a CPU a step is done when it returns."""

    def mark(self) -> Mark:
        return time.perf_counter()

    def wait(self, mark: Mark) -> float:
        return math.inf  # a CPU step is never launched ahead, so the CPU is never launch-bound

    def seconds(self, start: Mark, end: Mark) -> float:
        return float(end - start)


class _CUDAClock:
    """Events in the GPU's stream: work is queued, and waiting for the device at each step would cost throughput.

    The events are read when the caller takes the rates, as it does to log a loss. The device was idle between the event after a
    step's work and the event at the arrival of the next batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: Mark) -> float:
        """Waits until the device reaches the mark, and returns the seconds by which the host was ahead."""
        start = time.perf_counter()
        mark.synchronize()
        return time.perf_counter() - start

    def seconds(self, start: Mark, end: Mark) -> float:
        return float(start.elapsed_time(end)) / 1000


@dataclass(frozen=True)
class _Taken:
    """A batch: when it was requested, when it arrived, and its number of images."""

    asked: Mark
    arrived: Mark
    images: int


class Meter:
    """Counts images and time while training iterates over `batches()`.

    Attributes:
        total: Totals from the beginning to the last `take()`.
        warm_up: Totals of the first `WARM_UP_BATCHES` batches of the last epoch, with their steps.
        steady: Totals of the batches after those.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock: _CUDAClock | _CPUClock = _CUDAClock(device) if device.type == "cuda" else _CPUClock()
        self._taken: list[_Taken] = []
        self._since = self._clock.mark()
        self._num_counted = 0  # batches of this epoch that are in its totals
        self.total, self.warm_up, self.steady = Rates(), Rates(), Rates()

    def batches(self, loader: Loader) -> Iterator[Batch]:
        """Yields the remaining batches of the loader's epoch. Time between two epochs, for validation say, does not count."""
        loader.reset()
        self._taken.clear()
        self._num_counted = 0
        self.warm_up, self.steady = Rates(), Rates()
        self._since = self._clock.mark()
        while True:
            asked = self._clock.mark()
            with record_function("data: next batch"):
                batch = loader.next()
            if batch is None:
                return
            self._taken.append(_Taken(asked, self._clock.mark(), len(batch["target"])))
            yield batch

    def take(self) -> Rates:
        """Returns the totals since the last call or the beginning of the epoch. On a GPU it waits for all queued work."""
        end = self._clock.mark()
        lead_seconds = self._clock.wait(end)
        waits = [self._clock.seconds(batch.asked, batch.arrived) for batch in self._taken]
        step_seconds = (self._clock.seconds(self._since, end) - sum(waits)) / max(1, len(waits))
        is_launch_bound = lead_seconds < LAUNCH_BOUND_LEAD * step_seconds
        ends = [*(batch.asked for batch in self._taken[1:]), end]
        rates = Rates()
        for batch, wait_seconds, until in zip(self._taken, waits, ends, strict=False):
            seconds = self._clock.seconds(self._since, until)
            of_batch = Rates(batch.images, seconds, wait_seconds, batch.images if is_launch_bound else 0)
            rates.add(of_batch)
            (self.warm_up if self._num_counted < WARM_UP_BATCHES else self.steady).add(of_batch)
            self._num_counted += 1
            self._since = until
        self._taken.clear()
        self._since = end
        self.total.add(rates)
        return rates
