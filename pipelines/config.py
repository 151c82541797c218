"""The settings of the data: where the images come from, and how they are augmented."""

from dataclasses import dataclass
from typing import Literal

from pipelines.augment import Augmentation, HorizontalFlip, RandomResizedCrop
from pipelines.bad_samples.limits import MAX_PIXELS, TIMEOUT_SECONDS, check_max_pixels
from pipelines.shards.shard_set import ShardSet, open_shards

OF_DALI = ("prefetch", "hw_decoder_load", "size_schedule")
SAMPLES_OF_DALI = ("sampler", "repeat_augment", "quarantine")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from, and how they are augmented."""

    train: str = ""
    """Training shards: a glob, a brace pattern (train-{000000..000007}.tar) or a folder, local or s3://, gs://."""
    valid: str = ""
    """Validation shards, in the same notation."""
    index_dir: str = ""
    """Folder of index files that `shards index` wrote. They take precedence over those beside the tars."""
    image_key: str = ""
    """Extension of the image in each sample, such as input.jpg. By default any extension of an image."""
    label_key: str = ""
    """Key of the label in each sample's .json, a.b for nested keys, or X.json:KEY, or a member X.cls. By default the .cls."""
    class_file: str = ""
    """File of class names, one per line, in the order of their numbers. Labels in .cls or .json may then be names."""
    backend: Literal["dali", "pillow", "synthetic"] = "dali"
    """dali: the DALI pipeline. For comparison only: pillow, the DataLoader baseline; synthetic, one batch repeated."""
    threads: int | None = None
    """CPU threads (pillow: worker processes) that load data. The default depends on the device: see docs/performance.md."""
    prefetch: int | None = None
    """Batches that DALI decodes ahead. Each takes memory. By default 2, as in DALI, and on a CPU 3."""
    hw_decoder_load: float | None = None
    """Fraction of the images, 0 to 1, for the GPU's hardware JPEG decoder, if it has one. By default 0.65, as in DALI."""
    crop: RandomResizedCrop = RandomResizedCrop()
    augment: tuple[Augmentation, ...] = (HorizontalFlip(),)
    """Augmentations after the crop, in this order; may be empty. docs/augmentation.md lists the parameters."""
    size_schedule: tuple[str, ...] = ()
    """Training image sizes as EPOCH:SIZE (1:128 11:176 21:224). Until the first epoch listed, --image-size applies."""
    cache_dir: str = ""
    """Folder for local copies of remote shards, kept and shared between runs. By default a temporary folder."""
    cache_gigabytes: float = 64.0
    """Size limit of the folder for local copies, in 10^9 bytes. Without --data.cache-dir, each loader has its own folder."""
    order: Literal["auto", "global", "blocks"] = "auto"
    """global: shuffle all samples. blocks: shuffle shards, and samples within a block of shards. auto: blocks if remote."""
    block_shards: int | None = None
    """Shards per block. By default as many as hold about 16,384 samples."""
    sampler: Literal["uniform", "balanced"] = "uniform"
    """uniform: each training sample comes once per epoch. balanced: each class comes equally often. See docs/loader.md."""
    repeat_augment: int = 1
    """Consecutive repetitions of each training sample, augmented differently (arXiv 1901.09335). Epochs keep their length."""
    on_error: Literal["skip", "stop"] = "skip"
    """How to treat a bad sample. skip: leave it out and count it. stop: end the run."""
    max_bad_fraction: float = 0.001
    """Largest fraction of bad samples in a split before the run ends. One bad sample is always allowed, unless this is 0."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of an image, as its header states it. A larger image is a bad sample. Default: as in Pillow."""
    timeout: float = TIMEOUT_SECONDS
    """Seconds that reading or decoding a batch, or another process's copy of a shard, may stand still before the run ends."""
    quarantine: tuple[str, ...] = ()
    """Run folders or quarantine.jsonl files of earlier runs. The bad samples that they list are left out from the start."""

    def __post_init__(self) -> None:
        for name in ("threads", "prefetch", "block_shards", "repeat_augment"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(name)} {value}: at least 1 is needed")
        for name in ("hw_decoder_load", "max_bad_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{_flag(name)} {value}: a number from 0 to 1 is needed")
        check_max_pixels(self.max_pixels, "--data.max-pixels")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"--data.timeout {self.timeout}: a finite number of seconds above 0 is needed")
        if not 0 < self.cache_gigabytes < float("inf"):
            raise ValueError(f"--data.cache-gigabytes {self.cache_gigabytes}: a finite number above 0 is needed")
        if self.sampler == "balanced" and self.order == "blocks":
            raise ValueError("--data.sampler balanced draws samples from all shards; omit --data.order blocks")
        if self.backend != "dali":
            self._check_other_backend()
        self.image_size_of(0, 0)

    def _check_other_backend(self) -> None:
        is_pillow = self.backend == "pillow"  # a synthetic batch looks the same with any sampler
        for name in (*OF_DALI, *(SAMPLES_OF_DALI if is_pillow else ())):
            if getattr(self, name) != getattr(DataConfig, name):
                raise ValueError(f"{_flag(name)}: --data.backend {self.backend} does not support it, only dali does")
        if is_pillow:
            others = [step.name for step in self.augment if not isinstance(step, HorizontalFlip)]
            if others:
                raise ValueError(f"--data.augment {' '.join(others)}: --data.backend pillow has horizontal-flip only")

    def open_shards(self, split: Literal["train", "valid"]) -> ShardSet:
        """Opens the shards of a split.

        Raises:
            ValueError: There are none, or they cannot be used.
        """
        pattern = self.train if split == "train" else self.valid
        return open_shards(pattern, split, self.index_dir, self.label_key, self.class_file, self.image_key)

    def image_size_of(self, epoch: int, image_size: int) -> int:
        """Returns the side of training images in an epoch, in pixels.

        Args:
            epoch: Epoch, from 0.
            image_size: Size before the schedule begins.

        Raises:
            ValueError: The schedule is malformed.
        """
        last = 0
        for entry in self.size_schedule:
            first, _, size = entry.partition(":")
            if not (first.isdecimal() and size.isdecimal() and int(first) > last and int(size) >= 32):
                raise ValueError(
                    f"--data.size-schedule {' '.join(self.size_schedule)}: EPOCH:SIZE is needed instead of {entry!r}, with "
                    "ascending epochs from 1 and sizes from 32"
                )
            last = int(first)
            if epoch + 1 >= last:
                image_size = int(size)
        return image_size


def _flag(field: str) -> str:
    return f"--data.{field.replace('_', '-')}"
