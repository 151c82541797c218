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


def training_loss(
    outputs: Tensor | tuple[Tensor, ...],
    target: Tensor,
    *,
    label_smoothing: float,
    aux_weight: float,
    class_weights: Tensor | None = None,
) -> Losses:
    """Computes the weighted cross-entropy of all heads ("Going Deeper with Convolutions", section 5).

    Args:
        outputs: Output of the model: logits `(N, num_classes)`, or those of several heads, the main one first.
        target: `(N,)` int64 class numbers, or `(N, num_classes)` float32 class probabilities.
        label_smoothing: Share of the target probability that is spread over all classes.
        aux_weight: Weight of each auxiliary head; 0.3 in the paper.
        class_weights: `(num_classes,)` on the device, or `None` for equal weights. The means divide by the number of samples,
            so the losses of ranks and of accumulated batches add up. torch's `weight` divides by the sum of the weights.

    Raises:
        ValueError: The outputs are something else.
    """
    if isinstance(outputs, Tensor):
        if class_weights is None:
            loss = cross_entropy(outputs, target, label_smoothing=label_smoothing)
        else:
            loss = _sample_losses(outputs, target, label_smoothing, class_weights).mean()
        return Losses(loss, loss)
    if not isinstance(outputs, tuple) or not all(isinstance(head, Tensor) for head in outputs):
        raise ValueError(
            f"--model.arch: in training the network gives a {type(outputs).__name__}; logits, or a tuple of the logits of "
            "several heads, are needed"
        )
    # All heads are computed at once. One after the other they would launch three times as many small kernels.
    targets = torch.cat([target] * len(outputs))
    losses = _sample_losses(torch.cat(outputs), targets, label_smoothing, class_weights)
    heads = losses.view(len(outputs), -1).mean(1)
    main, *others = heads.unbind()
    return Losses(main + aux_weight * heads[1:].sum(), main, *others[:2])


def _sample_losses(logits: Tensor, target: Tensor, label_smoothing: float, class_weights: Tensor | None) -> Tensor:
    """Returns the cross-entropy of each sample, `(N,)`, times the weight of its class.

    A mixed sample has the weighted losses of its classes in the proportions of the mix. The weight of a class multiplies the
    whole loss of its samples. In torch's `weight` with `label_smoothing`, the part that is spread over all classes has the
    weights of those classes instead: with two classes, 100 samples to one, smoothing of 0.1 would give the other class more
    target probability than its own to each of the 100.
    """
    if class_weights is None:
        return cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    if target.ndim == 1:
        return class_weights[target] * cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    weighted = class_weights * target
    smoothed = (1 - label_smoothing) * weighted + label_smoothing * weighted.mean(1, keepdim=True)
    return cross_entropy(logits, smoothed, reduction="none")
