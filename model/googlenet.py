"""GoogLeNet (Inception v1), "Going Deeper with Convolutions", Szegedy et al., arXiv 1409.4842.

The variant is the one whose weights are published (batch normalization after every convolution, 3x3 instead of 5x5
convolutions): names and shapes of its state dict are those of torchvision's `googlenet`. `docs/notebook.md` lists where it
differs from the notebook it came from, and from the paper.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AveragePool", "BasicConv2d", "GoogLeNet", "GoogLeNetOutputs", "Inception", "InceptionAux", "Init", "googlenet"]

Init = Literal["he", "torch", "truncated-normal"]


class GoogLeNetOutputs(NamedTuple):
    """What the model returns in training mode with auxiliary heads: three `(N, num_classes)` float tensors of logits."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalization that does not count its batches, so `num_batches_tracked` stays as it was loaded.

    Nothing here reads the counter: only an average over all batches (`momentum=None`) would. To increase it in each of 59
    layers would add 59 kernels to a step that has about 700, for which a small batch has the GPU wait.
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
    """Four branches over the same input, concatenated: `(N, in_channels, H, W)` to `(N, C, H, W)`.

    `C = ch1x1 + ch3x3 + ch5x5 + pool_proj`. The branch called 5x5 in the paper is a 3x3 convolution here, as in the
    published weights; its parameters keep the paper's name.
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

    As `nn.AdaptiveAvgPool2d`, whose backward pass on a GPU `torch.use_deterministic_algorithms` refuses. In that mode it is a
    product with two matrices.
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
        """`(size, length)`: each row averages the values from floor(i * length / size) to ceil((i + 1) * length / size)."""
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
    """Images `(N, 3, H, W)`, H and W at least 32, normalized with ImageNet's mean and std, to logits `(N, num_classes)`.

    In training mode with `aux_logits` the result is a `GoogLeNetOutputs`, otherwise the logits alone. In training mode an
    input of 32 pixels needs at least two images, because batch normalization sees feature maps of 1x1.

    Args:
        num_classes: Length of the logits.
        aux_logits: Build the two auxiliary heads, on inception 4a and 4d.
        transform_input: Re-normalize the input from ImageNet's mean and std to the range that torchvision's published
            weights (ported from TensorFlow) expect: mean 0.5, std 0.5.
        dropout: Probability of dropping a feature before the last layer.
        dropout_aux: The same inside the auxiliary heads; 0.7 in the paper.
        init: Of the weights. "he": convolutions normal of std sqrt(2 / fan-out), arXiv 1502.01852, linear layers as in the last
            one. "torch": as torch does it, uniform within 1 / sqrt(fan-in) of 0. "truncated-normal": normal of std `init_std`,
            at most two of them from 0, as in torchvision's `googlenet`, which has 0.01. docs/recipes.md has a comparison.
        init_std: Standard deviation of what `init` draws from a truncated normal: "he"'s linear layers too.

    Raises:
        ValueError: There is no such `init`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
        init: Init = "he",
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        if init not in get_args(Init):
            raise ValueError(f"init {init!r}: there are {', '.join(get_args(Init))}")
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
        # 3x3 in the paper, 2x2 in the published weights' network.
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)

        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128)

        self.aux1 = InceptionAux(512, num_classes, dropout_aux) if aux_logits else None
        self.aux2 = InceptionAux(528, num_classes, dropout_aux) if aux_logits else None

        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)

        if init != "torch":  # which initializes each layer as it is made
            self._initialize_weights(init, init_std)

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
        """From `(value - mean) / std` with ImageNet's statistics to `(value - 0.5) / 0.5`, `value` being in [0, 1]."""
        means, stds = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        # Filled on the device: a tensor made of a list is copied there, for which the host waits at each step.
        scale, shift = (
            torch.cat([x.new_full((1, 1, 1, 1), value) for value in values], dim=1)
            for values in ([std / 0.5 for std in stds], [(mean - 0.5) / 0.5 for mean in means])
        )
        return x * scale + shift

    def _initialize_weights(self, init: Init, std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and init == "he":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


def googlenet(
    num_classes: int = 1000,
    aux_logits: bool = True,
    transform_input: bool = False,
    dropout: float = 0.2,
    dropout_aux: float = 0.7,
    init: Init = "he",
    init_std: float = 0.01,
) -> GoogLeNet:
    """A freshly initialized `GoogLeNet`; see there for the arguments."""
    return GoogLeNet(num_classes, aux_logits, transform_input, dropout, dropout_aux, init, init_std)
