"""One turn of a loader in a process of its own. It needs only Python, because a peer's interpreter may have nothing else.

`python -m MODULE LOADER TASK STARTED` runs a loader of `throughput compare`; its last line of output is a JSON object.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.machine import cpu_seconds

WARM_UP_BATCHES = 4  # after the first batch: queues fill up, and memory is allocated
TOLERANCE = 0.05  # of normalized values, for differences in interpolation and rounding

# Endless batches, epoch after epoch; the last batch of an epoch may be smaller. Images: torch float32 `(N, 3, size, size)`;
# labels: N integers. Closing the generator ends its threads and processes.
Batches = Generator[tuple[Any, Any], None, None]


@dataclass(frozen=True)
class Task:
    """The task that all loaders are given."""

    split: str  # "train": random resized crop, flip, normalize; "valid": resize, center crop, normalize
    tars: tuple[str, ...]
    indices: tuple[str, ...]  # index files of the tars, in DALI's format
    list: str  # file with a line `LABEL PATH` for each image, for loaders that read image files
    folder: str  # with the data that the loader has prepared
    batch_size: int
    image_size: int  # in pixels
    resize_shorter: int  # shorter side before the center crop of "valid", in pixels
    scale: tuple[float, float]  # smallest and largest area of the crop of "train"
    ratio: tuple[float, float]  # smallest and largest width/height of the crop of "train"
    mean: tuple[float, float, float]  # of the channels, in [0, 1]
    std: tuple[float, float, float]
    threads: int  # or processes, that decode
    device: str  # of the batches, as torch names it: "cpu", "cuda:0"
    images: int  # to time, after warm-up


def read_task(path: str) -> Task:
    """Reads a task from its JSON file."""
    return Task(**json.loads(Path(path).read_text()))


def read_list(path: str) -> list[tuple[str, int]]:
    """Reads paths and labels from a file with a line `LABEL PATH` for each image."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        pairs = [line.rstrip("\n").split(" ", 1) for line in file]
    return [(name, int(label)) for label, name in pairs]


def main(loaders: Mapping[str, Callable[[Task], Batches]]) -> None:
    """Runs the loader that the command line names. A ValueError says that its batches are not what the task asks for."""
    name, path, started = sys.argv[1:]
    task = read_task(path)
    with contextlib.closing(loaders[name](task)) as batches:
        measure_loader(_counts(task, batches), task.images, float(started), lambda: _synchronize(task))


def measure_loader(counts: Iterator[int], images: int, started: float, synchronize: Callable[[], None] = lambda: None) -> None:
    """Times a loader and prints its figures as JSON.

    Args:
        counts: Sizes of batches, endless.
        images: Images to time, after warm-up.
        started: Start of this process by CLOCK_MONOTONIC, which all processes share.
        synchronize: Waits for the work of a GPU.
    """
    next(counts)
    synchronize()
    first_seconds = time.monotonic() - started
    for _ in range(WARM_UP_BATCHES):
        next(counts)
    synchronize()
    clock, cpu, count = time.monotonic(), cpu_seconds(), 0
    while count < images:
        count += next(counts)
    synchronize()
    seconds, cpu = time.monotonic() - clock, cpu_seconds() - cpu
    print(json.dumps({"first_seconds": first_seconds, "seconds": seconds, "cpu_seconds": cpu, "images": count}))


def _counts(task: Task, batches: Batches) -> Iterator[int]:
    """Copies the batches to the device and yields their sizes; checks the first one when the second is asked for."""
    for number, batch in enumerate(batches):
        if task.device != "cpu":  # the copy from pinned memory does not make the host wait
            batch = tuple(tensor.to(task.device, non_blocking=True) for tensor in batch)
        yield len(batch[1])
        if not number:
            check(task, *batch)


def _synchronize(task: Task) -> None:
    if task.device != "cpu":
        import torch

        torch.cuda.synchronize(task.device)


def check(task: Task, images: Any, labels: Any) -> None:
    """Raises a ValueError if shape, dtype, device, or range of a batch is not what the task asks for."""
    shape, wanted = tuple(images.shape), (len(labels), 3, task.image_size, task.image_size)
    if str(images.device) != task.device:
        raise ValueError(f"gives images on {images.device}; {task.device} was asked for")
    if shape != wanted or not 0 < len(labels) <= task.batch_size or str(images.dtype) != "torch.float32":
        asked = f"torch.float32 (N, 3, {task.image_size}, {task.image_size}) and N labels, N up to {task.batch_size}"
        raise ValueError(f"gives {images.dtype} {shape} and {len(labels)} labels; {asked} were asked for")
    low = min(-mean / std for mean, std in zip(task.mean, task.std, strict=True))
    high = max((1 - mean) / std for mean, std in zip(task.mean, task.std, strict=True))
    least, most = images.min().item(), images.max().item()
    if not (low - TOLERANCE <= least < 0 and most <= high + TOLERANCE):  # pixels from 0 to 1 or to 255 are never negative
        raise ValueError(f"gives values from {least:.2f} to {most:.2f}; normalized values are from {low:.2f} to {high:.2f}")
