"""A loader's turn in `throughput compare`. It needs nothing but Python, as a peer's interpreter may have nothing else.

Each turn is a process of its own, `python -m MODULE LOADER TASK STARTED`, the last line of which is a JSON object.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_UP_BATCHES = 4  # after the first: until queues are full and memory is found
TOLERANCE = 0.05  # of normalized values, for what interpolation and another order of arithmetic may do
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Task:
    """What all loaders are given to do.

    Attributes:
        split: "train": random resized crop, flip, normalize. "valid": resize, centre crop, normalize.
        tars: The shards.
        indices: Their index files, as DALI wants them.
        list: File with a line `LABEL PATH` for each image, the same images as files; there for those alone who read files.
        folder: Where the loader finds what it has been given time to prepare.
        batch_size: Images a batch.
        image_size: Side of the images, pixels.
        resize_shorter: In "valid", of the shorter side before the crop.
        scale: In "train", smallest and largest area of the crop.
        ratio: In "train", smallest and largest width/height of the crop.
        mean: Of the channels, in [0, 1].
        std: The same.
        threads: Threads or processes that decode.
        device: Where the batches are wanted, as torch calls it: "cpu", "cuda:0".
        images: To give in a turn, epoch after epoch.
    """

    split: str
    tars: tuple[str, ...]
    indices: tuple[str, ...]
    list: str
    folder: str
    batch_size: int
    image_size: int
    resize_shorter: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    threads: int
    device: str
    images: int


# Gives batches without end, epoch after epoch, the last of an epoch as large as it comes: images float32 `(N, 3, size, size)`
# and N labels, torch's tensors. Closed, it ends its threads and processes.
Batches = Generator[tuple[Any, Any], None, None]


def main(loaders: Mapping[str, Callable[[Task], Batches]]) -> None:
    """Takes the turn that the command line asks for.

    Raises:
        ValueError: What the loader gives is not what was asked for.
    """
    name, path, started = sys.argv[1:]
    task = read_task(path)
    with contextlib.closing(loaders[name](task)) as loaded:
        batches = on_device(task, loaded)
        images, labels = next(batches)
        synchronize(task)
        # CLOCK_MONOTONIC, which all processes have in common.
        first_seconds = time.monotonic() - float(started)
        check(task, images, labels)
        for _ in range(WARM_UP_BATCHES):
            next(batches)
        synchronize(task)
        clock, cpu, count = time.monotonic(), cpu_seconds(os.getpid()), 0
        while count < task.images:
            count += len(next(batches)[1])
        synchronize(task)
        seconds, cpu = time.monotonic() - clock, cpu_seconds(os.getpid()) - cpu
    print(json.dumps({"first_seconds": first_seconds, "seconds": seconds, "cpu_seconds": cpu, "images": count}))


def on_device(task: Task, batches: Batches) -> Iterator[tuple[Any, Any]]:
    """The batches where they are wanted; a copy from pinned memory does not make the host wait."""
    for images, labels in batches:
        if task.device == "cpu":
            yield images, labels
        else:
            yield images.to(task.device, non_blocking=True), labels.to(task.device, non_blocking=True)


def synchronize(task: Task) -> None:
    """Waits for a GPU's work."""
    if task.device != "cpu":
        import torch

        torch.cuda.synchronize(task.device)


def read_task(path: str) -> Task:
    """Out of a JSON file with its attributes as keys."""
    return Task(**json.loads(Path(path).read_text()))


def check(task: Task, images: Any, labels: Any) -> None:
    """Whether a batch is what all are to give, as far as numbers tell; it may be smaller than was asked for.

    Raises:
        ValueError: It is not.
    """
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
        raise ValueError(f"gives values from {least:.2f} to {most:.2f}; normalized ones are from {low:.2f} to {high:.2f}")


def cpu_seconds(pid: int) -> float:
    """Time on the CPU of a process and of all that descend from it and are still there."""
    try:
        # After the name, which may hold anything: fields 14 and 15 of proc_pid_stat(5), user and system time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS + sum(map(cpu_seconds, children))
