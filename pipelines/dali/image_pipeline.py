"""Runs the DALI graph on the batches it is fed. On a CPU, each thread runs a graph of its own on a part of each batch."""

import atexit
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline
from torch.utils.dlpack import from_dlpack

from pipelines.dali.cpu_finish import BatchMemory, Finish
from pipelines.dali.cpu_resize import CenterCropResize, WholeResize
from pipelines.dali.draws import draws_from_outside
from pipelines.dali.graph import ENCODED, Stage, has_conditionals, image_pipeline
from pipelines.dali.operators import Preprocessing

if TYPE_CHECKING:
    from pipelines.config import DataConfig
    from pipelines.spec import LoaderSpec

PREFETCH = 2  # batches that a pipeline works on at a time; DALI's own default
# Parts of a batch on a CPU. An image takes the GIL for 30 microseconds, so the threads of more parts would wait for it.
MOST_PARTS = 16
MOST_TRANSLATED_PARTS = 4  # translating the graph of RandAugment takes a second for each part


class ImagePipeline:
    """The pipeline of a loader. It is fed batches of encoded images, and returns images of one size in the same order.

    DALI runs the CPU operators of a graph one after the other, and after each, threads wait for the slowest. So on a CPU a
    batch is divided into parts, and each part has a graph with one thread. A thread that has finished its part of a batch
    begins with its part of the next one.

    Args:
        config: Names the crop and the augmentations.
        spec: Describes the images.
        until: Last stage of the graph, for measurements.
        preprocessing: Says how to resize for validation, and how to normalize. By default as `Preprocessing` does.
    """

    def __init__(
        self,
        config: "DataConfig",
        spec: "LoaderSpec",
        until: Stage = "normalize",
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.spec, self._until = spec, until
        self.queue_depth: int = config.prefetch or PREFETCH  # batches that the pipeline works on at a time
        is_cpu, num_threads = spec.device.type == "cpu", spec.threads(config)
        most = MOST_TRANSLATED_PARTS if has_conditionals(config, spec) else MOST_PARTS
        num_parts = min(num_threads, spec.batch_size, most) if is_cpu else 1
        self._part_size = -(-spec.batch_size // num_parts)
        options = {"batch_size": self._part_size, "num_threads": -(-num_threads // num_parts)}
        options["prefetch_queue_depth"] = self.queue_depth
        preprocessing = preprocessing or Preprocessing()
        self._parts = [_Part(config, spec, until, preprocessing, **options) for _ in range(num_parts)]
        shape = (spec.batch_size, spec.image_size, spec.image_size, 3)
        # One more batch is in use, and its successor has been taken.
        self._memory = BatchMemory(shape, self.queue_depth + 2) if is_cpu and until == "normalize" else None
        self._fed = deque[tuple[torch.Tensor | None, int]]()  # of each batch its memory and its number of parts

    @property
    def num_pending(self) -> int:
        """Batches that were fed, and whose images were not taken yet."""
        return len(self._fed)

    def feed(self, images: Sequence[NDArray[np.uint8]], epoch: int, place: int) -> None:
        """Starts work on a batch.

        Args:
            images: Encoded images, uint8 `(size,)`. Nobody may write to them until the batch is done.
            epoch: Epoch; with `place` it determines the random draws.
            place: Place of the first image in the order of the epoch; the others follow.
        """
        batch = self._memory.take(len(images)) if self._memory is not None else None
        starts = range(0, len(images), self._part_size)
        for part, start in zip(self._parts, starts, strict=False):
            own = slice(start, start + self._part_size)
            part.feed(images[own], self.spec.seed, epoch, place + start, None if batch is None else batch[own])
        self._fed.append((batch, len(starts)))

    def images(self, stream: torch.cuda.Stream | None = None) -> Any:
        """Returns the images of the oldest batch fed: a tensor `(N, H, W, 3)`, or what an earlier stage gives for each image.

        On a GPU, the tensor is DALI's buffer.

        Args:
            stream: Stream that waits for images on a GPU. Without it the host waits.

        Raises:
            RuntimeError: DALI cannot read an image. The pipeline cannot be used afterwards.
        """
        batch, num_parts = self._fed[0]
        outputs = [part.outputs(stream) for part in self._parts[:num_parts]]
        self._fed.popleft()
        if batch is not None:
            return batch
        return from_dlpack(outputs[0].as_tensor()) if self._until == "normalize" else [*itertools.chain(*outputs)]

    def close(self) -> None:
        """Ends the work under way. Batches that were taken stay valid."""
        for part in self._parts:
            part.close()
        self._fed.clear()


# DALI's automatic augmentations switch warnings off for a while, for all threads, so pipelines are built one at a time.
_building = threading.Lock()


class _Part:
    """A DALI pipeline for a part of each batch. Arguments that are not described belong to DALI's `Pipeline`."""

    def __init__(
        self, config: "DataConfig", spec: "LoaderSpec", until: Stage, preprocessing: Preprocessing, **options: Any
    ) -> None:
        size = spec.image_size
        self._finish: Finish | None = None
        if spec.device.type == "cpu":
            whole = WholeResize(size=size)
            resize = whole if spec.is_train else CenterCropResize(size=size, resize_shorter=preprocessing.shorter(size))
            self._finish = Finish(resize, preprocessing.mean, preprocessing.std)
        with _building, draws_from_outside() as draws:
            self.pipeline: Pipeline = image_pipeline(
                config,
                spec,
                preprocessing,
                self._finish,
                until,
                enable_conditionals=has_conditionals(config, spec),
                device_id=spec.device.index if spec.device.type == "cuda" else None,
                **options,
            )
        self.pipeline.build()
        draws.check(self.pipeline)
        # Otherwise the first call of `schedule_run` wants as many batches as the queue holds, and there may be fewer.
        self.pipeline._first_iter = False
        self.draws = draws
        self._fed = deque[Any]()  # what DALI reads, which must stay where it is
        # A pipeline's destructor waits for the pipeline's threads. The garbage collector may run in one of them while it
        # resizes. That thread would wait for itself and end the process, so another thread ends the pipeline.
        self._collected = weakref.finalize(self, _shut_down_in_thread, self.pipeline, self._fed, os.getpid())
        self._collected.atexit = False  # DALI handles that itself

    def feed(self, images: Sequence[Any], seed: int, epoch: int, place: int, target: torch.Tensor | None) -> None:
        """Starts work on a part, as `ImagePipeline.feed` does. `target` receives its images, if it is given."""
        self._fed.append(images)
        if self._finish is not None and target is not None:
            self._finish.expect(target)
        self.pipeline.feed_input(ENCODED, list(images))
        self.draws.feed(self.pipeline, len(images), seed, epoch, place)
        self.pipeline.schedule_run()

    def outputs(self, stream: torch.cuda.Stream | None) -> Any:
        """Waits for the oldest part fed, and returns what the graph gives, as a DALI list of tensors."""
        [outputs] = self.pipeline.share_outputs(stream)
        self.pipeline.release_outputs()
        self._fed.popleft()
        return outputs

    def close(self) -> None:
        self._collected.detach()
        self.pipeline._shutdown()
        self._fed.clear()
        if self._finish is not None:
            self._finish.forget()


_kept: list[Pipeline] = []  # pipelines that nothing here ends
_ending = set[threading.Thread]()
_is_exiting = False
_end_lock = threading.RLock()  # the garbage collector may run in a thread that holds it


def _shut_down_in_thread(pipeline: Pipeline, fed: deque[Any], process: int) -> None:
    """Ends a pipeline that is no longer referenced. `fed` holds the batches that it reads until it has ended."""

    def shut_down() -> None:
        pipeline._shutdown()
        fed.clear()
        _ending.discard(thread)

    # A thread of DALI that runs this would pass its daemon flag on. But the interpreter must not exit while DALI needs it.
    thread = threading.Thread(target=shut_down, name="ends a pipeline", daemon=False)
    with _end_lock:
        # A fork has no threads of the pipeline, and its destructor would wait for them forever.
        if _is_exiting or os.getpid() != process:
            _kept.append(pipeline)
        else:
            _ending.add(thread)
            thread.start()


@atexit.register  # after DALI's function for this, so it runs before that
def _let_dali_end_the_others() -> None:
    """Leaves pipelines to DALI, which ends all that exist, one after the other. It would not wait for another thread."""
    global _is_exiting
    with _end_lock:
        _is_exiting = True
    for thread in [*_ending]:
        thread.join()


def describe(error: RuntimeError) -> str:
    """Returns DALI's error as one line, without the twenty lines of graph and C++ around it."""
    _, _, what = str(error).partition("encountered:")
    lines = [line.strip() for line in what.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("C++ context", "Current pipeline", "Assert on"))]
    return f"the data pipeline stopped: {' '.join(kept) or error}"
