"""Finds the weights of this network in files of other programs."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Where programs keep their weights, in the order in which they are taken: averages first, as timm's `load_checkpoint` does.
PLACES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model", "module", "network", "net", "weights"),
)


@dataclass(frozen=True)
class Found:
    """The weights in a file.

    Attributes:
        state: State dict, with the network's names.
        place: The key under which it is, or "".
        prefix: What its names began with.
        others: Other places of such weights, which were not taken.
        left: Tensors at that place without the prefix.
    """

    state: dict[str, Tensor]
    place: str
    prefix: str
    others: tuple[str, ...]
    left: tuple[str, ...]


def find_weights(content: Mapping[Any, Any], wanted: Collection[str]) -> Found | None:
    """Finds a state dict in the content of a file: the content itself, or one level down, at the first of `PLACES` that fits.

    A prefix that the names have in common, such as `module.` of DistributedDataParallel, `_orig_mod.` of torch.compile, or
    `model.`, is removed. It may be nested.

    Args:
        content: The content of the file.
        wanted: The tensor names of the network.

    Returns:
        The weights, or `None` if the file has no tensors by name at these places.
    """
    found: list[tuple[str, str, int, dict[str, Tensor]]] = []
    for place in ("", *PLACES):
        tensors = _tensors(content if not place else content.get(place))
        for prefix, count in _prefixes(tensors, wanted).most_common():
            found.append((place, prefix, count, tensors))
    if not found:
        return None
    most = max(count for _, _, count, _ in found)
    fitting = [entry for entry in found if 2 * entry[2] >= most]  # the same weights twice, not another network's few names
    [(place, prefix, _, tensors), *others] = fitting
    return Found(
        state={name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)},
        place=place,
        prefix=prefix,
        others=tuple(filter(None, (f"{other} {begin}*".strip() if begin else other for other, begin, _, _ in others))),
        left=tuple(name for name in tensors if not name.startswith(prefix)),
    )


def _tensors(value: Any) -> dict[str, Tensor]:
    """Returns the tensors by name of a dict; none if it is something else.

    The published weights of DenseNet have the names of its first version, `norm.1` instead of `norm1`.
    """
    if not isinstance(value, Mapping):
        return {}
    tensors = {name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    return {re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name): tensor for name, tensor in tensors.items()}


def _prefixes(names: Collection[str], wanted: Collection[str]) -> Counter[str]:
    """Counts, for each prefix, the names that are a name of the network after it. Without any, all names count as prefix ""."""
    counts = Counter[str]()
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in wanted:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    return counts if counts or not names else Counter({"": 0})
