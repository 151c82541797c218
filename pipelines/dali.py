"""The one DALI graph, for training and validation, CPU and GPU; and the loader around it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, pipeline_def
from torch.utils.dlpack import from_dlpack

from pipelines import augment
from pipelines.labels import LabelReader
from pipelines.loader import MEAN, STD, Batch, Loader, rank_extent, resize_shorter_for
from pipelines.shards import IMAGE_EXTENSIONS, ShardSet

DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}


@pipeline_def(exec_dynamic=True)  # the dynamic executor hands its buffers over, where the static one has them copied
def image_pipeline(
    shards: ShardSet,
    *,
    train: bool,
    device: augment.Device,
    image_size: int,
    dtype: torch.dtype,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    shuffle_buffer: int,
    shuffle_seed: int,
    rank: int,
    world_size: int,
) -> tuple[DataNode, DataNode, DataNode]:
    """Images `(H, W, 3)` of `dtype` on `device`; labels' bytes and `tar:offset:member`, both uint8 on the CPU."""
    order: dict[str, Any] = (
        {
            "random_shuffle": True,
            "initial_fill": shuffle_buffer,
            "shuffle_after_epoch": True,
            "shuffle_after_epoch_seed": shuffle_seed,
        }
        if train
        else {"stick_to_shard": True, "pad_last_batch": True}
    )
    encoded, label = fn.readers.webdataset(
        paths=[str(tar) for tar in shards.tars],
        index_paths=[str(index) for index in shards.indices],
        ext=[";".join(IMAGE_EXTENSIONS), shards.label_reader.extension],
        case_sensitive_extensions=False,
        missing_component_behavior="error",
        shard_id=rank,
        num_shards=world_size,
        **order,
    )
    mirror: DataNode | int
    if train:
        pixels = augment.random_resized_crop(encoded, image_size, device, crop_scale, crop_ratio)
        mirror = fn.random.coin_flip(probability=0.5)
    else:
        pixels = augment.resized_center_crop(encoded, image_size, resize_shorter_for(image_size), device)
        mirror = 0
    image = fn.crop_mirror_normalize(
        pixels,
        mirror=mirror,
        dtype=DTYPES[dtype],
        output_layout="HWC",
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
    )
    # Texts differ in length; padded with zeros a batch of them is one tensor.
    return image, fn.pad(label), fn.pad(fn.get_property(encoded, key="source_info"))


