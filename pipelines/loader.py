"""What every loader is: the old prefetcher's interface, iteration, and a position that can be saved."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
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
    happened before. In training the samples of a global batch, which all ranks have together, do not depend on how many ranks
    share it.
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
        """The position after the last batch given: numbers and texts, some hundred bytes.

        After the last batch of an epoch it is the beginning of the next.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a position; what follows is bit for bit what followed it there.

        A state of training can be loaded by any number of ranks with any batch size, and that of any rank will do: each
        sample that is left comes once. If the global batch size is the same, the global batches are, too. In the middle of an
        epoch of validation the number of ranks and the batch size have to be the same, and the state that of the same rank.

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


# What has to be the same only where a state is loaded in the middle of an epoch of validation.
ELASTIC = ("number of ranks", "rank", "batch size")


def check_state(state: Mapping[str, Any], settings: Mapping[str, int | str], *, is_elastic: bool) -> None:
    """Compares the settings under which a loader's state was saved with those of the loader that is to load it.

    Args:
        state: What was saved.
        settings: Of the loader.
        is_elastic: Whether another number of ranks, with other batch sizes, may go on from any position.

    Raises:
        ValueError: They differ in something that the following batches depend on.
    """
    if not {"settings", "epoch", "batch", "place"} <= set(state):
        raise ValueError("not the state of a loader: it lacks one of settings, epoch, batch and place")
    saved, middle = state["settings"], state["batch"] > 0
    for name, value in settings.items():
        if saved.get(name) == value or (name in ELASTIC and (is_elastic or not middle)):
            continue
        hint = "; only a state at the beginning of an epoch can be loaded then" if name in ELASTIC else ""
        place = f"epoch {state['epoch']}, batch {state['batch']}"
        raise ValueError(f"the loader's state ({place}) is of another {name}: {saved.get(name)}, now {value}{hint}")


def state_for_others(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state that each of another number of ranks loads, from the states that all ranks saved at one step.

    Their positions are the same; each knows the bad samples that it has met.
    """
    joined = dict(states[0])
    if "bad_samples" in joined:
        bad = [state["bad_samples"] for state in states]
        reasons = {
            tuple(row): reason for of_rank in bad for row, reason in zip(of_rank["rows"], of_rank["reasons"], strict=True)
        }
        joined["bad_samples"] = {
            "rows": [list(row) for row in sorted(reasons)],
            "reasons": [reasons[row] for row in sorted(reasons)],
        }
    return joined


def resize_shorter_for(image_size: int) -> int:
    """To what the shorter side is resized before the centre crop of `image_size`: 256 for 224, in proportion for others."""
    return round(image_size * 256 / 224)
