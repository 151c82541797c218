"""The training step against a loop in plain torch, and with gradients that are not finite."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from model.checkpoint import load_checkpoint
from model.config import ModelConfig, OptimConfig
from model.distributed import World, alone
from model.evaluation import evaluate
from model.googlenet import GoogLeNet
from model.job import HEADS, Job, build_job
from tests.helpers.runs import train_command
from tools.run.config import Config
from tools.run.log import describe_steps
from tools.run.resources import choose_autocast_dtype
from train import train_step

NUM_CLASSES, BATCH_SIZE, SIZE = 3, 4, 32
WEIGHTS = (0.25, 0.5, 2.0)  # of the classes
ALONE = alone(torch.device("cpu"))

Batches = list[tuple[Tensor, Tensor]]


def make_job(
    config: Config,
    steps_per_epoch: int = 4,
    autocast_dtype: torch.dtype | None = None,
    class_weights: Sequence[float] | None = None,
) -> Job:
    job = build_job(
        config,
        ALONE,
        num_classes=NUM_CLASSES,
        classes=("ant", "bee", "cat"),
        class_weights=class_weights,
        autocast_dtype=autocast_dtype,
        steps_per_epoch=steps_per_epoch,
    )
    job.model.train()
    return job


def make_config(**options: Any) -> Config:
    return Config(**{"epochs": 2, "batch_size": BATCH_SIZE, "image_size": SIZE, **options})


def make_batches(count: int) -> Batches:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, BATCH_SIZE, 3, SIZE, SIZE, generator=generator)
    targets = torch.randint(NUM_CLASSES, (count, BATCH_SIZE), generator=generator)
    return [(image.to(memory_format=torch.channels_last), target) for image, target in zip(images, targets, strict=True)]


def heads_losses(model: nn.Module, image: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Returns the total, main, aux2, and aux1 losses of the paper, with label smoothing 0.1, times the weights of classes."""
    of_samples = (cross_entropy(logits, target, reduction="none", label_smoothing=0.1) for logits in model(image))
    main, aux2, aux1 = ((weights[target] * losses).mean() for losses in of_samples)
    return main + 0.3 * (aux1 + aux2), main, aux2, aux1


def train_by_hand(
    config: Config, batches: Batches, lrs: Sequence[float], ema_decay: float, weights: Sequence[float] = (1, 1, 1)
) -> tuple[GoogLeNet, dict[str, Tensor], Tensor]:
    """Trains with a textbook loop. Returns the network, its average, and sums of the losses and of the gradient norm."""
    torch.manual_seed(config.seed)
    model = GoogLeNet(NUM_CLASSES, dropout=config.model.dropout).to(memory_format=torch.channels_last).train()
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    spared = [p for p in model.parameters() if not any(p is other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": config.optim.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True, foreach=False)
    average: dict[str, Tensor] = {}
    sums, count = torch.zeros(len(HEADS) + 1), config.accumulate_steps
    for step, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        for image, target in batches[step * count : (step + 1) * count]:
            losses = heads_losses(model, image, target, torch.tensor(weights))
            (losses[0] / count).backward()
            sums[:-1] += torch.stack(losses).detach() / count
        sums[-1] += torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()  # type: ignore[union-attr]
        optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step)) if step else 0.0
        for name, value in model.state_dict().items():
            old = average.get(name, value)
            average[name] = decay * old + (1 - decay) * value if value.is_floating_point() else value.clone()
    return model, average, sums


