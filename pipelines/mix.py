"""MixUp and CutMix: a training batch mixed with itself in reverse order, images and labels alike."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: torch takes seconds, and a tool's --help needs none of it
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class MixConfig:
    """How training batches are mixed; with both alphas above 0, each batch by one of the two at random."""

    mixup_alpha: float = 0.0
    """MixUp: the share of an image is drawn from Beta(alpha, alpha); 0.2 is usual, 0 is none."""
    cutmix_alpha: float = 0.0
    """CutMix: the same for the area that an image keeps; 1 is usual, 0 is none."""

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if not 0 <= value <= 100:
                raise ValueError(f"--mix.{name.replace('_', '-')} {value}: from 0 to 100 is possible")


def mix(
    config: MixConfig, image: "Tensor", target: "Tensor", *, num_classes: int, step: int, seed: int
) -> tuple["Tensor", "Tensor"]:
    """The batch mixed; where the configuration asks for nothing, as it came.

    What is drawn depends on `seed` and `step` alone, so a run that goes on where another stopped draws what that would have. It
    is drawn on the CPU, and the device is not waited for.

    Args:
        config: Which of the two, and how strongly.
        image: `(N, 3, H, W)`, of any floating dtype and memory format; not changed.
        target: `(N,)` int64 class numbers.
        num_classes: Above all of them.
        step: Number of the batch in the run.
        seed: Of the run.

    Returns:
        The images, in the same dtype and memory format, and the probabilities of the classes, `(N, num_classes)` float32.
    """
    import numpy as np
    from torch.nn.functional import one_hot

    if not (config.mixup_alpha or config.cutmix_alpha):
        return image, target
    rng = np.random.default_rng([seed, step])
    use_cutmix = rng.random() < 0.5 if config.mixup_alpha and config.cutmix_alpha else bool(config.cutmix_alpha)
    # Reversed, because that, unlike rolled or permuted, needs no index and keeps channels_last.
    partner = image.flip(0)
    if use_cutmix:
        image, share = _cutmix(rng, config.cutmix_alpha, image, partner)
    else:
        share = float(rng.beta(config.mixup_alpha, config.mixup_alpha))
        image = partner.lerp(image, share)  # "mixup", arXiv 1710.09412, section 2
    labels = one_hot(target, num_classes).float()
    return image, share * labels + (1 - share) * labels.flip(0)


def _cutmix(rng: "np.random.Generator", alpha: float, image: "Tensor", partner: "Tensor") -> tuple["Tensor", float]:
    """A rectangle from the partner, and the share that the image has kept: "CutMix", arXiv 1905.04899, equations 1 and 2.

    The rectangle's centre lies anywhere, so it may reach over the edge: the share is that of the pixels in the end.
    """
    height, width = image.shape[2:]
    part = (1 - rng.beta(alpha, alpha)) ** 0.5  # of the sides
    spans = []
    for length in (height, width):
        centre, half = rng.integers(length), int(length * part) // 2
        spans.append((max(0, int(centre) - half), min(length, int(centre) + half)))
    (top, bottom), (left, right) = spans
    mixed = image.clone()
    mixed[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
