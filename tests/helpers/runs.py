"""Training runs for tests: starts them as a user does, waits for steps, and compares the results."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
CLOCKS = ("images_per_second", "data_wait_percent")
# For each process: the threads of several processes would wait for each other's cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def arguments(shards: Path, run: Path, *more: object) -> list[str]:
    """Returns the arguments of a small run on the tests' shards. `more` override them."""
    words = (
        *("--data.train", shards, "--data.valid", shards, "--image-size", 32, "--model.no-aux-logits", "--torch-threads", 1),
        *("--device", "cpu", "--epochs", 2, "--batch-size", 8, "--log-every", 1, "--resume", "auto", "--run-dir", run, *more),
    )
    return [str(word) for word in words]


def train_command(*arguments: object, cwd: Path, warnings: Sequence[str] = ("error",)) -> subprocess.CompletedProcess[str]:
    """Runs train.py to its end in a folder, with one torch thread unless the arguments say otherwise."""
    filters = [word for entry in warnings for word in ("-W", entry)]
    command = [sys.executable, *filters, str(ROOT / "train.py"), "--torch-threads", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | ONE_THREAD)


def alone(script: str | None = None) -> list[str]:
    """Returns the command for one process: train.py, or a script that patches it before it calls `train.main()`."""
    return [sys.executable, "-W", "error", *(["-c", script] if script else [str(ROOT / "train.py")])]


def torchrun(num_ranks: int, *options: str) -> list[str]:
    """Returns the command for several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", *options]
    return [*launcher, "--no-python", sys.executable, "-W", "error", str(ROOT / "train.py")]


def environment(folder: Path = ROOT) -> dict[str, str]:
    """Returns the environment of this process, with a folder in front of Python's path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def peak_megabytes() -> int:
    """Returns the most memory that this process has had. `ru_maxrss` would begin with that of the process that started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) // 1000


def start(command: Sequence[str], folder: Path) -> "subprocess.Popen[str]":
    """Starts a command in a folder. Its stdout receives stderr, too."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment() | ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    )


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Waits until a process has ended with this exit code, and returns its output. The timeout is generous."""
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            for pid in (*workers(process).values(), process.pid):  # torchrun's workers would survive it
                os.kill(pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == code, output
    return output


def wait_until(is_so: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Waits until a running process has done something."""
    deadline = time.monotonic() + 120
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_step(process: "subprocess.Popen[str]", run: Path, step: int) -> None:
    """Waits until a run has written the metrics of a step."""
    wait_until(lambda: (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text(), process)


def workers(torchrun: "subprocess.Popen[str]") -> dict[int, int]:
    """Returns the process IDs of torchrun's workers by rank."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        try:
            environment = Path(f"/proc/{child}/environ").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        ranks |= {int(entry.removeprefix("RANK=")): child for entry in environment if entry.startswith("RANK=")}
    return ranks


def all_metrics(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without values that depend on the clock."""
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in all_metrics(run)]


def is_equal(one: Any, other: Any) -> bool:
    """Returns whether two states are bit for bit the same."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def assert_same(run: Path, other: Path) -> None:
    """Asserts that two runs have the same metrics, and the same last and best weights."""
    assert metrics(run) == metrics(other)
    for name in ("last.pt", "best.pt"):
        one, two = load_checkpoint(run / name), load_checkpoint(other / name)
        for part in ("model", "ema", "optimizer", "scheduler", "step", "best", "scores"):
            assert is_equal(one[part], two[part]), (name, part)
