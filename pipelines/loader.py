"""What every loader is: the old prefetcher's interface, iteration, and a position that can be saved."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict

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

    What an epoch gives is a function of the seed, the epoch's number, the rank and the number of ranks: of nothing that
    happened before.
    """

    @property
    def num_bad_samples(self) -> int:
        """Samples that are left out because they cannot be used."""
        return 0

    @abstractmethod
    def next(self) -> Batch | None:
        """The next batch, or None at the end of the epoch and until `reset()`."""

    @abstractmethod
    def reset(self) -> None:
        """Begins the next epoch; nothing happens where one has just begun, or where a position has just been loaded."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch given: numbers, texts and small tensors, a few kilobytes.

        After the last batch of an epoch it is the beginning of the next.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a position; what follows is bit for bit what followed it there.

        The beginning of an epoch can be loaded by any number of ranks. In the middle of one it has to be the same number,
        and the state of the same rank: which samples the others have already had is not known.

        Raises:
            ValueError: The state is of other data, another seed or other settings; names them, old and new.
        """

    @abstractmethod
    def close(self) -> None:
        """Releases threads, files and memory. The loader cannot be used afterwards."""

    def __iter__(self) -> Iterator[Batch]:
        self.reset()
        while (batch := self.next()) is not None:
            yield batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


# What has to be the same only where a state is loaded in the middle of an epoch.
OF_RANKS = ("number of ranks", "rank")


def check_state(state: Mapping[str, Any], settings: Mapping[str, int | str]) -> None:
    """Compares the settings under which a loader's state was saved with those of the loader that is to load it.

    Raises:
        ValueError: They differ in something that the following batches depend on.
    """
    if not {"settings", "epoch", "batch"} <= set(state):
        raise ValueError("not the state of a loader: it lacks one of settings, epoch and batch")
    saved, middle = state["settings"], state["batch"] > 0
    for name, value in settings.items():
        if saved.get(name) == value or (name in OF_RANKS and not middle):
            continue
        hint = (
            "; only the state at the beginning of an epoch can be loaded then, or by as many ranks" if name in OF_RANKS else ""
        )
        place = f"epoch {state['epoch']}, batch {state['batch']}"
        raise ValueError(f"the loader's state ({place}) is of another {name}: {saved.get(name)}, now {value}{hint}")


def rank_extent(num_samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and one past the last sample of a rank's share."""
    return num_samples * rank // world_size, num_samples * (rank + 1) // world_size


def resize_shorter_for(image_size: int) -> int:
    """To what the shorter side is resized before the centre crop of `image_size`: 256 for 224, in proportion for others."""
    return round(image_size * 256 / 224)
