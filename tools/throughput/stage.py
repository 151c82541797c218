"""A turn of `throughput loader`: a process of its own, `python -m tools.throughput.stage TASK STARTED`.

The last line that it prints is a JSON object. It imports what it needs late, as the time to the first batch counts.
"""

import contextlib
import json
import os
import pickle
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tools.throughput.turn import WARM_UP_BATCHES, cpu_seconds

if TYPE_CHECKING:
    from pipelines import DataConfig

WHOLE = "hand-over"


@dataclass(frozen=True)
class Task:
    """What to run.

    Attributes:
        stage: The last one: a `Stage` of pipelines/dali.py, or `WHOLE` for the loader as training has it.
        data: Settings of the data.
        split: "train" or "valid".
        batch_size: Images a batch.
        image_size: Side of the images, pixels.
        device: As --device of train.py, never "auto".
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

    from pipelines import build_loader

    device = torch.device(task.device)
    with build_loader(
        task.data,
        task.split,
        batch_size=task.batch_size,
        image_size=task.image_size,
        device=device,
        num_threads=task.threads,
        seed=task.seed,
    ) as loader:
        while True:
            for batch in loader:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                yield len(batch["target"])


def _part(task: Task) -> Generator[int, None, None]:
    """Sizes of the batches of a graph that ends with a stage; its reader begins again after the last sample.

    Raises:
        ValueError: There is a sample that DALI cannot read.
    """
    from pipelines.dali import describe

    with open_pipeline(task) as pipeline:
        while True:
            try:
                images = pipeline.run()[0]
            except RuntimeError as error:
                raise ValueError(describe(error)) from error
            yield len(images)


@contextlib.contextmanager
def open_pipeline(task: Task) -> Iterator[Any]:
    """The loader's DALI pipeline over all shards, ended after the stage: images, label bytes, sources."""
    import torch

    from pipelines.dali import has_conditionals, image_pipeline, queue_options

    shards, is_cuda, train = task.data.open_shards(task.split), task.device.startswith("cuda"), task.split == "train"
    pipeline = image_pipeline(
        shards.tars,
        shards.indices,
        shards.label_reader.extension,
        train=train,
        device="gpu" if is_cuda else "cpu",
        image_size=task.image_size,
        dtype=torch.float32,
        config=task.data,
        shuffle_buffer=min(task.data.shuffle_buffer, shards.num_samples) if train else 0,
        shuffle_seed=task.seed,
        until=task.stage,
        enable_conditionals=has_conditionals(train, task.data),
        batch_size=task.batch_size,
        num_threads=task.threads,
        device_id=torch.device(task.device).index or 0 if is_cuda else None,
        seed=task.seed,
        **queue_options(task.data),
    )
    pipeline.build()
    try:
        yield pipeline
    finally:
        pipeline._shutdown()


if __name__ == "__main__":
    main()
