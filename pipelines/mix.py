"""MixUp and CutMix: mixes a training batch, images and labels, with itself in reverse order."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import, and --help does not need it
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class MixConfig:
    """Mixing of training batches. If both alphas are above 0, one of the two is drawn for each batch."""

    mixup_alpha: float = 0.0
    """MixUp: draws the weight of an image against its partner, once per batch, from Beta(alpha, alpha). 0.2 is common; 0
    turns it off."""
    cutmix_alpha: float = 0.0
    """CutMix: draws the fraction of its area that an image keeps, once per batch, from Beta(alpha, alpha). 1 is common; 0
    turns it off."""

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if not 0 <= value <= 100:
                raise ValueError(f"--mix.{name.replace('_', '-')} {value}: from 0 to 100 is possible")


def mix(
    config: MixConfig, image: "Tensor", target: "Tensor", *, num_classes: int, step: int, seed: int
) -> tuple["Tensor", "Tensor"]:
    """Mixes a batch, or returns it unchanged if both alphas are 0.

    The draws depend only on `seed` and `step`, so a resumed run repeats them. They happen on the CPU, without waiting for the
    device.

    Args:
        config: Alphas of MixUp and CutMix.
        image: `(N, 3, H, W)`, of any floating dtype and memory format; not modified.
        target: `(N,)` int64 class numbers.
        num_classes: Number of classes.
        step: Index of the batch in the run.
        seed: Seed of the run.

    Returns:
        The images, in the same dtype and memory format, and the class probabilities, `(N, num_classes)` float32.
    """
    import numpy as np
    from torch.nn.functional import one_hot

    if not (config.mixup_alpha or config.cutmix_alpha):
        return image, target
    rng = np.random.default_rng([seed, step])
    use_cutmix = rng.random() < 0.5 if config.mixup_alpha and config.cutmix_alpha else bool(config.cutmix_alpha)
    # Reversed, because that needs no index and keeps channels_last, unlike rolling or permuting.
    partner = image.flip(0)
    if use_cutmix:
        image, share = _cutmix(rng, config.cutmix_alpha, image, partner)
    else:
        share = float(rng.beta(config.mixup_alpha, config.mixup_alpha))
        image = partner.lerp(image, share)  # "mixup", arXiv 1710.09412, section 2
    labels = one_hot(target, num_classes).float()
    return image, share * labels + (1 - share) * labels.flip(0)


def _cutmix(rng: "np.random.Generator", alpha: float, image: "Tensor", partner: "Tensor") -> tuple["Tensor", float]:
    """Pastes a rectangle from the partner, and returns the share that the image kept: arXiv 1905.04899, equations 1 and 2.

    The rectangle may extend beyond the image, so the share is computed from the pixels that were replaced.
    """
    height, width = image.shape[2:]
    part = (1 - rng.beta(alpha, alpha)) ** 0.5  # of the sides
    spans = []
    for length in (height, width):
        center, half = int(rng.integers(length)), int(length * part) // 2
        spans.append((max(0, center - half), min(length, center + half)))
    (top, bottom), (left, right) = spans
    mixed = image.clone()
    mixed[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
