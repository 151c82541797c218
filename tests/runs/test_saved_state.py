"""Resuming from a checkpoint with a wrong entry: it is named in one line, whatever it is."""

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import ModelConfig, StepConfig
from model.distributed import alone as alone_on
from model.job import Job, build_job
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import Loader
from pipelines.meter import Meter
from tests.helpers.command import run_main
from tests.helpers.runs import arguments, is_equal
from tools.run.data import preprocessing
from tools.run.resume import restore
from tools.run.saved_state import require_resumable

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def job() -> Job:
    return build_job(
        StepConfig(batch_size=8, image_size=32, epochs=2, model=ModelConfig(aux_logits=False)),
        alone_on(CPU),
        num_classes=3,
        classes=("ant", "bee", "cat"),
        autocast_dtype=None,
        steps_per_epoch=7,
        preprocessing=preprocessing(32),
    )


@pytest.fixture(scope="module")
def loader(shards: Path) -> Iterator[Loader]:
    spec = LoaderSpec(split="train", batch_size=8, image_size=32, device=CPU, num_threads=1)
    with build_loader(DataConfig(train=str(shards)), spec) as loader:
        yield loader


def state_of(job: Job, loader: Loader) -> dict[str, Any]:
    """Returns what a checkpoint of a fresh job contains."""
    own = {**job.rank_state(), "loader": loader.state_dict(), "rates": dataclasses.asdict(Meter(CPU).total)}
    return {**copy.deepcopy(job.state_dict()), "ranks": [own], "metrics_bytes": 0, "config": {}, "path": Path("step.pt")}


def resume(state: dict[str, Any], job: Job, loader: Loader) -> None:
    require_resumable(Path("step.pt"), state)
    restore(state, job, loader, Meter(CPU))


MISSING = object()
WRONG = [
    ("epoch", ("1", None, 1.5, -1)),
    ("steps_per_epoch", (0, MISSING)),
    ("step", (-3,)),
    ("validated", (-1, "0")),
    ("best", ("high", None)),
    ("scores", ([], None, MISSING)),
    ("model", (MISSING, [], {})),
    ("model.fc.weight", (torch.zeros(1).expand(3, 10**12), torch.zeros(3, 1024, dtype=torch.float64), 0.5)),
    ("ema.n_averaged", (MISSING, 3)),
    ("optimizer.state", ({}, None)),
    ("optimizer.state.5", (MISSING, {})),
    ("optimizer.state.0.momentum_buffer", (None, torch.zeros(3), torch.zeros(1).expand(64, 3, 7, 7))),
    ("optimizer.param_groups", ([], {}, [{}])),
    ("optimizer.param_groups.0.params", ([0], 7)),
    ("optimizer.param_groups.1.lr", ("0.1", MISSING)),
    ("scheduler", ({}, None)),
    ("scheduler._schedulers.1.T_i", ("7", MISSING, None)),
    ("architecture", (None, {})),
    ("preprocessing.mean", ((1, 2),)),
    ("config", (MISSING, [])),
    ("metrics_bytes", ("10", MISSING, -1)),
    ("ranks", (MISSING, [], {}, 7, [None])),
    ("ranks.0.rng", ({}, None)),
    ("ranks.0.rng.cpu", (torch.zeros(3, dtype=torch.uint8), torch.full((5056,), 255, dtype=torch.uint8))),
    ("ranks.0.sums", (torch.zeros(2), MISSING)),
    ("ranks.0.rates", ({}, {"images": 1, "seconds": 0.0, "wait_seconds": 0.0, "launch_bound_images": 0, "more": 1})),
    ("ranks.0.loader", (MISSING, [], {})),
    ("ranks.0.loader.epoch", ("1", None, -1)),
    ("ranks.0.loader.bad_samples", (3, {"rows": [[1]], "reasons": ["x"]}, {"rows": [], "reasons": ["x"]})),
]


def changed(state: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Returns a copy of the containers on the way to an entry, with another value."""
    result = dict(state)
    names, parent = _steps(state, key), result
    for name in names[:-1]:
        parent[name] = copy.copy(parent[name])
        parent = parent[name]
    if value is MISSING:
        del parent[names[-1]]
    else:
        parent[names[-1]] = value
    return result


def _steps(state: dict[str, Any], key: str) -> list[Any]:
    """Splits a key at its dots. Names of tensors have dots themselves, and lists and the optimizer have numbers."""
    first, *rest = key.split(".")
    if first in ("model", "ema"):
        return [first, *([".".join(rest)] if rest else [])]
    return [first, *(int(name) if name.isdecimal() else name for name in rest)]


@pytest.mark.parametrize(("key", "values"), WRONG)
def test_a_wrong_entry_is_named(job: Job, loader: Loader, key: str, values: tuple[Any, ...]) -> None:
    state = state_of(job, loader)
    for value in values:
        wrong = changed(state, key, value)
        with pytest.raises(ValueError, match=r"^step\.pt") as refused:
            resume(wrong, job, loader)
        text = str(refused.value)
        assert text.endswith("; start in another --run-dir")
        assert "\n" not in text
        assert len(text) < 400
        assert key.split(".")[-1] in text or key.rpartition(".")[0] in text, (value, text)


@pytest.mark.parametrize(
    ("precision", "dtype", "way_out"),
    [
        ("bf16", "torch.bfloat16", "set --precision bf16"),
        ("fp16", "torch.float16", "continue it on a GPU, or start in another --run-dir with --init-from step.pt"),
        ("tf32", "None", "continue it on a GPU, or start in another --run-dir with --init-from step.pt"),
    ],
)
def test_another_precision_is_named_as_the_flag_has_it(
    precision: str, dtype: str, way_out: str, job: Job, loader: Loader
) -> None:
    """So it is if a run goes on without the GPU that it began on. --precision may change, see `FREE_SETTINGS`."""
    wrong = state_of(job, loader) | {"autocast_dtype": dtype, "config": {"precision": precision}}
    text = f"--resume auto: the run was started in {precision}, and on this device it would be in fp32; {way_out}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        resume(wrong, job, loader)


def test_settings_with_the_same_arithmetic_are_the_same_precision(job: Job, loader: Loader) -> None:
    resume(state_of(job, loader) | {"config": {"precision": "fp32"}}, job, loader)  # on a CPU, auto is fp32


def test_a_right_one_is_restored(job: Job, loader: Loader) -> None:
    state = state_of(job, loader)
    resume(state, job, loader)
    assert is_equal(job.state_dict()["model"], state["model"])
    # Switches that another version of torch does not have.
    for key in ("optimizer.param_groups.0.maximize", "optimizer.param_groups.0.foreach", "scheduler._schedulers.0._is_initial"):
        state = changed(state, key, MISSING)
    resume(state, job, loader)


@pytest.mark.parametrize("spoil", [lambda state: state | {"ranks": 3}, lambda state: state | {"optimizer": {}}])
def test_the_command_says_it(
    job: Job, loader: Loader, shards: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "step-000000000.pt"
    state = state_of(job, loader)
    del state["path"]
    save_checkpoint(path, spoil(state))
    done = run_main(train.main, *arguments(shards, tmp_path))
    assert done.status == 2
    assert done.stderr.startswith(f"error: {path} cannot be resumed: ")
    assert done.stderr.count("\n") == 1
    assert load_checkpoint(path)["step"] == 0  # it is left as it was