@pytest.mark.parametrize(("accumulate_steps", "weights"), [(1, None), (2, WEIGHTS)])
def test_steps_are_those_of_a_loop_written_by_hand(accumulate_steps: int, weights: Sequence[float] | None) -> None:
    config = make_config(
        accumulate_steps=accumulate_steps,
        optim=OptimConfig(lr=0.01, reference_batch_size=BATCH_SIZE, weight_decay=0.5, min_lr=0.001),  # large enough to show
        model=ModelConfig(ema_decay=0.25),  # the warm-up of the average ends after three steps
    )
    batches = make_batches(5 * accumulate_steps)
    job = make_job(config, class_weights=weights)  # of 8 steps, 4 of them warm-up
    completed, lrs = [], []
    for image, target in batches:
        lr = job.lr
        completed.append(train_step(job, image, target))
        if completed[-1]:
            lrs.append(lr)
    assert completed == ([True] * 5 if accumulate_steps == 1 else [False, True] * 5)
    assert (job.step, job.micro_step) == (5, 0)
    top, low = 0.01 * accumulate_steps, 0.001 * accumulate_steps
    assert lrs == pytest.approx([top * (1 + step) / 5 for step in range(5)])
    assert job.lr == pytest.approx(low + (top - low) * (1 + math.cos(math.pi / 4)) / 2)

    model, average, sums = train_by_hand(config, batches, lrs, 0.25, weights or (1, 1, 1))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(job.model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(job.ema.module.state_dict()[name], average[name], rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(job.sums[:-1], sums, rtol=1e-4, atol=1e-5)
    assert job.sums[-1] == 5


def everything(job: Job) -> dict[str, Tensor]:
    """Returns copies of everything that a skipped step must not change."""
    state = {f"model.{name}": value for name, value in job.model.state_dict().items()}
    momenta = [job.optimizer.state[parameter]["momentum_buffer"] for parameter in job.parameters]
    state |= {f"momentum.{i}": value for i, value in enumerate(momenta)}
    return {name: value.clone() for name, value in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(("accumulate_steps", "value"), [(1, math.inf), (2, math.nan)])
def test_a_step_that_is_not_finite_changes_nothing(accumulate_steps: int, value: float) -> None:
    job = make_job(make_config(accumulate_steps=accumulate_steps))
    batches = make_batches(accumulate_steps)
    image, target = batches[0]
    bad = image.clone()
    bad[2, 1, 7, 9] = value

    def take_step(first: Tensor) -> None:
        for other, labels in [(first, target), *batches[1:]]:
            train_step(job, other, labels)

    def is_unchanged(before: dict[str, Tensor]) -> bool:
        now = everything(job)
        return all(torch.equal(now[name], before[name]) for name in before)

    before = everything(job)
    take_step(bad)  # the very first step: there is neither an average nor momentum
    assert is_unchanged(before)
    for _ in range(3):
        take_step(image)
    before, sums = everything(job), job.sums.clone()
    average = {name: value.clone() for name, value in job.ema.module.state_dict().items() if value.is_floating_point()}
    take_step(bad)
    take_step(bad)
    assert is_unchanged(before)
    for name, value in job.ema.module.state_dict().items():  # it moves towards finite weights and statistics
        if name in average:
            low, high = (pick(average[name], before[f"model.{name}"]) for pick in (torch.minimum, torch.maximum))
            assert ((low - 1e-6 <= value) & (value <= high + 1e-6)).all()
    assert not torch.equal(job.ema.module.fc.weight, average["fc.weight"])
    assert torch.equal(job.sums, sums)
    assert (job.step, job.skipped.tolist()) == (6, [3, 2])
    take_step(image)
    assert job.skipped.tolist() == [3, 0]
    assert job.sums[-1] == 4
    after = everything(job)
    assert all(tensor.isfinite().all() for tensor in after.values())
    for name in ("model.fc.weight", "model.conv1.bn.running_mean"):
        assert not torch.equal(after[name], before[name])


def refuse_constant(name: str) -> None:
    pytest.fail(f"{name} is not JSON")


def test_a_run_that_diverges_ends_with_one_line(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train_command(
        *("--data.train", shards, "--data.valid", shards, "--epochs", 3, "--batch-size", 8, "--image-size", SIZE),
        *("--optim.lr", "1e30", "--optim.reference-batch-size", 0, "--optim.warmup-epochs", 0, "--max-nonfinite-steps", 9),
        *("--device", "cpu", "--log-every", 20, "--run-dir", run),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    (message,) = done.stderr.splitlines()
    for part in ("error: 13 steps in a row", "up to step 14 at learning rate 3.17329e+29", str(run / "last.pt"), "--init-from"):
        assert part in message
    lines = [json.loads(line, parse_constant=refuse_constant) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["step"], line["loss"] is None) for line in lines] == [
        ("train", 7, False),  # the loss of the first step, which breaks the weights
        ("valid", 7, True),
        ("train", 14, True),
    ]
    assert [line["skipped_steps"] for line in lines if line["split"] == "train"] == [6, 13]
    last = load_checkpoint(run / "last.pt")
    assert last["step"] == 7
    assert all(tensor.isfinite().all() for part in ("model", "ema") for tensor in last[part].values())


def test_gradients_are_clipped_and_their_own_norm_is_told() -> None:
    clip, lr = 0.01, 0.5
    optim = OptimConfig(lr=lr, reference_batch_size=0, momentum=0.0, weight_decay=0.0, warmup_epochs=0)
    config = make_config(grad_clip=clip, optim=optim)
    ((image, target),) = make_batches(1)
    job = make_job(config)
    before = [parameter.detach().clone() for parameter in job.parameters]
    train_step(job, image, target)
    update = torch.cat([(now - then).flatten() for now, then in zip(job.parameters, before, strict=True)])
    assert update.norm().item() == pytest.approx(lr * clip, rel=1e-2)  # the difference is computed in float32
    _, _, sums = train_by_hand(config, [(image, target)], [lr], 0.999)
    assert sums[-1] > 100 * clip
    assert job.sums[-2].item() == pytest.approx(sums[-1].item(), rel=1e-4)


class Operations(TorchDispatchMode):
    """Records the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.names.add(function._schema.name)
        return function(*arguments, **(options or {}))


# They read a value or a shape from a tensor, or make a tensor from a list. The host would wait for a GPU.
WAITING = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::lift_fresh"}


def test_a_step_takes_nothing_out_of_a_tensor() -> None:
    with Operations() as seen:
        assert torch.tensor([1.0]).item() == 1
    assert seen.names & WAITING == {"aten::_local_scalar_dense", "aten::lift_fresh"}  # such operations are recorded
    config = make_config(accumulate_steps=2, grad_clip=1.0, model=ModelConfig(transform_input=True))
    job = make_job(config, class_weights=WEIGHTS)
    (image, target), *_ = make_batches(1)
    with Operations() as seen:
        for labels in (target, target, *[torch.eye(NUM_CLASSES)[target]] * 2):  # class numbers, and the probabilities of a mix
            train_step(job, image, labels)
    assert job.step == 2
    assert "aten::_fused_sgd_" in seen.names
    assert not seen.names & WAITING


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles without code generation, which takes minutes on a CPU."""
    compile_model = torch.compile

    def compile_quickly(model: nn.Module, *, mode: str, **options: Any) -> Callable[..., Any]:
        assert mode == "default"
        return compile_model(model, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    torch._dynamo.reset()
    counters.clear()


def test_compiled_steps_with_bad_samples_left_out_are_the_same(quick_compiler: None) -> None:
    """Such batches are smaller. The network is compiled once, for whole batches, however many sizes there are."""
    plain, compiled = (make_job(make_config(compile=mode, batch_size=12), 30) for mode in ("no", "default"))
    generator = torch.Generator().manual_seed(5)
    for size in (12, 11, 12, 10, 9, 8, 7, 6, 5, 12, 4, 3, 2, 12):
        image = torch.randn(size, 3, SIZE, SIZE, generator=generator).to(memory_format=torch.channels_last)
        target = torch.randint(NUM_CLASSES, (size,), generator=generator)
        for job in (plain, compiled):
            torch.manual_seed(size)  # the same dropout
            train_step(job, image, target)
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(compiled.sums, plain.sums, rtol=1e-3, atol=1e-3)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-2, atol=1e-3, msg=name)


def test_a_compiled_step_is_the_same(quick_compiler: None) -> None:
    plain, compiled = (make_job(make_config(compile=mode), class_weights=WEIGHTS) for mode in ("no", "default"))
    (image, target), *_ = batches = make_batches(2)
    loader: Any = [{"image": image, "target": target} for image, target in batches]
    for job in (plain, compiled):
        torch.manual_seed(1)
        train_step(job, image, target)
        evaluation = evaluate(
            job.model, job.ema, loader, num_classes=NUM_CLASSES, world=ALONE, autocast=job.autocast
        )  # as between two epochs: the compiled step must survive the change of mode
        assert evaluation is not None
        job.scores = evaluation.scores()
        job.model.train()
        train_step(job, image, target)
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(compiled.sums, plain.sums, rtol=1e-4, atol=1e-4)
    assert compiled.scores["loss"] == pytest.approx(plain.scores["loss"], rel=1e-4)
    assert [*compiled.state_dict()["model"]] == [*GoogLeNet(NUM_CLASSES).state_dict()]
    GoogLeNet(NUM_CLASSES).load_state_dict(compiled.state_dict()["model"])


def test_gradient_scaling_skips_by_the_same_rule() -> None:
    """As with float16 on a GPU, too large a scale is halved until the gradients are finite, and nothing else changes."""
    plain, scaled = make_job(make_config()), make_job(make_config())
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, enabled=True)
    ((image, target),) = make_batches(1)
    before = everything(scaled)
    num_skipped = 0
    while not scaled.sums[-1]:
        torch.manual_seed(1)
        train_step(scaled, image, target)
        num_skipped = int(scaled.skipped[0])
        assert scaled.scaler.get_scale() == 2.0 ** (127 - num_skipped)
        assert num_skipped < 60
        if not scaled.sums[-1]:
            assert all(torch.equal(value, before[name]) for name, value in everything(scaled).items())
    assert num_skipped > 0
    for _ in range(num_skipped):
        train_step(plain, image * torch.inf, target)  # skipped as well, so the schedule and the average make the same progress
    torch.manual_seed(1)
    train_step(plain, image, target)
    after = everything(scaled)
    for name, value in everything(plain).items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6)


def test_bfloat16_trains_on_a_cpu() -> None:
    config = make_config(precision="bf16", optim=OptimConfig(lr=0.01, reference_batch_size=0, warmup_epochs=0))
    dtype = choose_autocast_dtype(config.precision, ALONE.device)
    assert dtype == torch.bfloat16
    job = make_job(config, steps_per_epoch=100, autocast_dtype=dtype)
    ((image, target),) = make_batches(1)
    image = image + target[:, None, None, None]  # makes the classes learnable
    losses = []
    for _ in range(12):
        job.sums.zero_()
        train_step(job, image, target)
        losses.append(job.sums[1].item())
    assert job.skipped.tolist() == [0, 0]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert {value.dtype for value in job.model.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precisions_that_a_cpu_has_not_are_refused(precision: str) -> None:
    with pytest.raises(ValueError, match=f"^--precision {precision} needs a GPU; on a CPU use bf16 or fp32$"):
        choose_autocast_dtype(precision, ALONE.device)


def test_the_learning_rate_grows_with_the_step() -> None:
    optim = OptimConfig(lr=0.1, min_lr=0.01, reference_batch_size=8, warmup_epochs=0)
    job = make_job(make_config(accumulate_steps=6, optim=optim), steps_per_epoch=2)  # 24 images a step, four steps
    lrs = []
    for _ in range(4):
        lrs.append(job.lr)
        job.optimizer.step()
        job.scheduler.step()
    assert lrs == pytest.approx([0.03 + 0.27 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])
    assert describe_steps(job).endswith("learning rate 0.1 x 24 / 8 = 0.3")
    two = World(rank=0, size=2, local_rank=0, local_size=2, device=ALONE.device)
    assert describe_steps(dataclasses.replace(job, world=two)) == (
        "global batch size 48 (4 images x 6 batches x 2 processes); learning rate 0.1 x 48 / 8 = 0.6"
    )
    fixed = OptimConfig(lr=0.1, min_lr=0.01, reference_batch_size=0)
    assert fixed.scaled(0.1, 4096) == 0.1
    assert describe_steps(make_job(make_config(optim=fixed))).endswith("learning rate 0.1, not scaled")
