"""Defaults that depend on the machine: threads and batch size."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.config import ModelConfig, OptimConfig
from model.distributed import alone
from pipelines.config import DataConfig
from tools.run.config import Config
from tools.run.recipes import RECIPES
from tools.run.resources import default_batch_size, share_threads, with_batch_size, with_defaults


@pytest.mark.parametrize(
    ("cores", "processes", "threads"),
    [(1, 1, (1, 1)), (2, 1, (2, 2)), (4, 1, (4, 2)), (16, 1, (14, 2)), (64, 1, (56, 8)), (64, 4, (14, 2)), (2, 4, (1, 1))],
)
def test_threads_on_a_cpu(monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, threads: tuple[int, int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert share_threads(None, None, torch.device("cpu"), processes) == threads
    assert share_threads(3, None, torch.device("cpu"), processes) == (3, threads[1])


@pytest.mark.parametrize(("cores", "processes", "threads"), [(1, 1, 1), (2, 1, 1), (16, 1, 14), (64, 1, 16), (128, 8, 14)])
def test_data_threads_on_a_gpu_leave_cores_to_launch_and_to_read(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert share_threads(None, None, torch.device("cuda", 0), processes)[1] == threads
    assert share_threads(None, 5, torch.device("cuda", 0), processes)[1] == 5


@pytest.mark.parametrize(
    ("gigabytes", "samples", "options", "batch_size"),
    [
        (80, 1_281_167, {}, 256),
        (24, 1_281_167, {}, 128),
        (12, 1_281_167, {}, 64),
        (4, 1_281_167, {}, 32),
        (12, 1_281_167, {"image_size": 112}, 256),
        (80, 1_281_167, {"image_size": 512}, 64),
        (80, 1_281_167, {"image_size": 64, "data": DataConfig(size_schedule=("1:64", "3:512"))}, 64),
        (80, 6_500, {}, 128),  # 50 steps an epoch
        (80, 6_500, {"accumulate_steps": 2}, 64),
        (80, 1_600, {}, 32),
        (80, 1_599, {}, 16),  # more steps matter more than a busy GPU
        (80, 61, {}, 16),
        (80, 1_281_167, {"batch_size": 48}, 48),
    ],
)
def test_the_batch_size_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int, samples: int, options: dict[str, Any], batch_size: int
) -> None:
    memory = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    gpu, cpu = (alone(torch.device(kind, 0)) for kind in ("cuda", "cpu"))
    config = Config(**options)
    assert with_batch_size(config, gpu, samples).batch_size == batch_size
    if samples > 10_000:
        assert with_batch_size(config, cpu, samples).batch_size == options.get("batch_size", 64)
    if not config.batch_size and samples > 3_000:
        of_eight = default_batch_size(gpu.device, config.largest_image_size, samples * 8, 8 * config.accumulate_steps)
        assert of_eight == min(batch_size, 128 // config.accumulate_steps)


@pytest.mark.parametrize(("samples", "batch_size"), [(3_200, 64), (3_199, 32), (1_600, 32), (1_599, 16), (61, 16)])
def test_the_batch_size_of_a_cpu(samples: int, batch_size: int) -> None:
    assert with_batch_size(Config(), alone(torch.device("cpu")), samples).batch_size == batch_size


@pytest.mark.parametrize(
    ("config", "samples", "chosen"),
    [
        (Config(), 1_281_167, (0.05, 1.0, 0.1, 20)),
        (Config(epochs=1), 1_281_167, (0.05, 1.0, 0.1, 20)),
        (RECIPES["demo"], 2_500, (0.02, 1.0, 0.1, 20)),
        (Config(), 6_400, (0.05, 1.0, 0.1, 20)),
        (Config(), 245, (0.05, 100 / 15, 0.5, 3)),
        (Config(epochs=6), 245, (0.015, 100 / 15, 0.5, 3)),  # 90 steps
        (Config(), 800, (0.05, 2.0, 0.2, 10)),
        (Config(batch_size=64), 245, (0.015, 100 / 3, 0.5, 1)),
        (
            Config(optim=OptimConfig(lr=0.1, warmup_epochs=0), model=ModelConfig(norm_momentum=0.3), log_every=7),
            *(245, (0.1, 0, 0.3, 7)),
        ),
    ],
)
def test_settings_for_the_number_of_steps(config: Config, samples: int, chosen: tuple[float, float, float, int]) -> None:
    """Small sets have other defaults than large ones. What is given stays, and so does what was chosen, on resuming."""
    cpu = alone(torch.device("cpu"))
    config = with_defaults(config, cpu, samples)
    found = (config.optim.lr, config.optim.warmup_epochs, config.model.norm_momentum, config.log_every)
    assert found == pytest.approx(chosen, rel=1e-3)
    assert with_defaults(config, cpu, samples) == config
