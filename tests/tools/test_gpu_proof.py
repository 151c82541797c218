"""The proof for a GPU, rehearsed on a CPU. Its measurements mean nothing, but every step has to run."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tools.bench.gpu_proof import steps, testing
from tools.bench.gpu_proof.plan import PLANS


def prove(out: Path, *options: object, plan: str = "quick") -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The command's end, and the steps in its summary, if it wrote one."""
    command = [sys.executable, "-m", "tools.bench.gpu_proof", plan, out, "--device", "cpu", *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    summary = out / "summary.json"
    return done, json.loads(summary.read_text())["steps"] if summary.exists() else {}


def test_figures_and_logs_come_back_in_two_files(tmp_path: Path) -> None:
    done, found = prove(tmp_path / "out", "--steps", "data", "pipelines", "step", "decode", "waits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [*found] == ["data", "pipelines", "waits", "step", "decode"]  # in the plan's order
    assert not any("error" in step for step in found.values())
    assert found["pipelines"]["valid: pixels against a CPU's, of 255, hw_decoder_load 0.65"] == {"mean": 0, "worst image": 0}
    assert found["step"]["batch 4"]["images/s"] > 0
    assert "tests passed" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["proof.tar.gz", "summary.json"]
    with tarfile.open(tmp_path / "out" / "proof.tar.gz") as archive:
        assert {"data.log", "waits.log", "waits.json"} <= set(archive.getnames())


def test_what_takes_too_long_is_ended_and_said(tmp_path: Path) -> None:
    done, found = prove(tmp_path / "out", "--seconds", 2, "--steps", "data", "pipelines")
    assert done.returncode == 1
    assert found["data"]["error"] == "ended after 2 s"
    assert found["pipelines"]["error"] == "no time was left"


def test_a_step_that_fails_does_not_keep_others_from_their_turn(tmp_path: Path) -> None:
    done, found = prove(tmp_path / "out", "--steps", "pipelines", "waits", "job-originals")  # there are no images
    assert done.returncode == 1
    assert "originals" in found["pipelines"]["error"]
    assert found["job-originals"]["error"].startswith("ChildProcessError: exit status 2: error: no such shard: ")
    assert "error" not in found["waits"]


def test_a_step_that_ends_its_process_does_not_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'tools.bench.gpu_proof.worker' in sys.orig_argv and 'data' in sys.argv:\n"
        "    import threading\n"
        "    threading.Timer(2, os.abort).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done, found = prove(tmp_path / "out", "--steps", "data", "waits")
    assert done.returncode == 1
    assert found["data"]["error"] == "its process ended with status -6"
    assert "error" not in found["waits"]


def test_tests_that_fail_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest, "main", lambda arguments, plugins: pytest.ExitCode.TESTS_FAILED)
    with pytest.raises(AssertionError, match=r"^pytest ended with status 1, and 0 tests passed$"):
        list(testing.run_tests([]))


@pytest.mark.parametrize("plan", PLANS)
def test_every_step_is_there(plan: str) -> None:
    assert set(PLANS[plan]) <= set(steps.STEPS)  # type: ignore[index]


def test_the_tests_that_a_gpu_runs_are_there() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *steps.DAMAGED, *steps.WAITS[:3], *steps.TESTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
