"""Scores the raw and the averaged weights on the validation split, in one pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model.distributed import World

MOST_CONFUSED_CLASSES = 50  # more do not fit into an image
MOST_MISTAKES = 16
IMBALANCED = 2  # a judgment: below this ratio of the largest to the smallest class, top-1 and mean recall are close
# The columns of `Evaluation.counts`.
COUNTS = ("samples", "top1", "top5", "ema_top1", "ema_top5")


@dataclass(frozen=True)
class Mistakes:
    """The misclassified samples with the highest loss of the averaged weights, in descending order.

    Attributes:
        images: `(K, 3, H, W)`, the network's input.
        targets: `(K,)` int64 true classes.
        predictions: `(K,)` int64 predicted classes.
        probabilities: `(K,)` float32 probabilities of the predicted classes.
        losses: `(K,)` float32.
    """

    images: Tensor
    targets: Tensor
    predictions: Tensor
    probabilities: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Results of a pass over the validation split on all ranks, as CPU tensors.

    Attributes:
        counts: `(num_classes, len(COUNTS))` float64: the samples of each class, and how many were recognized.
        loss: Mean cross-entropy of the raw weights, without label smoothing.
        confusion: `(num_classes, num_classes)` int64 of the averaged weights, one row per true class. `None` above
            `MOST_CONFUSED_CLASSES` classes.
        mistakes: The worst mistakes of all ranks, on rank 0. `None` on the other ranks, and if there are none.
    """

    counts: Tensor
    loss: float
    confusion: Tensor | None
    mistakes: Mistakes | None

    def scores(self) -> dict[str, float]:
        """Returns `top1`, `top5`, `ema_top1`, `ema_top5`, `mean_recall`, and `ema_mean_recall` in percent, and `loss`."""
        samples, *hits = self.counts.sum(0).tolist()
        scores = {name: 100 * value / samples for name, value in zip(COUNTS[1:], hits, strict=True)}
        for prefix in ("", "ema_"):
            scores[f"{prefix}mean_recall"] = fmean(value for value in self.recall(f"{prefix}top1") if value is not None)
        return {**scores, "loss": self.loss}

    def recall(self, name: str) -> list[float | None]:
        """Returns the recall of each class in percent, `None` for classes without samples.

        Args:
            name: "top1" for the raw weights, "ema_top1" for the averaged ones.
        """
        samples, hits = self.counts[:, 0].tolist(), self.counts[:, COUNTS.index(name)].tolist()
        return [100 * hit / of if of else None for of, hit in zip(samples, hits, strict=True)]

    @property
    def is_imbalanced(self) -> bool:
        """Whether one class has at least `IMBALANCED` times as many samples as another."""
        samples = self.counts[:, 0]
        return bool(samples.max() >= IMBALANCED * samples[samples > 0].min())

    def of_classes(self, classes: Sequence[str] | None) -> list[dict[str, Any]]:
        """Returns the scores in percent of each class that has samples, with its name and number of samples."""
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
    batches: Iterable[Mapping[str, Any]],
    *,
    num_classes: int,
    world: World,
    autocast: Callable[[], torch.autocast],
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Scores one pass over the validation split. The host waits for the device only at the end.

    Args:
        model: Returns logits `(N, num_classes)`. It is set to eval mode.
        ema: The averaged model, used likewise.
        batches: This rank's batches: "image" `(N, 3, H, W)` and "target" `(N,)` int64, on the device.
        num_classes: Length of the logits.
        world: The ranks that share the split. Rank 0 provides the batch normalization statistics.
        autocast: Creates the context of the forward pass.
        is_interrupted: Called before each batch. The pass ends if it returns true.

    Returns:
        The scores, or `None` if the pass was interrupted.

    Raises:
        ValueError: No sample can be used.
    """
    model.eval(), ema.eval()
    world.broadcast([*model.buffers(), *ema.buffers()])
    counts = torch.zeros(num_classes, len(COUNTS), device=world.device, dtype=torch.float64)
    shape = (num_classes, num_classes) if num_classes <= MOST_CONFUSED_CLASSES else (0, 0)
    confusion = torch.zeros(shape, device=world.device, dtype=torch.float64)
    loss_sum = torch.zeros((), device=world.device, dtype=torch.float64)
    worst: Mistakes | None = None
    for batch in batches:
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
        raise ValueError("no validation sample can be used; `shards verify` says why")
    return Evaluation(
        counts.cpu(),
        loss_sum.item() / samples,
        confusion.long().cpu() if confusion.numel() else None,
        _of_all_ranks(worst, world),
    )


def hits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns top-1 and top-5 hits of logits `(N, num_classes)`: two bool tensors `(N,)`."""
    found = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    return found[:, 0], found.any(1)


def _worst(before: Mistakes | None, image: Tensor, target: Tensor, logits: Tensor) -> Mistakes:
    """Returns the worst mistakes so far, with this batch. Correct samples get a loss of minus infinity and come last."""
    probabilities, predictions = logits.softmax(1).max(1)
    losses = cross_entropy(logits, target, reduction="none").nan_to_num(nan=-torch.inf)  # NaN would sort first
    losses = losses.masked_fill(predictions == target, -torch.inf)
    now = Mistakes(image, target, predictions, probabilities, losses)
    now = _select(now, losses.topk(min(MOST_MISTAKES, len(losses))).indices)
    if before is None:
        return now
    both = Mistakes(*(torch.cat(tensors) for tensors in zip(_tensors(before), _tensors(now), strict=True)))
    return _select(both, both.losses.topk(min(MOST_MISTAKES, len(both.losses))).indices)


def _of_all_ranks(worst: Mistakes | None, world: World) -> Mistakes | None:
    """Returns the worst mistakes of all ranks on rank 0. The ranks exchange losses first, and then only the images needed."""
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