class DALILoader(Loader):
    """Decodes and augments on `device` while the model computes.

    An epoch of training has as many whole batches as the smallest rank's share allows; what is left over comes first in the
    next epoch. An epoch of validation has each sample of the rank's share once, in the order of the shards; its last batch may
    be smaller, and a rank without samples has no batch.

    Args:
        shards: What to read.
        train: Shuffle, crop at random and flip; otherwise resize and crop the centre.
        batch_size: Samples a batch, on this rank.
        image_size: Side of the images, pixels.
        device: "cpu", or a CUDA device with its index.
        dtype: Of the images; float32, or float16 on a GPU.
        num_classes: Labels must be below it.
        num_threads: CPU threads that DALI uses.
        crop_scale: See `augment.random_resized_crop`; training only.
        crop_ratio: The same.
        shuffle_buffer: Encoded samples among which the reader draws at random; training only.
        seed: Of shuffling and augmentation.
        rank: Which share of the samples.
        world_size: How many shares there are.

    Raises:
        ValueError: Training on fewer samples than make one batch on every rank.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        train: bool,
        batch_size: int,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype,
        num_classes: int,
        num_threads: int,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        shuffle_buffer: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._train, self._device, self._num_classes, self._batch_size = train, device, num_classes, batch_size
        self._num_samples, num_batches = _epoch(shards.num_samples, batch_size, rank, world_size, train)
        self._num_batches = num_batches
        self._delivered = 0
        self._pipeline_options = {
            "batch_size": batch_size,
            "num_threads": num_threads,
            "device_id": device.index if device.type == "cuda" else None,
            "seed": int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]) % 2**31,
            "train": train,
            "device": "gpu" if device.type == "cuda" else "cpu",
            "image_size": image_size,
            "dtype": dtype,
            "crop_scale": crop_scale,
            "crop_ratio": crop_ratio,
            "shuffle_buffer": min(shuffle_buffer, shards.num_samples),
            "shuffle_seed": seed % 2**31,
            "rank": rank,
            "world_size": world_size,
        }
        if world_size > shards.num_samples:
            # The reader refuses more ranks than samples. Each rank has one sample or none then.
            first, _ = rank_extent(shards.num_samples, rank, world_size)
            self._pipeline_options.update(rank=first, world_size=shards.num_samples)
        # The reader pads every rank's share of validation to as many batches as the largest one has.
        largest_share = -(-shards.num_samples // world_size)
        self._num_padding_batches = 0 if train else -(-largest_share // batch_size) - num_batches
        self._shards = shards
        self._pipeline = self._start() if num_batches else None

    def _start(self) -> Pipeline:
        pipeline: Pipeline = image_pipeline(self._shards, **self._pipeline_options)
        with _errors_for_people():
            pipeline.build()
        return pipeline

    def __len__(self) -> int:
        return self._num_batches

    def next(self) -> Batch | None:
        if self._delivered == self._num_batches:
            return None
        assert self._pipeline is not None, "the loader is closed"
        with _errors_for_people():
            image, label, source = (output.as_tensor() for output in self._pipeline.run())
        count = min(self._batch_size, self._num_samples - self._delivered * self._batch_size)
        self._delivered += 1
        labels = parse_labels(np.asarray(label)[:count], np.asarray(source), self._num_classes, self._shards.label_reader)
        return {
            # The tensor takes over DALI's buffer. NHWC seen as NCHW is channels_last.
            "image": from_dlpack(image)[:count].permute(0, 3, 1, 2),
            "target": torch.from_numpy(labels).to(self._device, non_blocking=True),
        }

    def reset(self) -> None:
        if self._delivered and not self._train:
            self._rewind()
        self._delivered = 0

    def _rewind(self) -> None:
        """Brings validation back to its first sample."""
        if self._delivered < self._num_batches:
            self._pipeline = self._start()  # the reader only moves forwards
            return
        assert self._pipeline is not None, "the loader is closed"
        for _ in range(self._num_padding_batches):
            self._pipeline.run()

    def close(self) -> None:
        self._pipeline = None


def parse_labels(
    text: NDArray[np.uint8], sources: NDArray[np.uint8], num_classes: int, reader: LabelReader
) -> NDArray[np.int64]:
    """Class numbers, int64 `(N,)`, from the bytes of labels, uint8 `(N, longest)` padded with zeros.

    Raises:
        ValueError: A label is no class or not below `num_classes`; names the sample from `sources`.
    """
    labels = np.empty(len(text), np.int64)
    for i, padded in enumerate(text):
        raw = padded.tobytes().rstrip(b"\0")
        place = sources[i].tobytes().rstrip(b"\0").decode(errors="replace")
        labels[i] = reader.parse(raw, place)
        if labels[i] >= num_classes:
            raise ValueError(f"{place}: class {labels[i]} is out of range; there are {num_classes} classes, from 0 on")
    return labels


@contextlib.contextmanager
def _errors_for_people() -> Iterator[None]:
    """DALI's errors, which are some twenty lines of graph and C++ around the one that names the sample, as that line."""
    try:
        yield
    except RuntimeError as error:
        _, _, what = str(error).partition("encountered:")
        lines = [line.strip() for line in what.splitlines()]
        kept = [line for line in lines if line and not line.startswith(("C++ context", "Current pipeline", "Assert on"))]
        hint = (
            " (a sample in these shards is no image that it can read; it does not say which)" if "nvImageCodec" in what else ""
        )
        raise ValueError(f"the data pipeline stopped: {' '.join(kept) or error}{hint}") from error


def _epoch(num_samples: int, batch_size: int, rank: int, world_size: int, train: bool) -> tuple[int, int]:
    """Samples and batches in this rank's epoch."""
    if train:
        batches = num_samples // world_size // batch_size
        if not batches:
            raise ValueError(
                f"{num_samples} training samples over {world_size} rank(s) do not fill one batch of {batch_size}; "
                "lower --batch-size"
            )
        return batches * batch_size, batches
    start, end = rank_extent(num_samples, rank, world_size)
    return end - start, -(-(end - start) // batch_size)
