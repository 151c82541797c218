"""The training loss of a network that may have auxiliary heads."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


class Losses(NamedTuple):
    """Scalar means over the batch: the training loss, and the cross-entropy of each head."""

    total: Tensor
    main: Tensor
    aux2: Tensor | None = None
    aux1: Tensor | None = None


def training_loss(outputs: Tensor | tuple[Tensor, ...], target: Tensor, *, label_smoothing: float, aux_weight: float) -> Losses:
    """Computes the weighted cross-entropy of all heads ("Going Deeper with Convolutions", section 5).

    Args:
        outputs: Output of the model: logits `(N, num_classes)`, or those of several heads, the main one first.
        target: `(N,)` int64 class numbers, or `(N, num_classes)` float32 class probabilities.
        label_smoothing: Share of the target probability that is spread over all classes.
        aux_weight: Weight of each auxiliary head; 0.3 in the paper.

    Raises:
        ValueError: The outputs are something else.
    """
    if isinstance(outputs, Tensor):
        loss = cross_entropy(outputs, target, label_smoothing=label_smoothing)
        return Losses(loss, loss)
    if not isinstance(outputs, tuple) or not all(isinstance(head, Tensor) for head in outputs):
        raise ValueError(
            f"--model.arch: in training the network gives a {type(outputs).__name__}; logits, or a tuple of the logits of "
            "several heads, are needed"
        )
    # All heads are computed at once. One after the other they would launch three times as many small kernels.
    targets = torch.cat([target] * len(outputs))
    losses = cross_entropy(torch.cat(outputs), targets, reduction="none", label_smoothing=label_smoothing)
    heads = losses.view(len(outputs), -1).mean(1)
    main, *others = heads.unbind()
    return Losses(main + aux_weight * heads[1:].sum(), main, *others[:2])
