"""The one DALI graph, for training and validation, CPU and GPU; and the pipeline that runs it over a segment."""

import contextlib
import threading
import warnings
import weakref
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
from pipelines.segments import Segment
from pipelines.shards import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    from pipelines import DataConfig

# Before its first graph for a GPU DALI looks for cuFFT and NPP, and warns where they are missing; nothing here needs them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    check_cuda_runtime()

Stage = Literal["read", "headers"] | augment.Stage
DALI_VERSION: str = nvidia.dali.__version__
DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}


def read(
    tars: Sequence[str], indices: Sequence[str], label_extension: str, shuffle_buffer: int, seed: int, mmap: bool
) -> tuple[DataNode, DataNode]:
    """Encoded images and the bytes of their labels, both 1-D uint8 on the CPU; shuffled where the buffer is not 0."""
    shuffle = {"random_shuffle": True, "initial_fill": shuffle_buffer, "seed": seed} if shuffle_buffer else {}
    encoded, label = fn.readers.webdataset(
        paths=tars,
        index_paths=indices,
        ext=[";".join(IMAGE_EXTENSIONS), label_extension],
        case_sensitive_extensions=False,
        missing_component_behavior="error",
        # Reading from a mapped file that somebody cuts short ends the process; a read that fails is an error like others.
        dont_use_mmap=not mmap,
        **shuffle,
    )
    return encoded, label


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


def padded_source(encoded: DataNode) -> DataNode:
    """`tar:offset:member` of each image, uint8; texts differ in length, and padded with zeros a batch of them is one tensor."""
    return fn.pad(fn.get_property(encoded, key="source_info"))


# The dynamic executor hands its buffers over, where the static one has them copied.
@pipeline_def(exec_dynamic=True, enable_checkpointing=True)
def image_pipeline(
    tars: Sequence[str],
    indices: Sequence[str],
    label_extension: str,
    *,
    train: bool,
    device: augment.Device,
    image_size: int,
    dtype: torch.dtype,
    config: "DataConfig",
    shuffle_buffer: int,
    shuffle_seed: int,
    until: Stage = "normalize",
) -> tuple[DataNode, DataNode, DataNode]:
    """Images `(H, W, 3)` of `dtype` on `device`; labels' bytes and `tar:offset:member`, both uint8 on the CPU.

    With `until`, for measurements, what there is of the images after that stage.
    """
    encoded, label = read(tars, indices, label_extension, shuffle_buffer, shuffle_seed, mmap=False)
    source, image = padded_source(encoded), encoded
    if until != "read":
        image = with_headers_read(encoded)
    if until in ("decode", "resize", "normalize"):
        options: dict[str, Any] = {"size": image_size, "device": device, "dtype": DTYPES[dtype], "until": until}
        options["hw_decoder_load"] = config.hw_decoder_load
        if train:
            image = augment.training_images(image, config.crop, config.augment, **options)
        else:
            image = augment.validation_images(image, **options)
    return image, fn.pad(label), source


def has_conditionals(train: bool, config: "DataConfig") -> bool:
    """Whether there may be an `if` in an augmentation: it has DALI translate the graph's Python, which takes half a second."""
    return train and any(not isinstance(step, HorizontalFlip) for step in config.augment)


def queue_options(config: "DataConfig") -> dict[str, int]:
    """Of the pipeline; they change nothing in what it gives, nor in its state."""
    return {} if config.prefetch is None else {"prefetch_queue_depth": config.prefetch}


@pipeline_def(exec_dynamic=True)
def source_pipeline(
    tars: Sequence[str], indices: Sequence[str], label_extension: str, shuffle_buffer: int, shuffle_seed: int
) -> DataNode:
    """Only what the reader of `image_pipeline` would read, without reading it: mapped files, whose pages nobody touches."""
    encoded, _ = read(tars, indices, label_extension, shuffle_buffer, shuffle_seed, mmap=True)
    return padded_source(encoded)


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def decoding_pipeline(
    *, device: augment.Device, image_size: int, resize_shorter: int, mean: augment.Color, std: augment.Color
) -> DataNode:
    """Validation's images `(H, W, 3)`, float32 on `device`, of encoded ones that each run is given as `encoded`."""
    encoded = with_headers_read(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1))
    return augment.validation_images(
        encoded, size=image_size, device=device, dtype=types.FLOAT, resize_shorter=resize_shorter, mean=mean, std=std
    )


@dataclass(frozen=True)
class Settings:
    """What the pipelines of one loader have in common."""

    train: bool
    batch_size: int
    image_size: int
    device: torch.device
    dtype: torch.dtype
    num_threads: int
    seed: int
    rank: int
    segment_samples: int
    label_extension: str
    config: "DataConfig"


def _seeds(settings: Settings, segment: Segment) -> tuple[int, int]:
    """Of the pipeline's random numbers, and of the reader's."""
    entropy = [settings.seed, settings.rank, segment.epoch, segment.number]
    first, second = (int(word) % 2**31 for word in np.random.SeedSequence(entropy).generate_state(2))
    return first, second


