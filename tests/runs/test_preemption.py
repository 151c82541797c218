"""Runs that are asked to leave: they save, end with 75, and go on as if nothing had been."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.runs import alone, arguments, assert_same, finish, start, torchrun, wait_for_step, workers

# Signals itself at the first batch of a validation, and says how often scores were counted in all.
LEAVES_IN_VALIDATION = """
import os
import signal
import train
from model import evaluation

seen = []
real = evaluation.hits

def hits(logits, target):
    seen.append(target)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
    return real(logits, target)

evaluation.hits = hits
try:
    train.main()
finally:
    print(f"{len(seen)} times")
"""


def leave(process: "subprocess.Popen[str]", run: Path, step: int, number: signal.Signals) -> str:
    """Signals a run after a step; gives what it has printed when it has left."""
    wait_for_step(process, run, step)
    process.send_signal(number)
    return finish(process, 75)


def test_leaving_and_going_on(shards: Path, tmp_path: Path) -> None:
    """By SIGTERM in training, SIGUSR1 in validation, Ctrl-C in training: as undisturbed, bit for bit."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = [*alone(), *arguments(shards, run)]
    finish(start([*alone(), *arguments(shards, whole)], tmp_path))
    output = leave(start(command, tmp_path), run, 2, signal.SIGTERM)
    goodbye = f"the run's state is saved; the same command with --run-dir {run} --resume auto goes on\n"
    assert output.endswith(f"SIGTERM: {goodbye}")
    assert "SIGTERM: saving the run's state as soon as all processes can\n" in output
    assert len(list((run / "checkpoints").glob("step-*.pt"))) == 1

    output = finish(start([*alone(LEAVES_IN_VALIDATION), *arguments(shards, run)], tmp_path), 75)
    assert "after step 7\n" not in output
    assert f"SIGUSR1: {goodbye}" in output
    assert output.endswith("2 times\n")  # the raw and the averaged weights on the first batch of four, and no more
    assert (run / "checkpoints" / "step-000000007.pt").exists()
    assert '"valid"' not in (run / "metrics.jsonl").read_text()

    output = leave(start(command, tmp_path), run, 9, signal.SIGINT)
    assert f"resuming {run} after step 7\n" in output
    assert output.endswith(f"SIGINT: {goodbye}")

    output = finish(start(command, tmp_path))
    assert re.search(r"after step (9|1\d)\n", output)
    assert_same(run, whole)


SLOW_STEP = """
import time
import train

def train_step(job, image, target):
    print("in the step", flush=True)
    time.sleep(600)

train.train_step = train_step
train.main()
"""


def test_a_second_ctrl_c_ends_the_run_at_once(shards: Path, tmp_path: Path) -> None:
    process = start([*alone(SLOW_STEP), *arguments(shards, tmp_path / "run")], tmp_path)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert "in the step\n" in lines
    for _ in range(2):  # a scheduler's and torchrun's own, as it were: within a second they are one
        process.send_signal(signal.SIGINT)
    assert next(lines) == "SIGINT: saving the run's state as soon as all processes can\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    process.send_signal(signal.SIGINT)
    output = finish(process, 130)
    assert output == "interrupted; states saved before are whole, and --resume auto goes on from the newest\n"


def test_two_ranks_leave_together(shards: Path, tmp_path: Path) -> None:
    """When one of them is signalled, and when torchrun is; torchrun itself ends with 1."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    finish(start([*torchrun(2), *arguments(shards, whole, "--batch-size", 2)], tmp_path))  # 15 steps an epoch
    command = [*torchrun(2), *arguments(shards, run, "--batch-size", 2)]
    process = start(command, tmp_path)
    wait_for_step(process, run, 2)
    os.kill(workers(process)[1], signal.SIGTERM)
    output = finish(process, 1)
    assert output.count("SIGTERM: saving the run's state as soon as all processes can\n") == 1
    assert output.count("a signal at another process: the run's state is saved; ") == 1
    assert set(re.findall(r"exitcode *: (-?\d+)", output)) == {"75"}
    assert (run / "checkpoints" / "step-000000010.pt").exists()  # they agree every ten steps

    process = start(command, tmp_path)
    wait_for_step(process, run, 12)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 1)
    assert f"resuming {run} after step 10\n" in output
    assert output.count("SIGTERM: the run's state is saved; ") == 1
    [*_, newest] = sorted((run / "checkpoints").glob("step-*.pt"))
    assert newest.name in ("step-000000015.pt", "step-000000020.pt")  # at the end of an epoch, or after ten steps

    output = finish(start(command, tmp_path))
    assert re.search(r"after step (15|20)\n", output)
    assert_same(run, whole)
