"""From bytes on storage to a batch on the device: `build_loader(config, split, ...)` is all that others need."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipelines.loader import Batch, Loader
from pipelines.shards import ShardSet, open_shards

if TYPE_CHECKING:  # imported where it is used: torch takes seconds, and a tool's --help needs none of it
    import torch

__all__ = ["Batch", "DataConfig", "Loader", "ShardSet", "build_loader", "open_shards"]


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are varied."""

    train: str = ""
    """Training shards: a glob, a brace pattern (train-{000000..000007}.tar) or a folder. Without it the embedded demo runs."""
    valid: str = ""
    """Validation shards, in the same notation."""
    index_dir: str = ""
    """Folder of index files that are taken before those beside the tars: `shards index` and `shards verify` write such."""
    label_key: str = ""
    """Key of the label in each sample's .json, a.b for nested ones. Without it the label is the sample's .cls."""
    class_file: str = ""
    """File of class names, one a line in the order of their numbers. Labels may be names then, in .cls as in .json."""
    backend: Literal["dali", "pillow"] = "dali"
    """dali: the pipeline. pillow: the DataLoader pair that it replaces, for comparison."""
    threads: int | None = None
    """CPU threads (pillow: worker processes) that load data. By default chosen by device: see docs/performance.md."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random training crop, as a part of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width/height of a random training crop."""
    shuffle_buffer: int = 2048
    """Encoded samples among which the reader draws at random. The converter's shards are shuffled; sorted ones need more."""

    def __post_init__(self) -> None:
        for name, (low, high) in (("crop-scale", self.crop_scale), ("crop-ratio", self.crop_ratio)):
            if not 0 < low <= high:
                raise ValueError(f"--data.{name} {low} {high}: two positive numbers are needed, the smaller first")
        if self.crop_scale[1] > 1:
            raise ValueError(f"--data.crop-scale {self.crop_scale[1]}: a crop cannot be larger than the image, 1.0")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--data.threads {self.threads}: at least 1 is needed")
        if self.shuffle_buffer < 1:
            raise ValueError(f"--data.shuffle-buffer {self.shuffle_buffer}: at least 1 is needed")


def build_loader(
    config: DataConfig,
    split: Literal["train", "valid"],
    *,
    batch_size: int,
    image_size: int,
    device: "torch.device",
    dtype: "torch.dtype | None" = None,
    num_threads: int = 4,
    shards: ShardSet | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """The loader of one split for one rank.

    Args:
        config: Names the shards, the backend and the augmentation.
        split: "train": shuffled, cropped at random, flipped, whole batches only. "valid": in order, each sample once.
        batch_size: Samples a batch, on this rank.
        image_size: Side of the images, pixels.
        device: Where the batches lie; a CUDA device needs its index.
        dtype: Of the images; float32 (the default), or float16 on a GPU.
        num_threads: CPU threads or worker processes.
        shards: What `open_shards` gave for the split, where the caller has it already.
        num_classes: Labels must be below it; by default what the shards say.
        seed: Of shuffling and augmentation.
        rank: Which share of the samples.
        world_size: How many shares there are.

    Raises:
        ValueError: No such shards, or too few samples for a batch.
    """
    train = split == "train"
    shards = shards or open_shards(
        config.train if train else config.valid, split, config.index_dir, config.label_key, config.class_file
    )
    num_classes = num_classes or shards.num_classes()
    if config.backend == "pillow":
        from pipelines.pillow import ImageDataset, pillow_loader

        dataset = ImageDataset(shards, image_size, "Train" if train else "Valid", config.crop_scale, config.crop_ratio)
        return pillow_loader(
            dataset,
            batch_size=batch_size,
            device=device,
            num_classes=num_classes,
            num_workers=num_threads,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
    import torch

    from pipelines.dali import DALILoader

    return DALILoader(
        shards,
        train=train,
        batch_size=batch_size,
        image_size=image_size,
        device=device,
        dtype=dtype or torch.float32,
        num_classes=num_classes,
        num_threads=num_threads,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        shuffle_buffer=config.shuffle_buffer,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
