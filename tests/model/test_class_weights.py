"""Weights of the classes in the loss: against the formula, written out."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from model.loss import training_loss

NUM_CLASSES, NUM_SAMPLES, SMOOTHING, AUX_WEIGHT = 4, 6, 0.1, 0.3
WEIGHTS = torch.tensor([0.25, 0.5, 1.0, 4.0])
TARGET = torch.tensor([0, 3, 2, 2, 1, 0])


def make_heads() -> tuple[Tensor, ...]:
    return torch.randn(3, NUM_SAMPLES, NUM_CLASSES, generator=torch.Generator().manual_seed(0)).unbind()


def loss(outputs: Tensor | tuple[Tensor, ...], target: Tensor, weights: Tensor | None = WEIGHTS) -> Tensor:
    options = {"label_smoothing": SMOOTHING, "aux_weight": AUX_WEIGHT}
    return training_loss(outputs, target, class_weights=weights, **options).total  # type: ignore[arg-type]


def by_hand(logits: Tensor, shares: Tensor) -> float:
    """Returns the mean over the samples of `shares[c] * weight[c] * (loss of class c with label smoothing)`."""
    total = 0.0
    for surprises, of_classes in zip((-log_softmax(logits, 1)).tolist(), shares.tolist(), strict=True):
        spread = sum(surprises) / NUM_CLASSES
        for surprise, share, weight in zip(surprises, of_classes, WEIGHTS.tolist(), strict=True):
            total += share * weight * ((1 - SMOOTHING) * surprise + SMOOTHING * spread)
    return total / NUM_SAMPLES


@pytest.mark.parametrize("is_mixed", [False, True])
def test_the_loss_follows_the_formula(is_mixed: bool) -> None:
    """The sum of all samples is divided by their number, for class numbers and for the mixed labels of MixUp and CutMix."""
    shares = one_hot(TARGET, NUM_CLASSES).float()
    shares = 0.3 * shares + 0.7 * shares.flip(0) if is_mixed else shares
    heads, target = make_heads(), shares if is_mixed else TARGET
    main, *others = (by_hand(head, shares) for head in heads)
    assert loss(heads[0], target).item() == pytest.approx(main, rel=1e-5)
    assert loss(heads, target).item() == pytest.approx(main + AUX_WEIGHT * sum(others), rel=1e-5)
    one_hot_loss = loss(heads, one_hot(TARGET, NUM_CLASSES).float())
    torch.testing.assert_close(one_hot_loss, loss(heads, TARGET))


@pytest.mark.parametrize("num_heads", [1, 3])
def test_parts_of_a_batch_have_the_loss_of_the_whole(num_heads: int) -> None:
    """So ranks and accumulated batches make the step of one large batch. torch divides by the sum of each part's weights."""
    heads = make_heads()[:num_heads]
    outputs = heads if num_heads > 1 else heads[0]
    parts = [tuple(head[half] for head in heads) for half in (slice(0, 3), slice(3, 6))]
    losses = [loss(part if num_heads > 1 else part[0], target) for part, target in zip(parts, TARGET.split(3), strict=True)]
    torch.testing.assert_close(torch.stack(losses).mean(), loss(outputs, TARGET))
    by_torch = [cross_entropy(head, target, WEIGHTS) for head, target in zip(heads[0].split(3), TARGET.split(3), strict=True)]
    assert (torch.stack(by_torch).mean() - cross_entropy(heads[0], TARGET, WEIGHTS)).abs() > 0.01


def test_without_weights_the_bits_are_those_of_torch() -> None:
    heads = make_heads()
    main, *others = (cross_entropy(head, TARGET, label_smoothing=SMOOTHING, reduction="none").mean() for head in heads)
    assert torch.equal(loss(heads, TARGET, None), main + AUX_WEIGHT * torch.stack(others).sum())
    assert torch.equal(loss(heads[0], TARGET, None), cross_entropy(heads[0], TARGET, label_smoothing=SMOOTHING))


def test_smoothing_does_not_turn_common_samples_into_rare_ones() -> None:
    """With 100 samples of a class to one of another, a step still raises the logit of a sample's own class most."""
    weights, target = torch.tensor([0.505, 50.5]), torch.tensor([0])
    logits = torch.zeros(1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(logits, target, weights), logits)
    (by_torch,) = torch.autograd.grad(cross_entropy(logits, target, weights, label_smoothing=SMOOTHING), logits)
    assert (gradient.argmin(), by_torch.argmin()) == (0, 1)
