"""The interface of all loaders: the old prefetcher's methods, iteration, and a position that can be saved."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:  # torch takes seconds to import, and --help does not need it
    from torch import Tensor

    from pipelines.shards.deal import Deal

# Mean and standard deviation of ImageNet's RGB channels, in [0, 1]. Published weights were trained with these values.
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

    Either call `next()` until it returns None, then `reset()`; or use `for batch in loader`, which runs one epoch. `len()` is
    the number of batches in this rank's epoch. A batch stays valid as long as it is referenced.

    The batches of an epoch depend only on the seed, the epoch, the rank and the world size. In training, the samples of a
    global batch (the batches of all ranks together) do not depend on the world size.

    Args:
        deal: This rank's share of the samples.
        settings: Settings that the batches depend on. Saved with each position, and compared when one is loaded.
    """

    def __init__(self, deal: "Deal", settings: dict[str, int | str]) -> None:
        self._deal, self._settings = deal, settings
        self._epoch = self._batch = self._offset = 0
        self._is_fresh = True  # no batch has been delivered since the epoch began or a position was loaded

    @property
    def num_bad_samples(self) -> int:
        """Number of samples left out because they cannot be used."""
        return 0

    def __len__(self) -> int:
        return self._deal.num_batches(self._offset)

    @abstractmethod
    def next(self) -> Batch | None:
        """Returns the next batch, or None from the end of the epoch until `reset()`."""

    def reset(self) -> None:
        """Begins the next epoch. Does nothing if an epoch has just begun or a position has just been loaded."""
        if not self._is_fresh:
            self._go_to(self._deal.following_epoch(self._epoch), 0, 0)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last delivered batch: numbers and texts, some hundred bytes.

        After the last batch of an epoch this is the beginning of the next epoch.
        """
        return {"settings": self._settings, **self._deal.state(self._epoch, self._batch, self._offset)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position. The batches that follow equal, bit for bit, those that followed when it was saved.

        A training position can be loaded with another world size and batch size, and any rank's position will do. Each
        remaining sample then comes exactly once. If the global batch size stays the same, the global batches do too. A
        position within a validation epoch needs the same rank, world size and batch size.

        Raises:
            ValueError: The position belongs to other data, another seed or other settings. Names the old and the new value.
        """
        check_state(state, self._settings, is_elastic=self._deal.train)
        self._go_to(*self._deal.position(state["epoch"], state["place"]))

    @abstractmethod
    def close(self) -> None:
        """Releases threads, files and memory. The loader cannot be used afterwards."""

    def _go_to(self, epoch: int, batch: int, offset: int) -> None:
        """Moves to a position; `offset` as for `Deal.num_batches`."""
        self._epoch, self._batch, self._offset, self._is_fresh = epoch, batch, offset, True

    def __iter__(self) -> Iterator[Batch]:
        self.reset()
        while (batch := self.next()) is not None:
            yield batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# Settings that may differ, unless a position lies within a validation epoch.
ELASTIC = ("number of ranks", "rank", "batch size")


def check_state(state: Mapping[str, Any], settings: Mapping[str, int | str], *, is_elastic: bool) -> None:
    """Compares the settings of a saved position with those of the loader that loads it.

    Args:
        state: The saved position.
        settings: Settings of the loader.
        is_elastic: Whether world size and batch size may differ at any position.

    Raises:
        ValueError: A setting that the batches depend on differs.
    """
    if not {"settings", "epoch", "batch", "place"} <= set(state):
        raise ValueError("not the state of a loader: it lacks one of settings, epoch, batch and place")
    saved, is_mid_epoch = state["settings"], state["batch"] > 0
    for name, value in settings.items():
        if saved.get(name) == value or (name in ELASTIC and (is_elastic or not is_mid_epoch)):
            continue
        hint = "; only a state at the beginning of an epoch allows that" if name in ELASTIC else ""
        place = f"epoch {state['epoch'] + 1}, batch {state['batch']}"
        raise ValueError(f"the loader's state ({place}) has another {name}: {saved.get(name)}, now {value}{hint}")


def state_for_others(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states that all ranks saved at one step into a state that any world size can load.

    The positions are equal; each rank knows only the bad samples that it has met.
    """
    merged = dict(states[0])
    if "bad_samples" in merged:
        reasons = {
            tuple(row): reason
            for state in states
            for row, reason in zip(state["bad_samples"]["rows"], state["bad_samples"]["reasons"], strict=True)
        }
        rows = sorted(reasons)
        merged["bad_samples"] = {"rows": [list(row) for row in rows], "reasons": [reasons[row] for row in rows]}
    return merged


def resize_shorter_for(image_size: int) -> int:
    """Returns the length of the shorter side before the center crop, in pixels: 256 for 224, in proportion for others."""
    return round(image_size * 256 / 224)
