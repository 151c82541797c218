"""GoogLeNet (Inception v1), "Going Deeper with Convolutions", Szegedy et al., arXiv 1409.4842.

This is the variant with published weights: batch normalization after every convolution, and 3x3 instead of 5x5 convolutions.
Its state dict has the names and shapes of torchvision's `googlenet`. docs/notebook.md lists the differences from the original
notebook and from the paper.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AveragePool", "BasicConv2d", "GoogLeNet", "GoogLeNetOutputs", "Inception", "InceptionAux"]

LINEAR_STD = 0.01  # of linear layers' initial weights, which are at most two standard deviations from 0


class GoogLeNetOutputs(NamedTuple):
    """Logits of the three heads in training mode: float tensors `(N, num_classes)`."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalization that does not count its batches, so `num_batches_tracked` stays as it was loaded.

    Only an average over all batches (`momentum=None`) would read the counter. Counting in 59 layers would add 59 kernels to the
    700 of a step, and a small batch makes the GPU wait for launches.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.momentum is not None
        statistics, affine = (self.running_mean, self.running_var), (self.weight, self.bias)
        return F.batch_norm(x, *statistics, *affine, training=True, momentum=self.momentum, eps=self.eps)


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalization, ReLU: `(N, in_channels, H, W)` to `(N, out_channels, H', W')`."""

    def __init__(self, in_channels: int, out_channels: int, **conv_options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **conv_options)
        self.bn = BatchNorm2d(out_channels, eps=0.001)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Inception(nn.Module):
    """Four concatenated branches: `(N, in_channels, H, W)` to `(N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W)`.

    The paper's 5x5 branch is a 3x3 convolution here, as in the published weights. Its parameters keep the paper's name.
    """

    def __init__(
        self, in_channels: int, ch1x1: int, ch3x3red: int, ch3x3: int, ch5x5red: int, ch5x5: int, pool_proj: int
    ) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(in_channels, ch1x1, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(in_channels, ch3x3red, kernel_size=1),
            BasicConv2d(ch3x3red, ch3x3, kernel_size=3, padding=1),
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(in_channels, ch5x5red, kernel_size=1),
            BasicConv2d(ch5x5red, ch5x5, kernel_size=3, padding=1),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1),
            BasicConv2d(in_channels, pool_proj, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class AveragePool(nn.Module):
    """Adaptive average pooling, `(N, C, H, W)` to `(N, C, size, size)`.

    `torch.use_deterministic_algorithms` refuses the backward pass of `nn.AdaptiveAvgPool2d` on a GPU. In that mode, this layer
    multiplies by two matrices instead.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if not torch.are_deterministic_algorithms_enabled():
            return F.adaptive_avg_pool2d(x, self.size)
        rows, columns = (self._averaging(length, x) for length in x.shape[2:])
        return torch.einsum("ph,nchw,qw->ncpq", rows, x, columns)

    def _averaging(self, length: int, like: Tensor) -> Tensor:
        """Returns `(size, length)`: row i averages values floor(i * length / size) to ceil((i + 1) * length / size)."""
        place, i = torch.arange(length, device=like.device), torch.arange(self.size, device=like.device)[:, None]
        start, end = i * length // self.size, ((i + 1) * length + self.size - 1) // self.size
        return ((place >= start) & (place < end)).to(like.dtype) / (end - start)


class InceptionAux(nn.Module):
    """Auxiliary classifier on an inner feature map: `(N, in_channels, H, W)` to logits `(N, num_classes)`."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.7) -> None:
        super().__init__()
        self.avgpool = AveragePool(4)
        self.conv = BasicConv2d(in_channels, 128, kernel_size=1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.conv(self.avgpool(x)), 1)
        return self.fc2(self.dropout(self.relu(self.fc1(x))))


class GoogLeNet(nn.Module):
    """The network: images `(N, 3, H, W)`, normalized with ImageNet's mean and std, to logits `(N, num_classes)`.

    H and W are at least 32. In training mode with `aux_logits`, it returns `GoogLeNetOutputs`, otherwise the logits alone. In
    training mode, images of 32 pixels need batches of two or more, because batch normalization sees 1x1 feature maps.

    Args:
        num_classes: Length of the logits.
        aux_logits: Build the two auxiliary heads, on inception 4a and 4d.
        transform_input: Renormalize the input to mean 0.5 and std 0.5, which torchvision's published weights expect.
        dropout: Dropout probability before the last layer.
        dropout_aux: Dropout probability in the auxiliary heads; 0.7 in the paper.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
    ) -> None:
        super().__init__()
        self.aux_logits = aux_logits
        self.transform_input = transform_input

        self.conv1 = BasicConv2d(3, 64, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, kernel_size=1)
        self.conv3 = BasicConv2d(64, 192, kernel_size=3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)

        # Channels: table 1 of the paper.
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)

        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128)
        # The paper has 3x3; the network of the published weights has 2x2.
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)

        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128)

        self.aux1 = InceptionAux(512, num_classes, dropout_aux) if aux_logits else None
        self.aux2 = InceptionAux(528, num_classes, dropout_aux) if aux_logits else None

        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)

        if not self.fc.weight.is_meta:  # weights without values; torch would import its compiler for them, which takes seconds
            self._initialize_weights()

    def forward(self, x: Tensor) -> GoogLeNetOutputs | Tensor:
        if self.transform_input:
            x = self._renormalize(x)
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        after_4a = self.inception4a(x)
        after_4d = self.inception4d(self.inception4c(self.inception4b(after_4a)))
        x = self.maxpool4(self.inception4e(after_4d))
        x = self.inception5b(self.inception5a(x))
        logits = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        if self.training and self.aux1 is not None and self.aux2 is not None:
            return GoogLeNetOutputs(logits, self.aux2(after_4d), self.aux1(after_4a))
        return logits

    @staticmethod
    def _renormalize(x: Tensor) -> Tensor:
        """Converts `(value - mean) / std` with ImageNet's statistics to `(value - 0.5) / 0.5`, for values in [0, 1]."""
        means, stds = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        # These are filled on the device. A tensor made from a list would be copied there, and the host would wait at each step.
        scale, shift = (
            torch.cat([x.new_full((1, 1, 1, 1), value) for value in values], dim=1)
            for values in ([std / 0.5 for std in stds], [(mean - 0.5) / 0.5 for mean in means])
        )
        return x * scale + shift

    def _initialize_weights(self) -> None:
        """Draws convolutions as He et al. (arXiv 1502.01852) and linear layers as torchvision's `googlenet`."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=LINEAR_STD, a=-2 * LINEAR_STD, b=2 * LINEAR_STD)
                nn.init.zeros_(module.bias)
