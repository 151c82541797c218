"""Throughput, and how long the device waited for data."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.profiler import record_function

from pipelines.loader import Batch, Loader


@dataclass
class Rates:
    """Sums over a stretch of training; `wait_seconds` is the part of `seconds` in which the device had no batch."""

    images: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def data_wait_percent(self) -> float:
        return min(100.0, 100 * self.wait_seconds / self.seconds) if self.seconds else 0.0


@dataclass
class _CPUWait:
    """On a CPU the step is done when it returns, so the wait is the time spent in the loader's `next`."""

    seconds: float = 0.0
    _asked: float = 0.0

    def asked(self) -> None:
        self._asked = time.perf_counter()

    def arrived(self) -> None:
        self.seconds += time.perf_counter() - self._asked

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass
class _CUDAWait:
    """On a GPU, work is queued: the time in `next` says little, and waiting for the device at each step would cost throughput.

    Two events a step are put into the stream instead, one after the step's work and one when the next batch is there. What
    lies between them the device spent without work. They are read when the caller takes the sum, as it does to log a loss.
    """

    device: torch.device
    _gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    _idle_from: torch.cuda.Event | None = None

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def asked(self) -> None:
        self._idle_from = self._record()

    def arrived(self) -> None:
        assert self._idle_from is not None
        self._gaps.append((self._idle_from, self._record()))

    def take(self) -> float:
        if self._gaps:
            self._gaps[-1][1].synchronize()
        milliseconds = sum(start.elapsed_time(end) for start, end in self._gaps)
        self._gaps.clear()
        return milliseconds / 1000


class Meter:
    """Counts images and time while training runs over `batches()`, and only then.

    Attributes:
        total: Since the beginning, up to the last `take()`.
    """

    def __init__(self, device: torch.device) -> None:
        self._wait = _CUDAWait(device) if device.type == "cuda" else _CPUWait()
        self._images = 0
        self._since = time.perf_counter()
        self.total = Rates()

    def batches(self, loader: Loader) -> Iterator[Batch]:
        """One epoch of the loader, measured. A pause between two epochs (validation, say) does not count."""
        loader.reset()
        self._wait.take()
        self._images, self._since = 0, time.perf_counter()
        while True:
            self._wait.asked()
            with record_function("data: next batch"):
                batch = loader.next()
            if batch is None:
                return
            self._wait.arrived()
            self._images += len(batch["target"])
            yield batch

    def take(self) -> Rates:
        """The rates since the last call, or since the epoch began; on a GPU this waits for the work queued so far."""
        wait_seconds = self._wait.take()
        now = time.perf_counter()
        rates = Rates(self._images, now - self._since, wait_seconds)
        self._images, self._since = 0, now
        self.total.images += rates.images
        self.total.seconds += rates.seconds
        self.total.wait_seconds += rates.wait_seconds
        return rates
