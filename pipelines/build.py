"""`build_loader(config, split, ...)`: the loader of one split for one rank, whichever backend it has."""

from typing import TYPE_CHECKING, Literal

from pipelines.augment import HorizontalFlip
from pipelines.config import DataConfig
from pipelines.loader import Loader
from pipelines.shards.shard_set import ShardSet
from pipelines.tuned import with_tuned

if TYPE_CHECKING:  # imported where it is used: torch takes seconds, and a tool's --help needs none of it
    from pathlib import Path

    import torch


def build_loader(
    config: DataConfig,
    split: Literal["train", "valid"],
    *,
    batch_size: int,
    image_size: int,
    device: "torch.device",
    dtype: "torch.dtype | None" = None,
    num_threads: int | None = None,
    shards: ShardSet | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    quarantine: "Path | None" = None,
) -> Loader:
    """The loader of one split for one rank.

    Args:
        config: Names the shards, the backend and the augmentation.
        split: "train": shuffled, cropped at random, augmented, whole batches only. "valid": in order, each sample once.
        batch_size: Samples a batch, on this rank.
        image_size: Side of the images, pixels.
        device: Where the batches lie; a CUDA device needs its index.
        dtype: Of the images; float32 (the default), or float16 on a GPU.
        num_threads: CPU threads or worker processes; by default those of `config`, or 4.
        shards: What `open_shards` gave for the split, where the caller has it already.
        num_classes: Labels must be below it; by default what the shards say.
        seed: Of shuffling and augmentation.
        rank: Which share of the samples.
        world_size: How many shares there are.
        quarantine: File to which samples that cannot be used are written, if any.

    Raises:
        ValueError: No such shards, or too few samples for a batch; or `config.tuned` cannot be used.
    """
    config = with_tuned(config, device)
    num_threads = num_threads if num_threads is not None else config.threads or 4
    train = split == "train"
    shards = shards or config.open_shards(split)
    num_classes = num_classes or shards.num_classes()
    from pipelines.shards.order import Deal, choose_order

    deal = Deal(choose_order(config, shards, train, seed), train, batch_size, rank, world_size)
    if config.backend == "pillow":
        from pipelines.pillow import ImageDataset, pillow_loader

        flips = tuple(augmentation for augmentation in config.augment if isinstance(augmentation, HorizontalFlip))
        dataset = ImageDataset(shards, image_size, "Train" if train else "Valid", config.crop, flips, seed)
        return pillow_loader(dataset, deal, device=device, num_classes=num_classes, num_workers=num_threads)
    import torch

    if config.backend == "synthetic":
        from pipelines.synthetic import SyntheticLoader

        return SyntheticLoader(
            deal, image_size=image_size, device=device, dtype=dtype or torch.float32, num_classes=num_classes, seed=seed
        )
    from pipelines.dali.loader import DALILoader

    return DALILoader(
        shards,
        config,
        deal,
        image_size=image_size,
        device=device,
        dtype=dtype or torch.float32,
        num_classes=num_classes,
        num_threads=num_threads,
        seed=seed,
        quarantine=quarantine,
    )
