"""The one DALI graph, for training and validation, CPU and GPU; and the pipeline that runs it on batches that it is fed."""

import threading
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import nvidia.dali
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali.backend import check_cuda_runtime
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, pipeline_def

from pipelines import augment
from pipelines.augment import HorizontalFlip
from pipelines.dali.draws import draws_from_outside, feed_draws

if TYPE_CHECKING:
    from pipelines.config import DataConfig

# Before its first graph for a GPU DALI looks for cuFFT and NPP, and warns where they are missing; nothing here needs them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    check_cuda_runtime()

Stage = Literal["headers"] | augment.Stage
ENCODED = "encoded"
DALI_VERSION: str = nvidia.dali.__version__
DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}


def with_headers_read(encoded: DataNode) -> DataNode:
    """The encoded images, once all their headers could be read.

    The decoder parses the headers of a batch in several threads, and where one cannot be read it may leave before the others
    are through (DALI 2.4, `imgcodec/image_decoder.h`): they go on in memory that is no longer theirs, and the process ends
    with a segmentation fault. `peek_image_shape` waits for all of them, and gives an error that can be dealt with.
    """
    height_width_channels = fn.peek_image_shape(encoded)
    # Nothing is reshaped: it makes the decoder wait for the line above.
    size = fn.cast(encoded.shape(), dtype=types.INT32) + 0 * fn.cast(height_width_channels[0], dtype=types.INT32)
    return fn.reshape(encoded, shape=size)


# The dynamic executor hands its buffers over, where the static one has them copied.
@pipeline_def(exec_dynamic=True)
def image_pipeline(
    *,
    train: bool,
    device: augment.Device,
    image_size: int,
    dtype: torch.dtype,
    config: "DataConfig",
    until: Stage = "normalize",
) -> DataNode:
    """Images `(H, W, 3)` of `dtype` on `device`, from encoded ones that are fed as `ENCODED`.

    With `until`, for measurements, what there is of the images after that stage.
    """
    # Not copied: whoever feeds keeps the bytes where they are.
    encoded = fn.external_source(name=ENCODED, dtype=types.UINT8, ndim=1, no_copy=True)
    image = with_headers_read(encoded)
    if until == "headers":
        return image
    options: dict[str, Any] = {"size": image_size, "device": device, "dtype": DTYPES[dtype], "until": until}
    options["hw_decoder_load"] = config.hw_decoder_load
    if train:
        return augment.training_images(image, config.crop, config.augment, **options)
    return augment.validation_images(image, **options)


def has_conditionals(train: bool, config: "DataConfig") -> bool:
    """Whether there may be an `if` in an augmentation: it has DALI translate the graph's Python, which takes half a second."""
    return train and any(not isinstance(step, HorizontalFlip) for step in config.augment)


def queue_options(config: "DataConfig") -> dict[str, int]:
    """Of the pipeline; they change nothing in what it gives."""
    return {} if config.prefetch is None else {"prefetch_queue_depth": config.prefetch}


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def decoding_pipeline(
    *, device: augment.Device, image_size: int, resize_shorter: int, mean: augment.Color, std: augment.Color
) -> DataNode:
    """Validation's images `(H, W, 3)`, float32 on `device`, of encoded ones that each run is given as `encoded`."""
    encoded = with_headers_read(fn.external_source(name=ENCODED, dtype=types.UINT8, ndim=1))
    return augment.validation_images(
        encoded, size=image_size, device=device, dtype=types.FLOAT, resize_shorter=resize_shorter, mean=mean, std=std
    )


@dataclass(frozen=True)
class Settings:
    """What the pipelines of one loader have in common; `seed` is that of all random draws."""

    train: bool
    batch_size: int
    image_size: int
    device: torch.device
    dtype: torch.dtype
    num_threads: int
    seed: int
    config: "DataConfig"


