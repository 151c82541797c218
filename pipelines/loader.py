"""What every loader is: the old prefetcher's interface, and iteration."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:  # torch takes seconds to import, and a tool's --help needs none of it
    from torch import Tensor

# Mean and standard deviation of ImageNet's RGB channels, values in [0, 1]; what published weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Batch(TypedDict):
    """One batch, on the loader's device.

    image: `(N, 3, H, W)`, normalized, channels_last strides; float32 on a CPU, float16 or float32 on a GPU.
    target: `(N,)` int64 class numbers.
    """

    image: "Tensor"
    target: "Tensor"


class Loader(ABC):
    """Batches of one split, epoch after epoch, for one rank.

    Either `next()` until it gives None, then `reset()`; or `for batch in loader`, one epoch each time. `len()` is the
    number of batches in this rank's epoch. A batch stays valid as long as it is referenced.
    """

    @abstractmethod
    def next(self) -> Batch | None:
        """The next batch, or None at the end of the epoch and until `reset()`."""

    @abstractmethod
    def reset(self) -> None:
        """Begins an epoch; nothing happens where one has just begun."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def close(self) -> None:
        """Releases threads and memory. The loader cannot be used afterwards."""

    def __iter__(self) -> Iterator[Batch]:
        self.reset()
        while (batch := self.next()) is not None:
            yield batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def rank_extent(num_samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and one past the last sample of a rank: DALI's reader parts them at `floor(num_samples * rank / world_size)`."""
    return num_samples * rank // world_size, num_samples * (rank + 1) // world_size


def resize_shorter_for(image_size: int) -> int:
    """To what the shorter side is resized before the centre crop of `image_size`: 256 for 224, in proportion for others."""
    return round(image_size * 256 / 224)
