"""Tells from a network's weights which input they were trained on."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Colors of ImageNet's pixels, in [0, 1]: principal components and their variances, as published with AlexNet's color
# augmentation and in fb.resnet.torch. Their sum, 0.241, is a standard deviation of 0.28 per channel.
_COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_VARIANCES = (0.2175, 0.0188, 0.0045)
_STD = (0.229, 0.224, 0.225)
# Correlation of pixels falls as exp(-distance / 10 pixels). ImageNet at 224 pixels: 0.97, 0.90, and 0.83 after 1, 3, and 6.
_LENGTH = 10.0
# Photos normalized with ImageNet's mean and deviation give 0.65 to 0.85 times the predicted variance, drawings 0.55 to 0.75.
# Renormalizing to deviation 0.5 multiplies that by 0.21: 0.13 to 0.17, and 0.12 to 0.16.
_RENORMALIZED, _NORMALIZED = 0.26, 0.36


def needs_transform_input(state: Mapping[str, Tensor]) -> bool | None:
    """Tells whether weights expect input with mean 0.5 and deviation 0.5 instead of ImageNet's mean and deviation.

    The first normalization layer has recorded the variance of the first convolution's outputs. It is compared with the
    variance that these filters give on photos normalized with ImageNet's constants, which is about five times as high as
    after renormalization.

    Args:
        state: State dict of a GoogLeNet.

    Returns:
        Whether `transform_input` is needed. `None` if the weights do not tell, because they are untrained or incomplete, or
        because the images were of unusual contrast.
    """
    names = ("conv1.conv.weight", "conv1.bn.running_var", "conv1.bn.running_mean")
    if any(name not in state for name in names):
        return None
    filters, variance, mean = (state[name].double() for name in names)
    if filters.shape[1:] != (3, 7, 7) or variance.shape != filters.shape[:1] or (variance.eq(1).all() and not mean.any()):
        return None
    ratio = float(variance.sum() / _predicted(filters).sum())
    return True if 0 < ratio < _RENORMALIZED else False if ratio > _NORMALIZED else None


def _predicted(filters: Tensor) -> Tensor:
    """Returns the variance `(N,)` of the outputs of filters `(N, 3, H, W)` on normalized photos."""
    components, std = torch.tensor(_COMPONENTS).double(), torch.tensor(_STD).double()
    colors = components @ torch.diag(torch.tensor(_VARIANCES).double()) @ components.T / torch.outer(std, std)
    places = torch.cartesian_prod(*(torch.arange(length).double() for length in filters.shape[2:]))
    pixels = torch.exp(-torch.cdist(places, places) / _LENGTH)
    flat = filters.flatten(2)
    return torch.einsum("ncp,cd,pq,ndq->n", flat, colors, pixels, flat)
