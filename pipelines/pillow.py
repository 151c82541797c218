"""The pair that the DALI loader replaces, kept working: `ImageDataset` on Pillow and a prefetcher over `DataLoader`.

It is the reference that tests compare pixels with, and the baseline of benchmarks.
"""

import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipelines.augment import HorizontalFlip, RandomResizedCrop
from pipelines.loader import MEAN, STD, Batch, Loader, check_state, resize_shorter_for
from pipelines.shards.index import Sample, read_index
from pipelines.shards.labels import LabelReader
from pipelines.shards.order import Deal
from pipelines.shards.shard_set import IMAGE_EXTENSIONS, ShardSet, find_component, read_label

Mode = Literal["Train", "Valid"]
CROP, FLIPS = RandomResizedCrop(), (HorizontalFlip(),)


class Located(NamedTuple):
    """An image and its label: `size` bytes at `offset` of the file at `path` (-1: to its end), and what messages call it."""

    path: str
    offset: int
    size: int
    label: int
    place: str


class ImageDataset(Dataset[dict[str, Tensor]]):
    """Images and labels out of a folder with one folder a class, or out of shards; decoded and augmented by Pillow.

    Items are `{"image": (3, image_size, image_size) float32 normalized, "target": () int64}`, on the CPU. An index beyond the
    length is the same sample in a later epoch, where it is varied in another way; an item is a function of seed and index.

    Args:
        images: A folder of class folders, classes numbered in sorted order; or the shards of a split.
        image_size: Side of the images, pixels.
        mode: "Train" crops at random and flips; "Valid" resizes and crops the centre.
        crop: How training images are cropped.
        flips: What happens to them then.
        seed: Of the random crops and flips.
    """

    def __init__(
        self,
        images: str | Path | ShardSet,
        image_size: int,
        mode: Mode,
        crop: RandomResizedCrop = CROP,
        flips: tuple[HorizontalFlip, ...] = FLIPS,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        self.image_size, self.mode, self.crop, self.flips = image_size, mode, crop, flips
        self.samples: list[Located] = _shard_samples(images) if isinstance(images, ShardSet) else _folder_samples(Path(images))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path, offset, size, label, _ = self.samples[index % len(self)]
        with open(path, "rb") as file:
            file.seek(offset)
            encoded = file.read(size)
        # Pillow opens files lazily and leaves EXIF rotation to the caller.
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
        if self.mode == "Train":
            rng = np.random.default_rng([self.seed, index])
            image = random_resized_crop(image, self.image_size, self.crop, rng)
            for flip in self.flips:
                if rng.random() < flip.probability:
                    image = ImageOps.mirror(image)
        else:
            image = resized_center_crop(image, self.image_size)
        return {"image": normalized(image), "target": torch.tensor(label)}


class EpochBatches(Sampler[list[int]]):
    """The indices of a rank's batches in one epoch.

    Attributes:
        deal: Which samples the batches have.
        epoch: From 0.
        first_batch: With which to begin.
        offset: As for `Deal.num_batches`.
    """

    def __init__(self, deal: Deal) -> None:
        self.deal = deal
        self.epoch = self.first_batch = self.offset = 0

    def __len__(self) -> int:
        return self.deal.num_batches(self.offset)

    def __iter__(self) -> Iterator[list[int]]:
        num_samples = self.deal.order.num_places
        for batch in range(self.first_batch, len(self)):
            yield (self.deal.plan(self.epoch, batch, self.offset).samples + self.epoch * num_samples).tolist()


class CUDAPrefetcher(Loader):
    """Moves the next batch to the device while the model works on this one.

    Args:
        dataloader: Gives batches as dicts of CPU tensors, `{"image", "target"}`; its `batch_sampler` is an `EpochBatches`.
        device: Where the batches go; on a CPU they are handed on as they come.
    """

    def __init__(self, dataloader: DataLoader[dict[str, Tensor]], device: torch.device) -> None:
        assert isinstance(dataloader.batch_sampler, EpochBatches)
        assert isinstance(dataloader.dataset, ImageDataset)
        self.device, self._sampler, self._dataset = device, dataloader.batch_sampler, dataloader.dataset
        self.dataloader: DataLoader[dict[str, Tensor]] | None = dataloader
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches: Iterator[dict[str, Tensor]] = iter([])
        self._next: Batch | None = None
        self._go_to(0, 0, 0)

    def __len__(self) -> int:
        return len(self._sampler)

    def reset(self) -> None:
        if not self._is_fresh:
            self._go_to(self._sampler.epoch + 1, 0, 0)

    def next(self) -> Batch | None:
        batch = self._next
        if batch is None:
            return None
        self._is_fresh = False
        self._delivered += 1
        if self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self._stream)
            batch["image"].record_stream(stream)
            batch["target"].record_stream(stream)
        self._preload()
        return batch

    def state_dict(self) -> dict[str, Any]:
        sampler = self._sampler
        return {"settings": self._settings(), **sampler.deal.state(sampler.epoch, self._delivered, sampler.offset)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(state, self._settings(), is_elastic=self._sampler.deal.train)
        self._go_to(*self._sampler.deal.position(state["epoch"], state["place"]))

    def _settings(self) -> dict[str, int | str]:
        """What the batches depend on, but for the position."""
        dataset, deal = self._dataset, self._sampler.deal
        return {
            "data set": f"{len(dataset):,} samples",
            "seed": dataset.seed,
            "order": str(deal.order),
            "batch size": deal.batch_size,
            "number of ranks": deal.world_size,
            "rank": deal.rank,
            "image size": dataset.image_size,
            "augmentation": str([dataset.crop, *dataset.flips]),
        }

    def close(self) -> None:
        self._batches, self._next = iter([]), None
        self.dataloader = None  # and with it its worker processes

    def _go_to(self, epoch: int, batch: int, offset: int) -> None:
        self._sampler.epoch, self._sampler.first_batch, self._sampler.offset = epoch, batch, offset
        self._delivered, self._is_fresh = batch, True
        if self.dataloader is None:
            raise ValueError("the loader is closed")
        self._batches = iter(self.dataloader)
        self._preload()

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
    dataset: ImageDataset, deal: Deal, *, device: torch.device, num_classes: int, num_workers: int
) -> CUDAPrefetcher:
    """The pair put together as the old training script did; arguments as for `DALILoader`."""
    for sample in dataset.samples:
        if sample.label >= num_classes:
            raise ValueError(
                f"{sample.place}: class {sample.label} is out of range; there are {num_classes} classes, from 0 on"
            )
    dataloader: DataLoader[dict[str, Tensor]] = DataLoader(
        dataset,
        batch_sampler=EpochBatches(deal),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # DataLoader draws a seed for its workers, from the global generator otherwise
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


def random_resized_crop(image: Image.Image, size: int, crop: RandomResizedCrop, rng: np.random.Generator) -> Image.Image:
    """Torchvision's `RandomResizedCrop`, without its fallback's centring: after ten misses the whole image is taken."""
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
    """The pixels of an RGB image, `(3, H, W)` float32, without ImageNet's mean and by its deviation."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


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
    if shards.is_remote:
        raise ValueError(f"{shards.tars[0]}: --data.backend pillow reads local shards only; copy them, or use the dali backend")
    return [
        sample
        for tar, index in zip(shards.tars, shards.indices, strict=True)
        for sample in _tar_samples(tar, read_index(index), shards.label_reader)
    ]


def _tar_samples(tar: str, samples: list[Sample], reader: LabelReader) -> list[Located]:
    located = []
    with open(tar, "rb") as file:
        for sample in samples:
            image, label = find_component(sample, IMAGE_EXTENSIONS, tar), read_label(file, sample, tar, reader)
            located.append(Located(tar, image.offset, image.size, label, f"{tar}:{image.offset}:{image.name}"))
    return located
