"""The pair that the DALI loader replaces: `ImageDataset` on Pillow, and a prefetcher over `DataLoader`.

Tests compare pixels with it, and benchmarks use it as the baseline.
"""

import io
import math
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.augment import HorizontalFlip, RandomResizedCrop
from pipelines.bad_samples.limits import too_many_pixels
from pipelines.config import DataConfig
from pipelines.loader import MEAN, STD, Batch, Loader, resize_shorter_for
from pipelines.shards.deal import Deal
from pipelines.shards.index import read_index
from pipelines.shards.members import require_members
from pipelines.shards.shard_set import ShardSet, read_label
from pipelines.spec import LoaderSpec

Image.MAX_IMAGE_PIXELS = None  # --data.max-pixels takes its place


class ImageDataset(Dataset[dict[str, Tensor]]):
    """The samples of local shards, decoded and augmented by Pillow.

    Items are `{"image": (3, image_size, image_size) float32 normalized, "target": () int64}`, on the CPU. An index beyond the
    length gives the same sample in a later epoch, with other random numbers. An item depends only on seed and index.

    Args:
        shards: Shards of the split.
        config: Names the crop and the flips, and limits the pixels of an image.
        spec: Describes the images; `num_classes` must be set.

    Raises:
        ValueError: The shards are remote, or a label is missing or out of range. An item raises it if its image cannot be used.
    """

    def __init__(self, shards: ShardSet, config: DataConfig, spec: LoaderSpec) -> None:
        self._spec, self._crop, self._max_pixels = spec, config.crop, config.max_pixels
        self._flips = [flip for flip in config.augment if isinstance(flip, HorizontalFlip)]
        assert spec.num_classes is not None
        self._samples = _locate(shards, spec.num_classes)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tar, offset, size, label = self._samples[index % len(self)]
        with open(tar, "rb") as file:
            file.seek(offset)
            encoded = file.read(size)
        try:
            image = self._decoded(encoded)
        except Exception as error:  # Pillow's plugins raise a dozen types of errors
            if isinstance(error, MemoryError):
                raise
            reason = "no image that Pillow reads" if isinstance(error, UnidentifiedImageError) else str(error)
            raise ValueError(f"{tar}:{offset}: {reason}") from error
        if self._spec.is_train:
            rng = np.random.default_rng([self._spec.seed, index])
            image = random_resized_crop(image, self._spec.image_size, self._crop, rng)
            for flip in self._flips:
                if rng.random() < flip.probability:
                    image = ImageOps.mirror(image)
        else:
            image = resized_center_crop(image, self._spec.image_size)
        return {"image": normalized(image), "target": torch.tensor(label)}

    def _decoded(self, encoded: bytes) -> Image.Image:
        opened = Image.open(io.BytesIO(encoded))  # reads the header only
        if too_many := too_many_pixels(*opened.size, self._max_pixels, "--data.max-pixels"):
            raise ValueError(too_many)
        return ImageOps.exif_transpose(opened).convert("RGB")  # Pillow leaves EXIF rotation to the caller


class EpochBatches:
    """Iterates over the sample indices of a rank's batches, from a position to the end of its epoch.

    Attributes:
        position: Epoch, batch and offset to start from.
    """

    def __init__(self, deal: Deal) -> None:
        self._deal = deal
        self.position = (0, 0, 0)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first_batch, offset = self.position
        for batch in range(first_batch, self._deal.num_batches(offset)):
            yield (self._deal.plan(epoch, batch, offset).samples + epoch * self._deal.order.num_places).tolist()


