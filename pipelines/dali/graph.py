"""The DALI graph for training and validation on CPU and GPU, and the pipeline that runs it on the batches it is fed."""

import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import nvidia.dali
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.backend import check_cuda_runtime
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, pipeline_def

from pipelines.augment import HorizontalFlip
from pipelines.bad_samples.limits import MAX_PIXELS
from pipelines.dali import operators
from pipelines.dali.draws import draws_from_outside

if TYPE_CHECKING:
    from pipelines.config import DataConfig
    from pipelines.spec import LoaderSpec

# Before its first graph for a GPU, DALI looks for cuFFT and NPP and warns if they are missing. Nothing here needs them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    check_cuda_runtime()

Stage = Literal["headers"] | operators.Stage
ENCODED = "encoded"
PREFETCH = 2  # batches that a pipeline works on at a time; DALI's own default
DALI_VERSION: str = nvidia.dali.__version__
DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}


def with_headers_read(encoded: DataNode, max_pixels: int) -> DataNode:
    """Passes the encoded images on after all their headers have been parsed. Stops at an image with more than `max_pixels`.

    The decoder parses the headers of a batch in several threads. If one fails, it may return before the others are done (DALI
    2.4, `imgcodec/image_decoder.h`): they go on in freed memory, and the process ends with a segmentation fault.
    `peek_image_shape` waits for all of them, and raises an error that can be handled.
    """
    shape = fn.peek_image_shape(encoded, dtype=types.FLOAT64)  # products of integers might overflow
    is_too_large = shape[0] * shape[1] > float(max_pixels)
    # This reshapes nothing. It makes the decoder wait for the lines above, and fails if the size is not that of the bytes.
    size = fn.cast(encoded.shape(), dtype=types.INT32) + is_too_large
    return fn.reshape(encoded, shape=size)


# The dynamic executor can give its output buffers away. With the static one they would have to be copied.
@pipeline_def(exec_dynamic=True)
def image_pipeline(config: "DataConfig", spec: "LoaderSpec", until: Stage = "normalize") -> DataNode:
    """Turns the encoded images that are fed as `ENCODED` into images `(H, W, 3)` of the dtype and on the device of `spec`.

    With `until`, for measurements, the graph ends with that stage.
    """
    # The bytes are not copied, so the caller must keep them in place.
    encoded = fn.external_source(name=ENCODED, dtype=types.UINT8, ndim=1, no_copy=True)
    image = with_headers_read(encoded, config.max_pixels)
    if until == "headers":
        return image
    device = "gpu" if spec.device.type == "cuda" else "cpu"
    options: dict[str, Any] = {"size": spec.image_size, "device": device, "dtype": DTYPES[spec.dtype], "until": until}
    if spec.is_train:
        return operators.training_images(image, config, **options)
    return operators.validation_images(image, **options, hw_decoder_load=config.hw_decoder_load)


def has_conditionals(config: "DataConfig", spec: "LoaderSpec") -> bool:
    """Whether an augmentation may contain an `if`. DALI then translates the graph's Python, which takes half a second."""
    return spec.is_train and any(not isinstance(step, HorizontalFlip) for step in config.augment)


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def decoding_pipeline(
    *,
    device: operators.Device,
    image_size: int,
    resize_shorter: int,
    mean: operators.Color,
    std: operators.Color,
    max_pixels: int = MAX_PIXELS,
) -> DataNode:
    """Turns encoded images, the argument `encoded` of each run, into validation images `(H, W, 3)`, float32 on `device`."""
    encoded = with_headers_read(fn.external_source(name=ENCODED, dtype=types.UINT8, ndim=1), max_pixels)
    return operators.validation_images(
        encoded, size=image_size, device=device, dtype=types.FLOAT, resize_shorter=resize_shorter, mean=mean, std=std
    )


_of_other_processes: list[Pipeline] = []


def _shut_down_in_thread(pipeline: Pipeline, fed: deque[Any], process: int) -> None:
    """Ends a pipeline that is no longer referenced. `fed` holds the batches that it reads until it has ended."""
    if os.getpid() != process:  # a fork has no threads of the pipeline, and its destructor would wait for them forever
        _of_other_processes.append(pipeline)
        return

    def shut_down() -> None:
        pipeline._shutdown()
        fed.clear()

    # A thread of DALI that runs this would pass its daemon flag on. But the interpreter must not exit while DALI needs it.
    threading.Thread(target=shut_down, name="ends a pipeline", daemon=False).start()


# DALI's automatic augmentations switch warnings off for a while, for all threads, so pipelines are built one at a time.
_building = threading.Lock()


class ImagePipeline:
    """The pipeline of a loader. It is fed batches of encoded images, and returns images of one size in the same order.

    Args:
        config: Names the crop and the augmentations.
        spec: Describes the images.
        until: Last stage of the graph, for measurements.
    """

    def __init__(self, config: "DataConfig", spec: "LoaderSpec", until: Stage = "normalize") -> None:
        self.spec = spec
        with _building, draws_from_outside() as draws:
            self._pipeline: Pipeline = image_pipeline(
                config,
                spec,
                until,
                enable_conditionals=has_conditionals(config, spec),
                device_id=spec.device.index if spec.device.type == "cuda" else None,
                batch_size=spec.batch_size,
                num_threads=spec.threads(config),
                prefetch_queue_depth=config.prefetch or PREFETCH,
            )
        self._pipeline.build()
        draws.check(self._pipeline)
        # Otherwise the first call of `schedule_run` wants as many batches as the queue holds, and there may be fewer.
        self._pipeline._first_iter = False
        self._draws = draws
        self._fed = deque[Any]()  # what DALI reads, which must stay where it is
        # A pipeline's destructor waits for the pipeline's threads. The garbage collector may run in one of them while it
        # resizes. That thread would wait for itself and end the process, so another thread ends the pipeline.
        self._collected = weakref.finalize(self, _shut_down_in_thread, self._pipeline, self._fed, os.getpid())
        self._collected.atexit = False  # DALI handles that itself

    @property
    def queue_depth(self) -> int:
        """Batches that the pipeline works on at a time."""
        return int(self._pipeline.prefetch_queue_depth)

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
        self._fed.append(images)
        self._pipeline.feed_input(ENCODED, list(images))
        self._draws.feed(self._pipeline, len(images), self.spec.seed, epoch, place)
        self._pipeline.schedule_run()

    def images(self, stream: torch.cuda.Stream | None = None) -> Any:
        """Returns the images of the oldest batch fed, as a DALI list of tensors.

        Args:
            stream: Stream that waits for images on a GPU. Without it the host waits.

        Raises:
            RuntimeError: DALI cannot read an image. The pipeline cannot be used afterwards.
        """
        [images] = self._pipeline.share_outputs(stream)
        self._pipeline.release_outputs()
        self._fed.popleft()
        return images

    def close(self) -> None:
        """Ends the work under way. Batches that were taken stay valid."""
        self._collected.detach()
        self._pipeline._shutdown()
        self._fed.clear()


def describe(error: RuntimeError) -> str:
    """Returns DALI's error as one line, without the twenty lines of graph and C++ around it."""
    _, _, what = str(error).partition("encountered:")
    lines = [line.strip() for line in what.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("C++ context", "Current pipeline", "Assert on"))]
    return f"the data pipeline stopped: {' '.join(kept) or error}"
