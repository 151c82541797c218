"""A turn of `throughput loader`: a process of its own, `python -m tools.throughput.stage TASK STARTED`.

The last line that it prints is a JSON object. It imports what it needs late, as the time to the first batch counts.
"""

import contextlib
import json
import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tools.throughput.turn import WARM_UP_BATCHES, cpu_seconds

if TYPE_CHECKING:
    from concurrent.futures import Future

    from pipelines.config import DataConfig
    from pipelines.shards.order import Plan
    from pipelines.shards.reader import Fetched, Reader

WHOLE = "hand-over"


@dataclass(frozen=True)
class Task:
    """What to run.

    Attributes:
        stage: The last one: "read", a `Stage` of pipelines/dali/graph.py, or `WHOLE` for the loader as training has it.
        data: Settings of the data.
        split: "train" or "valid".
        batch_size: Images a batch.
        image_size: Side of the images, pixels.
        device: As --device of train.py, never "auto".
        dtype: Name of the images' dtype, as torch has it.
        threads: Of the loader.
        images: To give, once it is warm, epoch after epoch.
        seed: Of the random numbers.
    """

    stage: str
    data: "DataConfig"
    split: Literal["train", "valid"]
    batch_size: int
    image_size: int
    device: str
    dtype: str
    threads: int
    images: int
    seed: int


def main() -> None:
    """Takes the turn that the command line asks for."""
    path, started = sys.argv[1:]
    task: Task = pickle.loads(Path(path).read_bytes())
    with contextlib.closing(_whole(task) if task.stage == WHOLE else _part(task)) as counts:
        next(counts)
        first_seconds = time.monotonic() - float(started)  # CLOCK_MONOTONIC, which all processes have in common
        for _ in range(WARM_UP_BATCHES):
            next(counts)
        clock, cpu, count = time.monotonic(), cpu_seconds(os.getpid()), 0
        while count < task.images:
            count += next(counts)
        seconds, cpu = time.monotonic() - clock, cpu_seconds(os.getpid()) - cpu
    print(json.dumps({"first_seconds": first_seconds, "seconds": seconds, "cpu_seconds": cpu, "images": count}))


def _whole(task: Task) -> Generator[int, None, None]:
    """Sizes of the loader's batches, without end."""
    import torch

    from pipelines.build import build_loader

    device = torch.device(task.device)
    with build_loader(
        task.data,
        task.split,
        batch_size=task.batch_size,
        image_size=task.image_size,
        device=device,
        dtype=getattr(torch, task.dtype),
        num_threads=task.threads,
        seed=task.seed,
    ) as loader:
        while True:
            for batch in loader:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                yield len(batch["target"])


def _part(task: Task) -> Generator[int, None, None]:
    """Sizes of the batches of a loader that ends with a stage, without end.

    Raises:
        ValueError: There is a sample that DALI cannot read.
    """
    from pipelines.dali.graph import describe

    with contextlib.closing(stage_batches(task)) as batches:
        try:
            for batch in batches:
                yield len(batch)
        except RuntimeError as error:
            raise ValueError(describe(error)) from error


def stage_batches(task: Task) -> Generator[Sequence[Any], None, None]:
    """Images of batches as a stage leaves them, epoch after epoch; each is there until the next one is asked for.

    Raises:
        RuntimeError: DALI cannot read one.
    """
    from pipelines.shards.extents import Extents
    from pipelines.shards.order import Deal, choose_order
    from pipelines.shards.reader import Reader
    from pipelines.shards.tars import Tars
    from pipelines.tuned import PREFETCH

    shards, train = task.data.open_shards(task.split), task.split == "train"
    deal = Deal(choose_order(task.data, shards, train, task.seed), train, task.batch_size, 0, 1)
    reader = Reader(shards, Extents(shards), Tars(shards), shards.num_classes())
    depth, plans = task.data.prefetch or PREFETCH, deal.plans(0, 0, 0)
    reading = deque(reader.submit(next(plans)) for _ in range(depth))
    try:
        if task.stage == "read":
            while True:
                fetched = reading.popleft().result()
                yield fetched.images
                reader.release(fetched)
                reading.append(reader.submit(next(plans)))
        yield from _decoded(task, reader, reading, plans)
    finally:
        reader.close()


def _decoded(
    task: Task, reader: "Reader", reading: "deque[Future[Fetched]]", plans: "Iterator[Plan]"
) -> Iterator[Sequence[Any]]:
    import torch

    from pipelines.dali.graph import ImagePipeline, Settings

    device = torch.device(task.device, 0) if task.device == "cuda" else torch.device(task.device)
    settings = Settings(
        *(task.split == "train", task.batch_size, task.image_size, device, getattr(torch, task.dtype)),
        *(task.threads, task.seed, task.data),
    )
    with contextlib.closing(ImagePipeline(settings, task.stage)) as pipeline:  # type: ignore[arg-type]
        fed = deque["Fetched"]()
        while True:
            while len(fed) < pipeline.queue_depth:
                fed.append(reading.popleft().result())
                pipeline.feed(fed[-1].images, fed[-1].plan.epoch, fed[-1].plan.place)
                reading.append(reader.submit(next(plans)))
            yield pipeline.images()
            reader.release(fed.popleft())


if __name__ == "__main__":
    main()
