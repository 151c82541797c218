"""Throughput, how long the device waited for data, and which of the two, model or data, sets the pace."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

from pipelines.loader import Batch, Loader

# Of each pass over the data: a pipeline fills its queues then, and in a run's first pass memory is found, kernels are chosen.
WARM_UP_BATCHES = 3
# From here on waiting is worth mending.
DATA_BOUND_PERCENT = 5.0
# Steps by which the host is ahead of a GPU when it reads a loss. A GPU that sets the pace has one and more queued by then; one
# that has less waited for the host while the steps since the last such time were launched.
LAUNCH_BOUND_LEAD = 0.25

Mark = Any  # an instant: seconds on the host's clock, or an event in the GPU's stream


@dataclass
class Rates:
    """Sums over a stretch of training.

    Attributes:
        images: Images that were trained on.
        seconds: The time that this took.
        wait_seconds: The part of it in which the device had no batch.
        launch_bound_images: Those of `images` in whose steps a GPU waited for the CPU to launch its work.
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
    """What sets the pace, in one line.

    Args:
        device_type: "cuda" or "cpu".
        wait_percent: Part of the time in which the device waits for data.
        own_rate_percent: The rate, of that which the model has without waiting and without loading. Where it has not been
            measured, it is what waiting leaves.
        cause: What to say about data that is waited for, where more is known than for how long.
        launch_bound_percent: Part of the steps in which the GPU waited for the CPU to launch its work.
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
    """On a CPU a step is done when it returns: the host's clock will do."""

    def mark(self) -> Mark:
        return time.perf_counter()

    def wait(self, mark: Mark) -> float:
        return math.inf  # nothing is launched ahead, and nothing waits for it

    def seconds(self, start: Mark, end: Mark) -> float:
        return float(end - start)


class _CUDAClock:
    """On a GPU work is queued: the host's clock says little, and waiting for the device at each step would cost throughput.

    An event is put into the stream instead, and read when the caller takes the rates, as it does to log a loss. Between one
    after a step's work and one when the next batch is there the device had nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: Mark) -> float:
        """Waits until the device gets there; the seconds by which the host was ahead of it."""
        start = time.perf_counter()
        mark.synchronize()
        return time.perf_counter() - start

    def seconds(self, start: Mark, end: Mark) -> float:
        return float(start.elapsed_time(end)) / 1000


@dataclass(frozen=True)
class _Taken:
    """A batch: when it was asked for, when it was there, how many images it has."""

    asked: Mark
    arrived: Mark
    images: int


class Meter:
    """Counts images and time while training runs over `batches()`, and only then.

    Attributes:
        total: Since the beginning, up to the last `take()`.
        warm_up: Of the first `WARM_UP_BATCHES` batches of the last pass over `batches()` and their steps: what the start of a
            pipeline, and in a run's first pass of everything else, costs.
        steady: Of the batches after those.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock: _CUDAClock | _CPUClock = _CUDAClock(device) if device.type == "cuda" else _CPUClock()
        self._taken: list[_Taken] = []
        self._since = self._clock.mark()
        self._num_counted = 0  # batches of this pass that are in its rates
        self.total, self.warm_up, self.steady = Rates(), Rates(), Rates()

    def batches(self, loader: Loader) -> Iterator[Batch]:
        """One epoch of the loader, or what is left of it, measured. A pause between two (validation, say) does not count."""
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
        """The rates since the last call, or since the epoch began; on a GPU this waits for the work queued so far."""
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
