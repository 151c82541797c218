"""One rank's turn of `tools.bench.scale` in a process of its own: `python -m tools.bench.start TASK MEETING RANK STARTED`.

TASK is a JSON file: a `Point` of scale.py, the `location` of its shards, and the `seconds` to time. The last line of output is
a JSON object. The module imports late, because imports count for the time to the first batch.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tools.throughput.turn import WARM_UP_BATCHES

MEETING_SECONDS = 600.0


def main() -> None:
    path, meeting, rank, started = sys.argv[1:]
    task = SimpleNamespace(**json.loads(Path(path).read_text()))
    try:
        said = _measure(task, Path(meeting), rank, float(started))
    finally:
        (Path(meeting) / rank).touch()  # nobody waits for a rank that has failed
    print(json.dumps(said))


def _measure(task: SimpleNamespace, meeting: Path, rank: str, started: float) -> dict[str, float]:
    import torch

    import pipelines.dali.loader  # noqa: F401  (DALI)
    from pipelines.build import LoaderSpec, build_loader
    from pipelines.config import DataConfig

    imported, data = time.monotonic(), DataConfig(train=task.location)
    shards = data.open_shards("train")
    opened = time.monotonic()
    spec = LoaderSpec(
        split="train",
        batch_size=task.batch_size,
        image_size=task.image_size,
        device=torch.device("cpu"),
        num_threads=task.threads,
        rank=int(rank),
        world_size=task.ranks,
    )
    with build_loader(data, spec, shards=shards) as loader:
        batches = (batch for _ in itertools.count() for batch in loader)  # epoch after epoch
        batch_bytes = next(batches)["image"].nbytes
        first = time.monotonic()
        _meet(meeting, rank, task.ranks)
        return {
            "imports_seconds": imported - started,  # CLOCK_MONOTONIC, which all processes share
            "open_seconds": opened - imported,
            "first_seconds": first - opened,
            "start_seconds": first - imported,
            "images_per_second": _rate(batches, task.seconds),
            "batch_bytes": batch_bytes,
            "open_files": len(os.listdir("/proc/self/fd")),
        }


def _meet(folder: Path, rank: str, ranks: int) -> None:
    """Waits for all ranks, because a rank that still starts takes more from the others' cores than it does later."""
    (folder / rank).touch()
    give_up = time.monotonic() + MEETING_SECONDS
    while len(os.listdir(folder)) < ranks:
        if time.monotonic() > give_up:
            raise TimeoutError(f"after {MEETING_SECONDS:.0f} s not all of the {ranks} ranks have a batch")
        time.sleep(0.01)


def _rate(batches: Iterator[Any], seconds: float) -> float:
    """Returns images per second, after warm-up."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    started, count, passed = time.monotonic(), 0, 0.0
    while passed < seconds:
        count += len(next(batches)["target"])
        passed = time.monotonic() - started
    return count / passed


if __name__ == "__main__":
    main()
