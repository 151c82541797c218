"""How a run is set up from its settings and the machine."""

import os

import pytest
import torch

from training.config import Config, share_threads


@pytest.mark.parametrize(
    ("cores", "processes", "threads"),
    [(1, 1, (1, 1)), (2, 1, (2, 2)), (4, 1, (4, 2)), (16, 1, (14, 2)), (64, 1, (56, 8)), (64, 4, (14, 2)), (2, 4, (1, 1))],
)
def test_threads_on_a_cpu(monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, threads: tuple[int, int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert share_threads(Config(), torch.device("cpu"), processes) == threads
    assert share_threads(Config(torch_threads=3), torch.device("cpu"), processes) == (3, threads[1])
