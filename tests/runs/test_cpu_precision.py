"""With --precision auto, a run on a CPU computes in bfloat16 if that is much faster there, and stays with its choice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.distributed import alone
from pipelines.config import DataConfig
from tests.helpers.command import run_main
from tests.helpers.runs import all_metrics, arguments, finish, start
from tests.helpers.runs import alone as command_of
from tools.evaluate import cli as evaluate
from tools.run import cpu_precision
from tools.run.config import Config
from tools.run.cpu_precision import speed_of_bf16, with_precision

CPU = alone(torch.device("cpu"))
FAST, SLOW = {"is_able": True, "speed": 1.8}, {"is_able": True, "speed": 1.1}
UNABLE = {"is_able": False, "speed": 1.8}


@pytest.fixture
def imitate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the functions believe in another CPU."""

    def imitate(*, is_able: bool, speed: float) -> None:
        monkeypatch.setattr(cpu_precision, "has_bf16", lambda: is_able)
        monkeypatch.setattr(cpu_precision, "speed_of_bf16", lambda: speed)

    return imitate


@pytest.mark.parametrize(
    ("cpu", "settings", "expected"),
    [
        (FAST, {}, "bf16"),
        (SLOW, {}, "fp32"),
        (UNABLE, {}, "fp32"),
        (FAST, {"precision": "fp32"}, "fp32"),
        (SLOW, {"precision": "bf16"}, "bf16"),
        (FAST, {"image_size": 32}, "fp32"),
        (FAST, {"image_size": 32, "data": DataConfig(size_schedule=("2:64",))}, "bf16"),
        (FAST, {"deterministic": True}, "fp32"),
        (FAST, {"model": ModelConfig(arch="torchvision.models:resnet18")}, "fp32"),
    ],
)
def test_a_new_run(imitate: Callable[..., None], cpu: dict[str, Any], settings: dict[str, Any], expected: str) -> None:
    imitate(**cpu)
    assert with_precision(Config(**settings), CPU).precision == expected


def test_a_gpu_chooses_for_itself(imitate: Callable[..., None]) -> None:
    imitate(**FAST)
    assert with_precision(Config(), alone(torch.device("cuda", 0))).precision == "auto"


@pytest.mark.parametrize(
    ("dtype", "cpu", "expected"),
    [("None", FAST, "fp32"), ("torch.bfloat16", SLOW, "bf16"), ("torch.bfloat16", UNABLE, "fp32")],
)
def test_a_run_goes_on_as_it_began(imitate: Callable[..., None], dtype: str, cpu: dict[str, Any], expected: str) -> None:
    """The last case is refused later: the run would be five times as slow, which the user has to ask for."""
    imitate(**cpu)
    assert with_precision(Config(), CPU, {"autocast_dtype": dtype}).precision == expected


def test_measuring_leaves_nothing_behind() -> None:
    before = torch.get_num_threads(), torch.get_rng_state()
    assert speed_of_bf16() > 0
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


SCRIPT = """
from tools.run import cpu_precision
cpu_precision.has_bf16, cpu_precision.speed_of_bf16 = lambda: True, lambda: {speed}
import train
train.main()
"""


def test_runs_that_are_resumed_repeated_and_scored(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another CPU, a resumed run stays in bfloat16. config.json repeats the run, and evaluate gives its scores."""
    fast, slow = (command_of(SCRIPT.format(speed=speed)) for speed in (1.8, 1.0))
    options = ["--image-size", 64, "--batch-size", 16]
    output = finish(start([*fast, *arguments(shards, tmp_path / "run", *options, "--epochs", 1)], tmp_path))
    assert "--precision bf16, chosen because this CPU computes 1.8 times as fast with it as with fp32" in output
    assert "CPU, bfloat16" in output
    settings = tmp_path / "run" / "config.json"
    assert json.loads(settings.read_text())["precision"] == "bf16"
    repeated = finish(start([*slow, "--config", str(settings), "--run-dir", str(tmp_path / "repeated")], tmp_path))
    assert "CPU, bfloat16" in repeated
    [*_, first], [*_, second] = all_metrics(tmp_path / "run"), all_metrics(tmp_path / "repeated")
    assert first == second
    resumed = finish(start([*slow, *arguments(shards, tmp_path / "run", *options, "--epochs", 1)], tmp_path))
    assert "resuming" in resumed
    assert "CPU, bfloat16" in resumed
    monkeypatch.setattr(cpu_precision, "has_bf16", lambda: True)
    options = ["--device", "cpu", "--torch-threads", 1, "--batch-size", 16, "--json"]
    done = run_main(evaluate.main, tmp_path / "run" / "last.pt", shards, *options)
    assert done.status == 0, done.stderr
    scores = json.loads(done.stdout)
    assert {name: first[name] for name in scores if name in first} == {name: scores[name] for name in scores if name in first}
    assert "loss" in first
