"""The pair that the DALI loader replaces, kept working: `ImageDataset` on Pillow and a prefetcher over `DataLoader`.

It is the reference that tests compare pixels with, and the baseline of benchmarks.
"""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from pipelines.index import Sample, read_index
from pipelines.labels import LabelReader
from pipelines.loader import MEAN, STD, Batch, Loader, rank_extent, resize_shorter_for
from pipelines.shards import IMAGE_EXTENSIONS, ShardSet, find_component, read_label

Mode = Literal["Train", "Valid"]


class Located(NamedTuple):
    """An image and its label: `size` bytes at `offset` of the file at `path` (-1: to its end), and what messages call it."""

    path: str
    offset: int
    size: int
    label: int
    place: str


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Images and labels out of a folder with one folder a class, or out of shards; decoded and augmented by Pillow.

    Items are `{"image": (3, image_size, image_size) float32 normalized, "target": () int64}`, on the CPU.

    Args:
        images: A folder of class folders, classes numbered in sorted order; or the shards of a split.
        image_size: Side of the images, pixels.
        mode: "Train" crops at random and flips; "Valid" resizes and crops the centre.
        crop_scale: Smallest and largest area of a random crop, as a part of the image's.
        crop_ratio: Smallest and largest width/height of a random crop.
    """

    def __init__(
        self,
        images: str | Path | ShardSet,
        image_size: int,
        mode: Mode,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        self.image_size, self.mode, self.crop_scale, self.crop_ratio = image_size, mode, crop_scale, crop_ratio
        self.samples: list[Located] = _shard_samples(images) if isinstance(images, ShardSet) else _folder_samples(Path(images))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path, offset, size, label, _ = self.samples[index]
        with open(path, "rb") as file:
            file.seek(offset)
            encoded = file.read(size)
        # Pillow opens files lazily and leaves EXIF rotation to the caller.
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
        if self.mode == "Train":
            image = random_resized_crop(image, self.image_size, self.crop_scale, self.crop_ratio)
            if torch.rand(()) < 0.5:
                image = ImageOps.mirror(image)
        else:
            image = resized_center_crop(image, self.image_size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        normalized = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return {"image": normalized, "target": torch.tensor(label)}


class CUDAPrefetcher(Loader):
    """Moves the next batch to the device while the model works on this one.

    Args:
        dataloader: Gives batches as dicts of CPU tensors, `{"image", "target"}`.
        device: Where the batches go; on a CPU they are handed on as they come.
    """

    def __init__(self, dataloader: DataLoader[dict[str, Tensor]], device: torch.device) -> None:
        self.dataloader, self.device = dataloader, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches: Iterator[dict[str, Tensor]] = iter([])
        self._next: Batch | None = None
        self._epoch = -1
        self._fresh = False
        self.reset()

    def __len__(self) -> int:
        return len(self.dataloader)

    def reset(self) -> None:
        if self._fresh:
            return
        self._fresh = True
        self._epoch += 1
        if isinstance(self.dataloader.sampler, DistributedSampler):
            self.dataloader.sampler.set_epoch(self._epoch)
        self._batches = iter(self.dataloader)
        self._preload()

    def next(self) -> Batch | None:
        self._fresh = False
        batch = self._next
        if batch is None:
            return None
        if self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self._stream)
            batch["image"].record_stream(stream)
            batch["target"].record_stream(stream)
        self._preload()
        return batch

    def close(self) -> None:
        self._batches, self._next = iter([]), None

    def _preload(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            self._next = None
            return
        with torch.cuda.stream(self._stream):  # does nothing where there is no stream
            self._next = {
                "image": batch["image"].to(self.device, non_blocking=True, memory_format=torch.channels_last),
                "target": batch["target"].to(self.device, non_blocking=True),
            }


def pillow_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    device: torch.device,
    num_classes: int,
    num_workers: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> CUDAPrefetcher:
    """The pair put together as the old training script did; arguments as for `DALILoader`."""
    train = dataset.mode == "Train"
    for sample in dataset.samples:
        if sample.label >= num_classes:
            raise ValueError(
                f"{sample.place}: class {sample.label} is out of range; there are {num_classes} classes, from 0 on"
            )
    if train and len(dataset) // world_size < batch_size:
        raise ValueError(
            f"{len(dataset)} training samples over {world_size} rank(s) do not fill one batch of {batch_size}; "
            "lower --batch-size"
        )
    share = Subset(dataset, range(*rank_extent(len(dataset), rank, world_size)))
    dataloader: DataLoader[dict[str, Tensor]] = DataLoader(
        dataset if train else share,
        batch_size=batch_size,
        sampler=DistributedSampler(dataset, world_size, rank, seed=seed, drop_last=True) if train else None,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        drop_last=train,
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )
    return CUDAPrefetcher(dataloader, device)


def resized_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Torchvision's `Resize(resize_shorter_for(size))` and `CenterCrop(size)`."""
    width, height = image.size
    shorter, resize_shorter = min(width, height), resize_shorter_for(size)
    width, height = width * resize_shorter // shorter, height * resize_shorter // shorter
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def random_resized_crop(image: Image.Image, size: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Image.Image:
    """Torchvision's `RandomResizedCrop`, without its fallback's centring: after ten misses the whole image is taken."""
    width, height = image.size
    box = (0, 0, width, height)
    for _ in range(10):
        area, log_ratio, x, y = torch.rand(4).tolist()
        target = width * height * (scale[0] + area * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + log_ratio * (math.log(ratio[1]) - math.log(ratio[0])))
        crop_width, crop_height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(x * (width - crop_width + 1)), int(y * (height - crop_height + 1))
            box = (left, top, left + crop_width, top + crop_height)
            break
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _folder_samples(folder: Path) -> list[Located]:
    classes = sorted(child.name for child in folder.iterdir() if child.is_dir())
    samples = [
        Located(str(path), 0, -1, label, str(path))
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
        if path.is_file()
    ]
    if not samples:
        raise ValueError(f"{folder}: no images; a folder with one folder a class is needed")
    return samples


def _shard_samples(shards: ShardSet) -> list[Located]:
    return [
        sample
        for tar, index in zip(shards.tars, shards.indices, strict=True)
        for sample in _tar_samples(tar, read_index(index), shards.label_reader)
    ]


def _tar_samples(tar: Path, samples: list[Sample], reader: LabelReader) -> list[Located]:
    located = []
    with open(tar, "rb") as file:
        for sample in samples:
            image, label = find_component(sample, IMAGE_EXTENSIONS, tar), read_label(file, sample, tar, reader)
            located.append(Located(str(tar), image.offset, image.size, label, f"{tar}:{image.offset}:{image.name}"))
    return located