def _shut_down_elsewhere(pipeline: Pipeline, fed: deque[Any]) -> None:
    """Ends a pipeline that nobody refers to any more; what it was fed stays until then, as it reads it."""

    def shut_down() -> None:
        pipeline._shutdown()
        fed.clear()

    # No daemon, as one begun by a thread of DALI would be: Python must not go away while those still want it.
    threading.Thread(target=shut_down, name="ends a pipeline", daemon=False).start()


# Of pipelines: DALI's automatic augmentations switch warnings off for a while, for all threads, and must not do so crosswise.
_making = threading.Lock()


class ImagePipeline:
    """The pipeline of a loader, for images of one size; it is fed batches and gives images in the same order.

    Args:
        settings: Of the loader.
        until: The stage with which the graph ends, for measurements.
    """

    def __init__(self, settings: Settings, until: Stage = "normalize") -> None:
        self.settings = settings
        is_cuda = settings.device.type == "cuda"
        with _making, draws_from_outside() as draws:
            self._pipeline: Pipeline = image_pipeline(
                enable_conditionals=has_conditionals(settings.train, settings.config),
                train=settings.train,
                device="gpu" if is_cuda else "cpu",
                image_size=settings.image_size,
                dtype=settings.dtype,
                config=settings.config,
                until=until,
                device_id=settings.device.index if is_cuda else None,
                batch_size=settings.batch_size,
                num_threads=settings.num_threads,
                **queue_options(settings.config),
            )
        self._pipeline.build()
        draws.check(self._pipeline)
        # The first call of `schedule_run` would otherwise want as many batches as the queue holds, and there may be fewer.
        self._pipeline._first_iter = False
        self._draws = draws
        self._fed = deque[Any]()  # what DALI reads, which must stay where it is
        # A pipeline's destructor waits for its threads. The garbage collector comes to it in whatever thread it happens to run,
        # which may be one of those while it resizes: it would wait for itself, and end the process.
        self._collected = weakref.finalize(self, _shut_down_elsewhere, self._pipeline, self._fed)
        self._collected.atexit = False  # DALI sees to that itself

    @property
    def queue_depth(self) -> int:
        """Batches that it works on at a time."""
        return int(self._pipeline.prefetch_queue_depth)

    @property
    def num_pending(self) -> int:
        """Batches that were fed, and whose images have not been had."""
        return len(self._fed)

    def feed(self, images: Sequence[NDArray[np.uint8]], epoch: int, place: int) -> None:
        """Begins work on a batch.

        Args:
            images: Encoded images, uint8 `(size,)`; nobody may write to them until the batch is there.
            epoch: With it and `place` what is drawn at random is decided.
            place: Of the first image in the epoch's order; the others follow.
        """
        self._fed.append(images)
        self._pipeline.feed_input(ENCODED, list(images))
        feed_draws(self._pipeline, self._draws, len(images), self.settings.seed, epoch, place)
        self._pipeline.schedule_run()

    def images(self, stream: torch.cuda.Stream | None = None) -> Any:
        """The images of the batch that was fed first, as a list of tensors of DALI's.

        Args:
            stream: Which waits for what lies on a GPU; without it the host does.

        Raises:
            RuntimeError: There is something in it that DALI cannot read. The pipeline is of no use afterwards.
        """
        [images] = self._pipeline.share_outputs(stream)
        self._pipeline.release_outputs()
        self._fed.popleft()
        return images

    def close(self) -> None:
        """Ends the work under way; batches that have been had stay as they are."""
        self._collected.detach()
        self._pipeline._shutdown()
        self._fed.clear()


def describe(error: RuntimeError) -> str:
    """DALI's error, which is some twenty lines of graph and C++ around the one that matters, as one line."""
    _, _, what = str(error).partition("encountered:")
    lines = [line.strip() for line in what.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("C++ context", "Current pipeline", "Assert on"))]
    return f"the data pipeline stopped: {' '.join(kept) or error}"