def _reader_options(settings: Settings, segment: Segment, files: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What decides which sample comes when."""
    tars, indices = zip(*files, strict=True)
    return {
        "tars": tars,
        "indices": indices,
        "label_extension": settings.label_extension,
        "shuffle_buffer": min(settings.config.shuffle_buffer, segment.num_samples) if settings.train else 0,
        "shuffle_seed": _seeds(settings, segment)[1],
        "batch_size": settings.batch_size,
        "num_threads": settings.num_threads,
    }


def _shut_down_elsewhere(pipeline: Pipeline) -> None:
    # No daemon, as one begun by a thread of DALI would be: Python must not go away while those still want it.
    threading.Thread(target=pipeline._shutdown, name="ends a pipeline", daemon=False).start()


# Of pipelines: DALI's automatic augmentations switch warnings off for a while, for all threads, and must not do so crosswise.
_making = threading.Lock()


class SegmentPipeline:
    """The pipeline of one segment, and how far it is.

    Args:
        settings: Of the loader.
        segment: What it reads.
        files: The tar and the index of each part of the segment.
        delivered: Batches that have been had.
        checkpoint: The pipeline's state after them, where there are any.

    Attributes:
        delivered: Batches that have been had.
        checkpoint: The pipeline's state after them.
        before: Both, before the last batch that was had.
        held: What keeps the tars where they are, closed with the pipeline.
    """

    def __init__(
        self,
        settings: Settings,
        segment: Segment,
        files: Sequence[tuple[str, str]],
        delivered: int = 0,
        checkpoint: bytes = b"",
    ) -> None:
        self.settings, self.segment, self.delivered, self.checkpoint = settings, segment, delivered, checkpoint
        self.before = delivered, checkpoint
        self.held = contextlib.ExitStack()
        self._num_scheduled = delivered
        with _making:
            self._pipeline: Pipeline = image_pipeline(
                enable_conditionals=has_conditionals(settings.train, settings.config),
                train=settings.train,
                device="gpu" if settings.device.type == "cuda" else "cpu",
                image_size=settings.image_size,
                dtype=settings.dtype,
                config=settings.config,
                device_id=settings.device.index if settings.device.type == "cuda" else None,
                seed=_seeds(settings, segment)[0],
                checkpoint=checkpoint or None,
                **queue_options(settings.config),
                **_reader_options(settings, segment, files),
            )
        self._pipeline.build()
        # A pipeline's destructor waits for its threads. The garbage collector comes to it in whatever thread it happens to run,
        # which may be one of those while it resizes: it would wait for itself, and end the process.
        self._collected = weakref.finalize(self, _shut_down_elsewhere, self._pipeline)
        self._collected.atexit = False  # DALI sees to that itself

    @property
    def is_done(self) -> bool:
        """Whether all batches have been had."""
        return self.delivered == self.segment.num_batches

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing more to begin: the last batch is under way or had."""
        return self._num_scheduled >= self.segment.num_batches

    def start(self) -> None:
        """Begins work on the first batches."""
        if self._num_scheduled == self.delivered:
            self._schedule()

    def run(self, stream: torch.cuda.Stream | None = None) -> tuple[Any, ...]:
        """The next batch's images, labels and sources, as DALI's tensors.

        Args:
            stream: Which waits for what lies on a GPU; without it the host does.

        Raises:
            RuntimeError: There is something in it that DALI cannot read. The pipeline is of no use afterwards.
        """
        self.start()
        outputs = self._pipeline.share_outputs(stream)
        self._pipeline.release_outputs()
        self.before = self.delivered, self.checkpoint
        self.delivered += 1
        self.checkpoint = self._pipeline.checkpoint()
        if not self.is_idle:
            self._schedule()
        return tuple(output.as_tensor() for output in outputs)

    def close(self) -> None:
        """Ends the work under way, and lets go of the tars; batches that have been had stay as they are."""
        self._collected.detach()
        self._pipeline._shutdown()
        self.held.close()

    def _schedule(self) -> None:
        # The first call begins as many batches as the queue holds, each further one another.
        self._num_scheduled += self._pipeline.prefetch_queue_depth if self._num_scheduled == self.delivered else 1
        self._pipeline.schedule_run()


class Sources:
    """Which samples the reader gives, batch by batch, found out by letting it read nothing else; for what went wrong."""

    def __init__(self, settings: Settings, segment: Segment, files: Sequence[tuple[str, str]]) -> None:
        self._pipeline: Pipeline = source_pipeline(device_id=None, **_reader_options(settings, segment, files))
        self._pipeline.build()
        self.segment = segment
        self._next, self._last = 0, list[str]()

    def batch(self, number: int) -> list[str]:
        """`tar:offset:member` of the samples in a batch, the number of which must not fall from call to call."""
        while self._next <= number:
            [padded] = self._pipeline.run()
            self._last = texts(np.asarray(padded.as_tensor()))
            self._next += 1
        return self._last


def texts(padded: NDArray[np.uint8]) -> list[str]:
    """Texts out of `(N, longest)` bytes padded with zeros."""
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in padded]


def describe(error: RuntimeError) -> str:
    """DALI's error, which is some twenty lines of graph and C++ around the one that matters, as one line."""
    _, _, what = str(error).partition("encountered:")
    lines = [line.strip() for line in what.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("C++ context", "Current pipeline", "Assert on"))]
    return f"the data pipeline stopped: {' '.join(kept) or error}"
