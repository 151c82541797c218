"""A turn of `throughput loader` in a process of its own: `python -m tools.throughput.stage TASK STARTED`.

It imports late, because imports count for the time to the first batch.
"""

import contextlib
import pickle
import sys
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.throughput.turn import measure_loader

if TYPE_CHECKING:
    from pipelines.build import LoaderSpec
    from pipelines.config import DataConfig

WHOLE = "hand-over"


@dataclass(frozen=True)
class StageTask:
    """A pipeline that ends with a stage."""

    stage: str  # "read", a `Stage` of pipelines/dali/graph.py, or `WHOLE` for the loader as training uses it
    data: "DataConfig"
    spec: "LoaderSpec"
    images: int = 0  # to time, after warm-up


def main() -> None:
    path, started = sys.argv[1:]
    task: StageTask = pickle.loads(Path(path).read_bytes())
    with contextlib.closing(_whole(task) if task.stage == WHOLE else _part(task)) as counts:
        measure_loader(counts, task.images, float(started))


def _whole(task: StageTask) -> Generator[int, None, None]:
    """Yields the sizes of the loader's batches, epoch after epoch."""
    import torch

    from pipelines.build import build_loader

    with build_loader(task.data, task.spec) as loader:
        while True:
            for batch in loader:
                if task.spec.device.type == "cuda":
                    torch.cuda.synchronize(task.spec.device)
                yield len(batch["target"])


def _part(task: StageTask) -> Generator[int, None, None]:
    """Yields the sizes of the batches of a pipeline that ends with a stage, or names a sample that DALI cannot read."""
    from pipelines.dali.image_pipeline import describe

    with contextlib.closing(stage_batches(task)) as batches:
        try:
            yield from map(len, batches)
        except RuntimeError as error:
            raise ValueError(describe(error)) from error


def stage_batches(task: StageTask) -> Generator[Sequence[Any], None, None]:
    """Yields the images of batches as a stage leaves them, epoch after epoch; each is valid until the next is asked for."""
    from pipelines.dali.image_pipeline import ImagePipeline
    from pipelines.shards.extents import Extents
    from pipelines.shards.order import choose_order
    from pipelines.shards.reader import Fetched, Reader
    from pipelines.shards.tars import Tars

    spec, shards = task.spec, task.data.open_shards(task.spec.split)
    plans = spec.deal(choose_order(task.data, shards, spec.is_train, spec.seed)).plans(0, 0, 0)
    with contextlib.closing(Reader(shards, Extents(shards), Tars(shards), shards.num_classes())) as reader:
        reading = deque(reader.submit(next(plans)) for _ in range(spec.prefetch(task.data)))
        while task.stage == "read":
            fetched = reading.popleft().result()
            yield fetched.images
            reader.release(fetched)
            reading.append(reader.submit(next(plans)))
        with contextlib.closing(ImagePipeline(task.data, spec, task.stage)) as pipeline:  # type: ignore[arg-type]
            fed = deque[Fetched]()
            while True:
                while len(fed) < pipeline.queue_depth:
                    fed.append(reading.popleft().result())
                    pipeline.feed(fed[-1].images, fed[-1].plan.epoch, fed[-1].plan.place)
                    reading.append(reader.submit(next(plans)))
                yield pipeline.images()
                reader.release(fed.popleft())


if __name__ == "__main__":
    main()
