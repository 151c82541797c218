"""The DALI graph for training and validation on CPU and GPU."""

import warnings
from typing import TYPE_CHECKING, Any, Literal

import nvidia.dali
import torch
from nvidia.dali import fn, types
from nvidia.dali.backend import check_cuda_runtime
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import pipeline_def

from pipelines.augment import HorizontalFlip
from pipelines.dali import operators
from pipelines.dali.cpu_resize import Resize

if TYPE_CHECKING:
    from pipelines.config import DataConfig
    from pipelines.spec import LoaderSpec

# Before its first graph for a GPU, DALI looks for cuFFT and NPP and warns if they are missing. Nothing here needs them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    check_cuda_runtime()

Stage = Literal["headers"] | operators.Stage
ENCODED = "encoded"
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


# The dynamic executor frees buffers as soon as the next operator has read them, so a pipeline needs less memory.
@pipeline_def(exec_dynamic=True)
def image_pipeline(
    config: "DataConfig", spec: "LoaderSpec", preprocessing: operators.Preprocessing, resize: Resize | None, until: Stage
) -> operators.Images:
    """Turns the encoded images that are fed as `ENCODED` into images `(H, W, 3)`.

    On a GPU, they have the size and dtype of `spec`. On a CPU they are uint8, and `Finish` resizes and normalizes them later.

    Args:
        config: Names the crop and the augmentations.
        spec: Describes the images.
        preprocessing: Says how to resize for validation, and how to normalize.
        resize: Resizes on a CPU; `None` on a GPU.
        until: For measurements, the graph ends with this stage.
    """
    # The bytes are not copied, so the caller must keep them in place.
    encoded = fn.external_source(name=ENCODED, dtype=types.UINT8, ndim=1, no_copy=True)
    image = with_headers_read(encoded, config.max_pixels)
    if until == "headers":
        return image
    options: dict[str, Any] = {"size": spec.image_size, "dtype": DTYPES[spec.dtype], "resize": resize, "until": until}
    if spec.is_train:
        return operators.training_images(image, config, preprocessing, **options)
    return operators.validation_images(image, preprocessing, **options, hw_decoder_load=config.hw_decoder_load)


def has_conditionals(config: "DataConfig", spec: "LoaderSpec") -> bool:
    """Whether an augmentation may contain an `if`. DALI then translates the graph's Python, which takes half a second."""
    return spec.is_train and any(not isinstance(step, HorizontalFlip) for step in config.augment)
