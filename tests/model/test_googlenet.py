"""The network against an independent reference, and under torch's compilers."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.googlenet import AveragePool, GoogLeNet, GoogLeNetOutputs

# Name, input channels, and the six widths of each inception block: typed from table 1 of the paper.
INCEPTIONS = [
    ("3a", 192, (64, 96, 128, 16, 32, 32)),
    ("3b", 256, (128, 128, 192, 32, 96, 64)),
    ("4a", 480, (192, 96, 208, 16, 48, 64)),
    ("4b", 512, (160, 112, 224, 24, 64, 64)),
    ("4c", 512, (128, 128, 256, 24, 64, 64)),
    ("4d", 512, (112, 144, 288, 32, 64, 64)),
    ("4e", 528, (256, 160, 320, 32, 128, 128)),
    ("5a", 832, (256, 160, 320, 32, 128, 128)),
    ("5b", 832, (384, 192, 384, 48, 128, 128)),
]


def expected_shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
    """Returns keys and shapes of torchvision's `googlenet` state dict, according to the table."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int) -> None:
        shapes[f"{name}.conv.weight"] = (outputs, inputs, kernel, kernel)
        for buffer in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{buffer}"] = (outputs,)
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    conv("conv1", 3, 64, 7)
    conv("conv2", 64, 64, 1)
    conv("conv3", 64, 192, 3)
    for name, inputs, (b1, b2_reduce, b2, b3_reduce, b3, b4) in INCEPTIONS:
        conv(f"inception{name}.branch1", inputs, b1, 1)
        conv(f"inception{name}.branch2.0", inputs, b2_reduce, 1)
        conv(f"inception{name}.branch2.1", b2_reduce, b2, 3)
        conv(f"inception{name}.branch3.0", inputs, b3_reduce, 1)
        conv(f"inception{name}.branch3.1", b3_reduce, b3, 3)
        conv(f"inception{name}.branch4.1", inputs, b4, 1)
    for name, inputs in (("aux1", 512), ("aux2", 528)):
        conv(f"{name}.conv", inputs, 128, 1)
        linear(f"{name}.fc1", 2048, 1024)
        linear(f"{name}.fc2", 1024, num_classes)
    linear("fc", 1024, num_classes)
    return shapes


