"""Scores on the validation split: of the raw and of the averaged weights, in one pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model.distributed import World
from pipelines.loader import Loader

MOST_CONFUSED_CLASSES = 50  # more do not fit into a picture
MOST_MISTAKES = 16
# Columns of `Evaluation.counts`.
COUNTS = ("samples", "top1", "top5", "ema_top1", "ema_top5")


@dataclass(frozen=True)
class Mistakes:
    """Samples with the highest loss among those that the averaged weights get wrong, the worst first.

    Attributes:
        images: `(K, 3, H, W)` as the network saw them.
        targets: `(K,)` int64, the truth.
        predictions: `(K,)` int64, what the network said.
        probabilities: `(K,)` float32, how sure it was.
        losses: `(K,)` float32.
    """

    images: Tensor
    targets: Tensor
    predictions: Tensor
    probabilities: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What a pass over the validation split came to, over all ranks; on the CPU.

    Attributes:
        counts: `(num_classes, len(COUNTS))` float64: of each class, its samples, and how many of them were recognized.
        loss: Mean cross-entropy of the raw weights, without label smoothing.
        confusion: `(num_classes, num_classes)` int64 of the averaged weights, a row a true class; None for more than
            `MOST_CONFUSED_CLASSES`.
        mistakes: The worst of all ranks, on rank 0; None on the others, and where there are none.
    """

    counts: Tensor
    loss: float
    confusion: Tensor | None
    mistakes: Mistakes | None

    def scores(self) -> dict[str, float]:
        """`top1`, `top5`, `ema_top1`, `ema_top5` in percent, and `loss`."""
        samples, *hits = self.counts.sum(0).tolist()
        return {**{name: 100 * value / samples for name, value in zip(COUNTS[1:], hits, strict=True)}, "loss": self.loss}

    def of_classes(self, classes: Sequence[str] | None) -> list[dict[str, Any]]:
        """The scores in percent of each class that has samples, with its name and their number."""
        rows = []
        for number, (samples, *hits) in enumerate(self.counts.tolist()):
            if samples:
                scores = {count: 100 * value / samples for count, value in zip(COUNTS[1:], hits, strict=True)}
                name = classes[number] if classes and number < len(classes) else str(number)
                rows.append({"class": name, "samples": int(samples), **scores})
        return rows


@torch.no_grad()
def evaluate(
    model: nn.Module,
    ema: nn.Module,
    loader: Loader,
    *,
    num_classes: int,
    world: World,
    autocast: Callable[[], torch.autocast],
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """One pass of the validation split, each rank over its share; the host waits for the device at the end only.

    Args:
        model: Gives logits `(N, num_classes)`; is set to evaluation.
        ema: The averaged weights, likewise.
        loader: Of the validation split.
        num_classes: Length of the logits.
        world: The ranks that share the split; statistics of batch normalization are taken from rank 0.
        autocast: Makes the context for the forward pass.
        is_interrupted: Asked at each batch whether to stop.

    Returns:
        None if it was interrupted.

    Raises:
        ValueError: There is not one usable sample.
    """
    model.eval(), ema.eval()
    world.take_from_main([*model.buffers(), *ema.buffers()])
    counts = torch.zeros(num_classes, len(COUNTS), device=world.device, dtype=torch.float64)
    shape = (num_classes, num_classes) if num_classes <= MOST_CONFUSED_CLASSES else (0, 0)
    confusion = torch.zeros(shape, device=world.device, dtype=torch.float64)
    loss_sum = torch.zeros((), device=world.device, dtype=torch.float64)
    worst: Mistakes | None = None
    for batch in loader:
        if is_interrupted():
            return None
        image, target = batch["image"], batch["target"]
        with autocast():
            logits, ema_logits = model(image).float(), ema(image).float()
        found = [torch.ones_like(target), *hits(logits, target), *hits(ema_logits, target)]
        counts.index_add_(0, target, torch.stack([column.double() for column in found], dim=1))
        loss_sum += cross_entropy(logits, target, reduction="sum")
        if confusion.numel():
            cells = target * num_classes + ema_logits.argmax(1)
            confusion.view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))
        worst = _worst(worst, image, target, ema_logits)
    world.sum(counts), world.sum(confusion), world.sum(loss_sum)
    if not (samples := counts[:, 0].sum().item()):
        raise ValueError("not one validation sample can be used; `shards verify` says why")
    return Evaluation(
        counts.cpu(),
        loss_sum.item() / samples,
        confusion.long().cpu() if confusion.numel() else None,
        _of_all_ranks(worst, world),
    )


def hits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `(N, num_classes)` logits have the target first, and which among the first five: two times `(N,)` bool."""
    found = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    return found[:, 0], found.any(1)


def _worst(before: Mistakes | None, image: Tensor, target: Tensor, logits: Tensor) -> Mistakes:
    """The worst of those before and of this batch; what is right has a loss of minus infinity and comes last."""
    probabilities, predictions = logits.softmax(1).max(1)
    losses = cross_entropy(logits, target, reduction="none").nan_to_num(nan=-torch.inf)  # else they would be the greatest
    losses = losses.masked_fill(predictions == target, -torch.inf)
    now = Mistakes(image, target, predictions, probabilities, losses)
    now = _select(now, losses.topk(min(MOST_MISTAKES, len(losses))).indices)
    if before is None:
        return now
    both = Mistakes(*(torch.cat(tensors) for tensors in zip(_tensors(before), _tensors(now), strict=True)))
    return _select(both, both.losses.topk(min(MOST_MISTAKES, len(both.losses))).indices)


def _of_all_ranks(worst: Mistakes | None, world: World) -> Mistakes | None:
    """The worst of all ranks, for rank 0: first each says how bad its own are, so that only those asked for go around."""
    own = worst.losses[worst.losses > -torch.inf].tolist() if worst else []
    losses = sorted((loss for of_rank in world.gather(own) for loss in of_rank), reverse=True)[:MOST_MISTAKES]
    wanted = _select(worst, (worst.losses > -torch.inf) & (worst.losses >= losses[-1])) if worst and losses else None
    found = [Mistakes(*rank) for rank in world.gather(tuple(tensor.cpu() for tensor in _tensors(wanted))) if rank]
    if not found or not world.is_main:
        return None
    together = Mistakes(*(torch.cat(tensors) for tensors in zip(*map(_tensors, found), strict=True)))
    return _select(together, together.losses.topk(min(MOST_MISTAKES, len(together.losses))).indices)


def _tensors(mistakes: Mistakes | None) -> tuple[Tensor, ...]:
    return tuple(getattr(mistakes, field.name) for field in fields(Mistakes)) if mistakes else ()


def _select(mistakes: Mistakes, which: Tensor) -> Mistakes:
    return Mistakes(*(tensor[which] for tensor in _tensors(mistakes)))
