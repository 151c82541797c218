"""EMA, loss, optimizer, learning rate, and checkpoint files."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import OptimConfig
from model.distributed import choose_device
from model.ema import EMA
from model.googlenet import GoogLeNet, GoogLeNetOutputs
from model.loss import training_loss
from model.optim import build_optimizer, build_scheduler


def test_ema_follows_the_formula_and_averages_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, decay=0.9)
    expected = {}
    for step in range(30):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 2))
        model(torch.randn(8, 2) + step)
        ema.update_parameters(model)
        decay = 0.0 if step == 0 else min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            old = expected.get(name, value)
            expected[name] = decay * old + (1 - decay) * value if value.is_floating_point() else value.clone()
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert (ema.module[1].running_mean - model[1].running_mean).abs().max() > 0.1


def test_ema_keeps_most_of_the_old_weights() -> None:
    """The original notebook had the two weights of the sum swapped."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.99)
    for _ in range(2000):
        ema.update_parameters(model)
    nn.init.ones_(model.weight)
    ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(0.01)


def test_loss_is_smoothed_cross_entropy_of_three_heads() -> None:
    heads = GoogLeNetOutputs(*torch.randn(3, 4, 5).unbind())
    target = torch.tensor([0, 4, 2, 2])

    def smoothed(logits: torch.Tensor) -> torch.Tensor:
        probabilities = torch.full((4, 5), 0.1 / 5)
        probabilities[torch.arange(4), target] += 0.9
        return -(probabilities * log_softmax(logits, 1)).sum(1).mean()

    expected = smoothed(heads.logits) + 0.3 * (smoothed(heads.aux_logits1) + smoothed(heads.aux_logits2))
    torch.testing.assert_close(training_loss(heads, target, label_smoothing=0.1, aux_weight=0.3).total, expected)
    alone = training_loss(heads.logits, target, label_smoothing=0.1, aux_weight=0.3).total
    torch.testing.assert_close(alone, smoothed(heads.logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_takes_probabilities_as_targets(dtype: torch.dtype) -> None:
    """With mixed labels, the loss is linear in the labels, also for logits in half precision."""
    heads = GoogLeNetOutputs(*torch.randn(3, 4, 5).to(dtype).unbind())
    target = torch.tensor([0, 4, 2, 2])
    one_hot = torch.eye(5)[target]
    options = {"label_smoothing": 0.1, "aux_weight": 0.3}
    hard, reversed_ = (training_loss(heads, classes, **options).total for classes in (target, target.flip(0)))
    torch.testing.assert_close(training_loss(heads, one_hot, **options).total.to(dtype), hard)
    mixed = training_loss(heads, 0.3 * one_hot + 0.7 * one_hot.flip(0), **options).total
    torch.testing.assert_close(mixed.to(dtype), 0.3 * hard + 0.7 * reversed_)


def test_weight_decay_spares_normalization_and_biases() -> None:
    model = GoogLeNet(num_classes=3)
    decayed, spared = build_optimizer(model, OptimConfig(), 64).param_groups
    assert decayed["weight_decay"] == 5e-5
    assert spared["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2][:2] for p in decayed["params"]} == {"co", "fc"}
    assert all("bn." in names[id(p)] or names[id(p)].endswith("bias") for p in spared["params"])


def test_a_first_step_skipped_by_gradient_scaling_leaves_no_garbage() -> None:
    """The scaler makes a fused optimizer skip a step with `found_inf`. Its momentum must be 0 afterwards."""
    model = nn.Linear(64, 64)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.0), 64)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    optimizer.step()
    assert torch.equal(model.weight, before)
    optimizer.found_inf = torch.tensor(0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * 1.9)  # Nesterov: gradient + 0.9 momentum


def learning_rates(config: OptimConfig, epochs: int, steps_per_epoch: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = build_scheduler(optimizer, config, epochs=epochs, steps_per_epoch=steps_per_epoch)
    rates = []
    for _ in range(epochs * steps_per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_learning_rate_warms_up_and_follows_one_cosine() -> None:
    rates = learning_rates(OptimConfig(lr=0.4, warmup_epochs=1), epochs=5, steps_per_epoch=10)
    for step in range(10):
        assert rates[step] == pytest.approx(0.4 * (1 + 10 * step / 10) / 11)
    for step in range(40):
        assert rates[10 + step] == pytest.approx(0.4 * (1 + math.cos(math.pi * step / 40)) / 2)


def test_learning_rate_restarts_warmly() -> None:
    config = OptimConfig(lr=0.4, warmup_epochs=0, cycle_epochs=2, min_lr=0.1)
    rates = learning_rates(config, epochs=6, steps_per_epoch=10)
    tops = [step for step, rate in enumerate(rates) if rate == pytest.approx(0.4)]
    assert tops == [0, 20, 40]
    assert rates[30] == pytest.approx(0.25)
    assert min(rates) > 0.1


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"lr": math.nan}, "--optim.lr nan"),
        ({"lr": math.inf}, "--optim.lr inf"),
        ({"weight_decay": -1.0}, "--optim.weight-decay -1.0"),
        ({"warmup_epochs": -1.0}, "--optim.warmup-epochs -1.0"),
    ],
)
def test_wrong_settings_name_their_flag(options: dict[str, float], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        OptimConfig(**options)  # type: ignore[arg-type]


def test_the_rate_of_a_short_run_is_not_below_the_lowest_one() -> None:
    """--optim.lr was not given, so it must not be named as wrong."""
    assert OptimConfig(min_lr=0.01).choose(epochs=1, steps_per_epoch=5).lr == 0.01


def test_the_warmup_takes_half_of_the_run_at_most() -> None:
    rates = learning_rates(OptimConfig(lr=0.4, warmup_epochs=3), epochs=1, steps_per_epoch=10)
    assert rates.index(max(rates)) == 5
    assert max(rates) == pytest.approx(0.4)


def test_checkpoint_survives_a_failed_replacement(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weight": torch.arange(3), "step": 7, "classes": ("a", "b")})
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_checkpoint(path, {"unpicklable": lambda: None})
    state = load_checkpoint(path)
    assert state["weight"].tolist() == [0, 1, 2]
    assert state["step"] == 7
    assert state["classes"] == ("a", "b")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^--device cuda: torch finds no GPU that it can use; use --device cpu, or see docs/"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"^process 2 of this machine finds 2 GPUs; start no more processes \(--nproc-per-n"):
        choose_device("auto", local_rank=2)