def reference_logits(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the main, aux2, and aux1 logits in evaluation mode with functions alone."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = weights[f"{name}.conv.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var, scale, shift = (weights[f"{name}.bn.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        scale = scale / (var + 0.001).sqrt()
        return (x * scale[:, None, None] + (shift - mean * scale)[:, None, None]).clamp(min=0)

    def inception(name: str, x: Tensor) -> Tensor:
        name = f"inception{name}"
        branches = [
            conv(f"{name}.branch1", x),
            conv(f"{name}.branch2.1", conv(f"{name}.branch2.0", x)),
            conv(f"{name}.branch3.1", conv(f"{name}.branch3.0", x)),
            conv(f"{name}.branch4.1", F.max_pool2d(x, 3, 1, 1)),
        ]
        return torch.cat(branches, 1)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def aux(name: str, x: Tensor) -> Tensor:
        x = conv(f"{name}.conv", F.adaptive_avg_pool2d(x, 4)).flatten(1)
        return linear(f"{name}.fc2", linear(f"{name}.fc1", x).clamp(min=0))

    def halve(x: Tensor, kernel: int = 3) -> Tensor:
        return F.max_pool2d(x, kernel, 2, ceil_mode=True)

    x = halve(conv("conv1", x, stride=2))
    x = halve(conv("conv3", conv("conv2", x)))
    x = halve(inception("3b", inception("3a", x)))
    after_4a = inception("4a", x)
    after_4d = inception("4d", inception("4c", inception("4b", after_4a)))
    x = halve(inception("4e", after_4d), kernel=2)
    x = inception("5b", inception("5a", x))
    return linear("fc", x.mean((2, 3))), aux("aux2", after_4d), aux("aux1", after_4a)


@pytest.fixture(scope="module")
def trained_like() -> GoogLeNet:
    """A model whose batch normalization has seen data, so no statistic has its initial value."""
    torch.manual_seed(0)
    model = GoogLeNet(num_classes=10)
    for _ in range(3):
        model(torch.randn(4, 3, 64, 64) * 1.3 + 0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bn.weight", "bn.bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize(("aux_logits", "count"), [(False, 6_624_904), (True, 13_004_888)])
def test_parameter_count(aux_logits: bool, count: int) -> None:
    assert sum(p.numel() for p in GoogLeNet(aux_logits=aux_logits).parameters()) == count


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = GoogLeNet()
    conv, linear = model.inception3a.branch2[0].conv, model.fc
    assert conv.weight.std().item() == pytest.approx((2 / 96) ** 0.5, rel=0.03)
    assert linear.weight.std().item() == pytest.approx(0.88 * 0.01, rel=0.03)  # truncated at two deviations
    assert not linear.bias.any()


def test_state_dict_is_torchvisions() -> None:
    state = GoogLeNet(num_classes=7).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected_shapes(7)


@pytest.mark.parametrize("size", [32, 33, 64, 100, 224])
def test_logits_are_the_references(trained_like: GoogLeNet, size: int) -> None:
    model = GoogLeNet(num_classes=10).double().eval()
    model.load_state_dict(trained_like.state_dict())
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected, _, _ = reference_logits({k: v.double() for k, v in trained_like.state_dict().items()}, images)
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_auxiliary_logits_are_the_references(trained_like: GoogLeNet) -> None:
    """The model is in training mode, but normalization and dropout stay in evaluation mode."""
    model = GoogLeNet(num_classes=10).double().eval()
    model.load_state_dict(trained_like.state_dict())
    model.training = True
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    outputs = model(images)
    assert isinstance(outputs, GoogLeNetOutputs)
    expected = reference_logits({k: v.double() for k, v in trained_like.state_dict().items()}, images)
    for logits, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(logits, reference, rtol=1e-9, atol=1e-9)


def test_transform_input_undoes_imagenets_normalization(trained_like: GoogLeNet) -> None:
    model = GoogLeNet(num_classes=10, transform_input=True).eval()
    model.load_state_dict(trained_like.state_dict())
    values = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (values - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(model(images), trained_like((values - 0.5) / 0.5), rtol=1e-3, atol=1e-4)


def test_training_mode_without_auxiliary_heads_gives_a_tensor() -> None:
    assert isinstance(GoogLeNet(num_classes=3, aux_logits=False)(torch.randn(2, 3, 32, 32)), Tensor)


@pytest.mark.parametrize("aux_logits", [True, False])
def test_every_parameter_learns(aux_logits: bool) -> None:
    model = GoogLeNet(num_classes=3, aux_logits=aux_logits, dropout=0.0, dropout_aux=0.0)
    outputs = model(torch.randn(4, 3, 64, 64))
    total = sum(logits.square().sum() for logits in outputs) if aux_logits else outputs.square().sum()
    total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("training", "size"), [(True, 64), (False, 32)])
def test_compiles_without_graph_breaks(training: bool, size: int) -> None:
    """Tests the compiler's front end and autograd tracing. The code generator would need a C++ compiler."""
    torch.manual_seed(0)
    model = GoogLeNet(num_classes=3, dropout=0.0, dropout_aux=0.0).train(training)
    images = torch.randn(2, 3, size, size)
    torch._dynamo.reset()  # after another size, it would compile for any size, which takes several times as long
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    expected = model(images)
    torch.testing.assert_close(tuple(compiled), tuple(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("training", "size"), [(True, 32), (True, 100), (False, 32), (False, 100)])
def test_exports_with_any_batch(training: bool, size: int) -> None:
    model = GoogLeNet(num_classes=3, dropout=0.0, dropout_aux=0.0).train(training)
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model, (torch.randn(3, 3, size, size),), dynamic_shapes=shapes).module()
    images = torch.randn(5, 3, size, size)
    torch.testing.assert_close(tuple(program(images)), tuple(model(images)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(14, 14), (4, 4), (2, 3), (10, 7), (1, 9)])
def test_deterministic_average_pooling_is_the_same(shape: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *shape, requires_grad=True)
    pooling = AveragePool(4)
    (expected,) = torch.autograd.grad(pooling(images).square().sum(), images)
    try:
        torch.use_deterministic_algorithms(True)
        torch.testing.assert_close(pooling(images), F.adaptive_avg_pool2d(images, 4))
        (gradient,) = torch.autograd.grad(pooling(images).square().sum(), images)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(gradient, expected)
