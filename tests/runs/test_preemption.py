"""Preempted runs save a checkpoint, exit with 75, and continue as if undisturbed."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.runs import alone, arguments, assert_same, finish, start, torchrun, wait_for_step, workers

# Signals itself at the first batch of a validation, and prints the number of calls that count scores.
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
    """Signals a run after a step, waits for its end, and returns its output."""
    wait_for_step(process, run, step)
    process.send_signal(number)
    return finish(process, 75)


def test_leaving_and_going_on(whole: Path, shards: Path, tmp_path: Path) -> None:
    """After SIGTERM in training, SIGUSR1 in validation, and Ctrl-C in training, the result is bit for bit the same."""
    run = tmp_path / "run"
    command = [*alone(), *arguments(shards, run)]
    output = leave(start(command, tmp_path), run, 2, signal.SIGTERM)
    goodbye = f"the checkpoint is saved; continue with the same command and --run-dir {run} --resume auto\n"
    assert output.endswith(f"SIGTERM: {goodbye}")
    assert (
        "SIGTERM: the run waits for the end of the current step or validation batch, then saves a checkpoint and ends; "
        in output
    )
    assert len(list((run / "checkpoints").glob("step-*.pt"))) == 1

    output = finish(start([*alone(LEAVES_IN_VALIDATION), *arguments(shards, run)], tmp_path), 75)
    assert "after step 7\n" not in output
    assert f"SIGUSR1: {goodbye}" in output
    assert output.endswith("2 times\n")  # raw and averaged weights, on the first of four batches
    assert (run / "checkpoints" / "step-000000007.pt").exists()
    assert '"valid"' not in (run / "metrics.jsonl").read_text()

    output = leave(start(command, tmp_path), run, 9, signal.SIGINT)
    assert "resuming after step 7\n" in output
    assert output.endswith(f"SIGINT: {goodbye}")

    output = finish(start(command, tmp_path))
    assert re.search(r"after step (9|1\d)\n", output)
    assert_same(run, whole)


SLOW_STEP = """
import hashlib
import multiprocessing
import time
import train

def train_step(job, image, target):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    print(child.pid, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # a C function, in which Python runs no handlers

train.train_step = train_step
train.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_a_long_step_a_signal_is_answered_at_once_and_ctrl_c_then_ends_the_run(
    number: signal.Signals, shards: Path, tmp_path: Path
) -> None:
    process = start([*alone(SLOW_STEP), *arguments(shards, tmp_path / "run", "--torch-threads", 1)], tmp_path)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    child = next(int(line) for line in lines if line.strip().isdigit())
    for _ in range(2):  # as from a scheduler and from torchrun: signals within a second count as one
        process.send_signal(number)
    assert next(lines) == (
        f"{number.name}: the run waits for the end of the current step or validation batch, then saves a checkpoint and ends; "
        f"{'a second ' if number == signal.SIGINT else ''}Ctrl-C ends it at once, without a checkpoint\n"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.1)
    process.send_signal(signal.SIGINT)
    output = finish(process, 130)
    assert output == "interrupted; earlier checkpoints, if any, are intact, and --resume auto continues from the newest\n"
    deadline = time.monotonic() + 60
    while not has_ended(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    """Returns whether a process is gone, or only its exit status is left."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_two_ranks_leave_together(shards: Path, tmp_path: Path) -> None:
    """A signal arrives at one of them, then at torchrun. torchrun itself exits with 1."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    finish(start([*torchrun(2), *arguments(shards, whole, "--batch-size", 2)], tmp_path))  # 15 steps an epoch
    command = [*torchrun(2), *arguments(shards, run, "--batch-size", 2)]
    process = start(command, tmp_path)
    wait_for_step(process, run, 2)
    os.kill(workers(process)[1], signal.SIGTERM)
    output = finish(process, 1)
    assert (
        output.count("SIGTERM: the run waits for all 2 processes, which agree every 10 steps and after each validation, then ")
        == 1
    )
    assert output.count("a signal at another process: the checkpoint is saved; ") == 1
    assert set(re.findall(r"exitcode *: (-?\d+)", output)) == {"75"}
    assert (run / "checkpoints" / "step-000000010.pt").exists()  # the ranks agree every ten steps

    process = start(command, tmp_path)
    wait_for_step(process, run, 12)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 1)
    assert "resuming after step 10\n" in output
    assert output.count("SIGTERM: the checkpoint is saved; ") == 1
    [*_, newest] = sorted((run / "checkpoints").glob("step-*.pt"))
    assert newest.name in ("step-000000015.pt", "step-000000020.pt")  # at the end of an epoch, or after ten steps

    output = finish(start(command, tmp_path))
    assert re.search(r"after step (15|20)\n", output)
    assert_same(run, whole)
