"""`LoaderSpec`: the batches that a caller wants from a loader."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from pipelines.shards.deal import Deal
from pipelines.shards.order import Order

if TYPE_CHECKING:
    from pipelines.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class LoaderSpec:
    """What the batches of a loader look like, and which rank receives them. `DataConfig` holds what they are made from.

    Attributes:
        split: "train" shuffles, crops at random, augments, and gives whole batches only. "valid" gives each sample once.
        batch_size: Samples per batch on this rank.
        device: Device of the batches. For a CUDA device without an index, `build_loader` takes torch's current one.
        image_size: Image side, in pixels.
        dtype: Image dtype: float32, or float16 on a GPU.
        num_threads: CPU threads, or worker processes of the Pillow backend. `None` takes `DataConfig.threads`, or 4.
        num_classes: Labels must be below this number. `None` takes the number that the shards state.
        seed: Seed of shuffling and augmentation.
        rank: Index of this rank's share of the samples.
        world_size: Number of shares.
        quarantine: File that receives the samples that cannot be used, or `None`.
    """

    split: Literal["train", "valid"]
    batch_size: int
    device: torch.device
    image_size: int = 224
    dtype: torch.dtype = torch.float32
    num_threads: int | None = None
    num_classes: int | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    quarantine: Path | None = None

    @property
    def is_train(self) -> bool:
        return self.split == "train"

    def threads(self, config: "DataConfig") -> int:
        """Returns the number of CPU threads or worker processes to use."""
        return self.num_threads if self.num_threads is not None else config.threads or 4

    def prefetch(self, config: "DataConfig") -> int:
        """Returns the number of batches that DALI works on at a time. On a CPU, one of them is being finished."""
        return config.prefetch or (3 if self.device.type == "cpu" else 2)  # 2 is DALI's default

    def deal(self, order: Order) -> Deal:
        """Returns this rank's share of an order."""
        return Deal(order, self.is_train, self.batch_size, self.rank, self.world_size)

    def settings(self) -> dict[str, int | str]:
        """Returns what the batches of every backend depend on, as `check_state` compares it."""
        return {
            "seed": self.seed,
            "batch size": self.batch_size,
            "number of ranks": self.world_size,
            "rank": self.rank,
            "image size": self.image_size,
        }


def with_index(device: torch.device) -> torch.device:
    """Returns the device; if it is a CUDA device without an index, torch's current one."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
