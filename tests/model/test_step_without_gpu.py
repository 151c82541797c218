"""Training step and validation loop on a fake GPU: where the host would wait, and how many kernels it would launch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_cuda.build import build_guard, find_compiler

ROOT = Path(__file__).parents[2]
KINDS = ("bf16", "fp16", "fp32", "mixup", "cutmix", "two batches", "deterministic", "weighted", "weighted mixup")
# Operations that torch 2.11 refuses on a GPU if deterministic ones are required: their code in `libtorch_cuda.so` calls
# `alertNotDeterministic`. Other such operations are unlikely here.
NOT_DETERMINISTIC = {"_adaptive_avg_pool2d_backward", "upsample_bilinear2d_backward", "bincount", "median"}
MOST_LAUNCHES = 700

Report = dict[str, Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of `tests/helpers/fake_cuda`, which patches torch and so needs a separate process."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler, for the device guard that a build of torch without CUDA lacks")
    folder = tmp_path_factory.mktemp("fake_cuda")
    path = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.fake_cuda", build_guard(compiler, folder), path],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},  # a real GPU would be in the way
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(path.read_text()))


def test_a_wait_is_noticed(report: Report) -> None:
    assert {"item", "to the host", "mask", "list"} <= set(report["waiting"])
    assert [name for name, waits in report["waiting"].items() if len(waits) != 1] == []


def test_what_does_not_wait_is_not_reported(report: Report) -> None:
    assert [waits for waits in report["not waiting"].values() if waits] == []


def test_the_host_waits_for_nothing_in_a_step(report: Report) -> None:
    """From mixing the batch to the update of the weights and their average."""
    assert {kind: step["waits"] for kind, step in report["steps"].items()} == {kind: [] for kind in KINDS}
    assert all(step["is_over"] for step in report["steps"].values())


def test_the_host_waits_for_nothing_in_the_validation_loop(report: Report) -> None:
    assert report["evaluation"]["waits"] == []
    assert report["evaluation"]["is_over"]  # the loop has taken all batches


def test_a_gradient_in_another_memory_format_is_noticed(report: Report) -> None:
    (mismatch,) = report["gradients"]["first"]
    assert mismatch.startswith("_fused_sgd_: torch.float32 (4, 3, 3, 3) with strides (27, 1, 9, 3)")
    assert report["gradients"]["last"] == []


def test_what_is_updated_together_has_the_same_layout(report: Report) -> None:
    """Weights, gradients, momentum, and averages. Otherwise, the fused optimizer fails, and other updates are slow."""
    for kind in KINDS:
        step = report["steps"][kind]
        assert step["launches"]["_fused_sgd_"] == 2  # with weight decay, and without
        assert step["mismatches"] == [], kind


def test_a_step_launches_few_kernels(report: Report, record_property: Callable[[str, object], None]) -> None:
    """With small batches, a step takes as long as the host needs to launch its kernels.

    So a change that exceeds the bound must be worth it. This counts operations, and some launch more than one kernel.
    """
    launches = report["steps"]["bf16"]["launches"]
    table = "\n".join(f"{count:5} {name}" for name, count in launches.items())
    record_property("launches", sum(launches.values()))
    print(f"{sum(launches.values())} operations\n{table}")
    assert launches["convolution"] == launches["convolution_backward"] == 59
    assert sum(launches.values()) <= MOST_LAUNCHES, table


def test_a_deterministic_step_has_only_kernels_that_torch_allows(report: Report) -> None:
    assert NOT_DETERMINISTIC & report["steps"]["bf16"]["launches"].keys() == {"_adaptive_avg_pool2d_backward"}
    assert NOT_DETERMINISTIC & report["steps"]["deterministic"]["launches"].keys() == set()
