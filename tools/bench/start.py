"""A rank's turn in `throughput scale`: a process of its own, `python -m tools.bench.start TASK MEETING RANK STARTED`.

The last line that it prints is a JSON object. It imports what it needs late, as the time to the first batch counts.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.throughput.turn import WARM_UP_BATCHES

if TYPE_CHECKING:
    from pipelines.loader import Batch, Loader

MEETING_SECONDS = 600.0


@dataclass(frozen=True)
class Task:
    """What all ranks are given to do.

    Attributes:
        shards: Training shards, as --data.train takes them.
        batch_size: Images a batch.
        image_size: Side of the images, pixels.
        threads: That decode.
        ranks: How many there are.
        seconds: For which batches are counted, once all ranks have one.
    """

    shards: str
    batch_size: int
    image_size: int
    threads: int
    ranks: int
    seconds: float


def main() -> None:
    """Takes the turn that the command line asks for."""
    path, meeting, rank, started = sys.argv[1:]
    task = Task(**json.loads(Path(path).read_text()))
    clock = float(started)  # CLOCK_MONOTONIC, which all processes have in common
    try:
        import torch

        import pipelines.dali.loader  # noqa: F401  (DALI)
        from pipelines.build import build_loader
        from pipelines.config import DataConfig

        imported, data = time.monotonic(), DataConfig(train=task.shards)
        shards = data.open_shards("train")
        opened = time.monotonic()
        loader = build_loader(
            data,
            "train",
            shards=shards,
            batch_size=task.batch_size,
            image_size=task.image_size,
            device=torch.device("cpu"),
            num_threads=task.threads,
            rank=int(rank),
            world_size=task.ranks,
        )
        with contextlib.closing(_batches(loader)) as batches:
            batch_bytes = next(batches)["image"].nbytes
            had = time.monotonic()
            _meet(Path(meeting), rank, task.ranks)
            images_per_second = _rate(batches, task.seconds)
            open_files = len(os.listdir("/proc/self/fd"))
    finally:
        (Path(meeting) / rank).touch()  # nobody waits for a rank that has failed
    said = {
        "imports_seconds": imported - clock,
        "open_seconds": opened - imported,
        "first_seconds": had - opened,
        "images_per_second": images_per_second,
        "batch_bytes": batch_bytes,
        "open_files": open_files,
    }
    print(json.dumps(said))


def _batches(loader: "Loader") -> "Generator[Batch, None, None]":
    """Without end, epoch after epoch."""
    with loader:
        while True:
            yield from loader


def _meet(folder: Path, rank: str, ranks: int) -> None:
    """Waits until all ranks are here, as one that still starts takes from the others' cores what it does not take later.

    Raises:
        TimeoutError: They do not come.
    """
    (folder / rank).touch()
    give_up = time.monotonic() + MEETING_SECONDS
    while len(os.listdir(folder)) < ranks:
        if time.monotonic() > give_up:
            raise TimeoutError(f"after {MEETING_SECONDS:.0f} s not all of the {ranks} ranks have a batch")
        time.sleep(0.01)


def _rate(batches: "Generator[Batch, None, None]", seconds: float) -> float:
    """Images a second, once the loader is warm."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    started, count, passed = time.monotonic(), 0, 0.0
    while passed < seconds:
        count += len(next(batches)["target"])
        passed = time.monotonic() - started
    return count / passed


if __name__ == "__main__":
    main()