class CUDAPrefetcher(Loader):
    """Copies the next batch to the device while the model works on the current one.

    Args:
        shards: Shards of the split.
        config: Names the crop and the flips.
        spec: Describes the batches; `num_classes` must be set.
        deal: This rank's share of the samples.

    Raises:
        ValueError: The shards are remote, or a label is missing or out of range.
    """

    def __init__(self, shards: ShardSet, config: DataConfig, spec: LoaderSpec, deal: Deal) -> None:
        settings = {
            "data set": f"{shards.num_samples:,} samples",
            **spec.settings(),
            "order": str(deal.order),
            "augmentation": str([config.crop, *config.augment]),
        }
        super().__init__(deal, settings)
        self._device = spec.device
        self._stream = torch.cuda.Stream(spec.device) if spec.device.type == "cuda" else None
        self._sampler, num_workers = EpochBatches(deal), spec.threads(config)
        self._dataloader: DataLoader[dict[str, Tensor]] | None = DataLoader(
            ImageDataset(shards, config, spec),
            batch_sampler=self._sampler,
            num_workers=num_workers,
            pin_memory=self._stream is not None,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # otherwise DataLoader draws a seed for its workers from the global generator
        )
        self._batches: Iterator[dict[str, Tensor]] = iter([])
        self._next: Batch | None = None
        self._go_to(0, 0, 0)

    def next(self) -> Batch | None:
        batch = self._next
        if batch is None:
            return None
        self._is_fresh = False
        self._batch += 1
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)
            batch["image"].record_stream(stream)
            batch["target"].record_stream(stream)
        self._preload()
        return batch

    def close(self) -> None:
        self._batches, self._next = iter([]), None
        self._dataloader = None  # this ends its worker processes

    def _go_to(self, epoch: int, batch: int, offset: int) -> None:
        if self._dataloader is None:
            raise ValueError("the loader is closed")
        super()._go_to(epoch, batch, offset)
        self._sampler.position = epoch, batch, offset
        self._batches = iter(self._dataloader)
        self._preload()

    def _preload(self) -> None:
        self._next = None
        try:
            batch = next(self._batches, None)
        except ValueError as error:  # that of a worker process begins with its traceback
            raise ValueError(str(error).rstrip().rpartition("\nValueError: ")[2]) from error
        if batch is not None:
            with torch.cuda.stream(self._stream):  # does nothing without a stream
                self._next = {
                    "image": batch["image"].to(self._device, non_blocking=True, memory_format=torch.channels_last),
                    "target": batch["target"].to(self._device, non_blocking=True),
                }


def resized_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Applies torchvision's `Resize(resize_shorter_for(size))` and `CenterCrop(size)`."""
    width, height = image.size
    shorter, resize_shorter = min(width, height), resize_shorter_for(size)
    width, height = width * resize_shorter // shorter, height * resize_shorter // shorter
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def random_resized_crop(image: Image.Image, size: int, crop: RandomResizedCrop, rng: np.random.Generator) -> Image.Image:
    """Applies torchvision's `RandomResizedCrop`, but after ten misses takes the whole image instead of its center."""
    width, height = image.size
    scale, ratio = crop.scale, crop.ratio
    box = (0, 0, width, height)
    for _ in range(10):
        area, log_ratio, x, y = rng.random(4)
        target = width * height * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + log_ratio * (math.log(ratio[1]) - math.log(ratio[0])))
        crop_width, crop_height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(x * (width - crop_width + 1)), int(y * (height - crop_height + 1))
            box = (left, top, left + crop_width, top + crop_height)
            break
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def normalized(image: Image.Image) -> Tensor:
    """Returns an RGB image normalized by ImageNet's mean and standard deviation: `(3, H, W)` float32."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _locate(shards: ShardSet, num_classes: int) -> list[tuple[str, int, int, int]]:
    """Returns the tar, offset and size of each image, and its label."""
    if shards.is_remote:
        raise ValueError(f"{shards.tars[0]}: --data.backend pillow reads local shards only; copy them, or use the dali backend")
    located = []
    for tar, index in zip(shards.tars, shards.indices, strict=True):
        with open(tar, "rb") as file:
            for sample in read_index(index):
                image, _ = require_members(tar, sample, shards.images, shards.label_reader.extension)
                label = read_label(file, sample, tar, shards.label_reader)
                if label >= num_classes:
                    raise ValueError(
                        f"{tar}:{image.offset}:{image.name}: class {label} is out of range; "
                        f"there are {num_classes} classes, from 0 on"
                    )
                located.append((tar, image.offset, image.size, label))
    return located
