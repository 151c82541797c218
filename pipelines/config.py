"""The settings of the data: where the images come from, and how they are varied."""

from dataclasses import dataclass
from typing import Literal

from pipelines.augment import HorizontalFlip, RandomResizedCrop
from pipelines.notation import AugmentationList
from pipelines.shards.shard_set import ShardSet, open_shards


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are varied."""

    train: str = ""
    """Training shards: a glob, a brace pattern (train-{000000..000007}.tar) or a folder, local or at a URL (s3://, gs://).
    Without it the embedded demo runs."""
    valid: str = ""
    """Validation shards, in the same notation."""
    index_dir: str = ""
    """Folder of index files that are taken before those beside the tars: `shards index` and `shards verify` write such."""
    label_key: str = ""
    """Key of the label in each sample's .json, a.b for nested ones. Without it the label is the sample's .cls."""
    class_file: str = ""
    """File of class names, one a line in the order of their numbers. Labels may be names then, in .cls as in .json."""
    backend: Literal["dali", "pillow", "synthetic"] = "dali"
    """dali: the pipeline. For comparison: pillow, the DataLoader pair that it replaces; synthetic, batches without cost."""
    threads: int | None = None
    """CPU threads (pillow: worker processes) that load data. By default chosen by device: see docs/performance.md."""
    prefetch: int | None = None
    """Batches that DALI's pipeline works on at a time, beside the one in use; each takes memory. By default DALI's, 2."""
    hw_decoder_load: float | None = None
    """Part of the images, 0 to 1, that a GPU's JPEG decoder in hardware takes, where there is one; by default DALI's, 0.65. It
    may round pixels in another way than the decoder that takes the rest."""
    tuned: str = ""
    """File that `throughput tune` has written for this machine: its threads, prefetch and hw_decoder_load, where not given."""
    crop: RandomResizedCrop = RandomResizedCrop()
    augment: AugmentationList = (HorizontalFlip(),)
    """What happens to training images after the crop, in this order; may be empty. docs/augmentation.md has the parameters."""
    size_schedule: tuple[str, ...] = ()
    """Sizes of training images as EPOCH:SIZE, each from that epoch on (1:128 11:176 21:224); before the first, --image-size."""
    cache_dir: str = ""
    """Folder for local copies of remote shards, kept between runs and shared by them; by default a temporary one."""
    cache_gigabytes: float = 64.0
    """How much the folder for copies may hold, in 10^9 bytes; a temporary one is of one loader."""
    order: Literal["auto", "global", "blocks"] = "auto"
    """Order of training samples, drawn anew for each epoch. global: any sample may come next. blocks: shards are shuffled, and
    samples among --data.block-shards shards, so that storage is read block by block. auto: blocks for remote shards only."""
    block_shards: int | None = None
    """Shards in a block. By default a block has about 16,384 samples."""
    sampler: Literal["uniform", "balanced"] = "uniform"
    """uniform: each training sample comes once an epoch. balanced: each class comes equally often, in epochs of the same
    length, so samples of small classes are repeated. docs/loader.md explains both."""
    repeat_augment: int = 1
    """Times that each training sample comes in a row, every time with another crop and augmentation (arXiv 1901.09335). The
    length of an epoch stays, so an epoch has fewer different samples."""
    on_error: Literal["skip", "stop"] = "skip"
    """What to do about a sample that cannot be used: leave it out and count it, or end the run."""
    max_bad_fraction: float = 0.001
    """Part of a split's samples that may be left out before the run ends; one may, unless this is 0."""
    quarantine: tuple[str, ...] = ()
    """Files or run folders that list bad samples of earlier runs (quarantine.jsonl), which are left out from the start."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--data.threads {self.threads}: at least 1 is needed")
        if self.hw_decoder_load is not None and not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"--data.hw-decoder-load {self.hw_decoder_load}: a number from 0 to 1 is needed")
        if not 0 < self.cache_gigabytes < float("inf"):
            raise ValueError(f"--data.cache-gigabytes {self.cache_gigabytes}: a positive number is needed")
        for name in ("prefetch", "block_shards", "repeat_augment"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--data.{name.replace('_', '-')} {value}: at least 1 is needed")
        if self.backend != "dali" and self.size_schedule:
            raise ValueError(f"--data.size-schedule: the {self.backend} backend has images of one size only")
        for name, unset in (("prefetch", None), ("hw_decoder_load", None), ("tuned", "")):
            if self.backend != "dali" and getattr(self, name) != unset:
                raise ValueError(f"--data.{name.replace('_', '-')}: only --data.backend dali has it, {self.backend} has not")
        if self.sampler == "balanced" and self.order == "blocks":
            raise ValueError("--data.sampler balanced takes samples from all shards; leave --data.order blocks away")
        if self.backend == "pillow" and (self.sampler, self.repeat_augment) != ("uniform", 1):
            raise ValueError("--data.sampler and --data.repeat-augment: --data.backend pillow has each sample once an epoch")
        self.image_size_of(0, 0)
        beyond_pillow = [step.name for step in self.augment if not isinstance(step, HorizontalFlip)]
        if self.backend == "pillow" and beyond_pillow:
            raise ValueError(f"--data.augment {' '.join(beyond_pillow)}: --data.backend pillow has horizontal-flip only")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--data.max-bad-fraction {self.max_bad_fraction}: a number from 0 to 1 is needed")

    def open_shards(self, split: Literal["train", "valid"]) -> ShardSet:
        """The shards of a split.

        Raises:
            ValueError: There are none, or they cannot be used.
        """
        pattern = self.train if split == "train" else self.valid
        return open_shards(pattern, split, self.index_dir, self.label_key, self.class_file)

    def image_size_of(self, epoch: int, image_size: int) -> int:
        """The side of training images in an epoch (from 0), pixels; `image_size` where the schedule has not begun.

        Raises:
            ValueError: The schedule is not one.
        """
        last = 0
        for entry in self.size_schedule:
            first, _, size = entry.partition(":")
            if not (first.isdecimal() and size.isdecimal() and int(first) > last and int(size) >= 32):
                raise ValueError(
                    f"--data.size-schedule {' '.join(self.size_schedule)}: EPOCH:SIZE is needed, epochs from 1 and rising, "
                    f"sizes from 32; {entry!r} is not"
                )
            last = int(first)
            if epoch + 1 >= last:
                image_size = int(size)
        return image_size
