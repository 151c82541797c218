"""Training runs for tests: processes started as a user starts them, killed or signalled on the way, and compared afterwards."""

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


def arguments(shards: Path, run: Path, *more: object) -> list[str]:
    """Those of a small run on the tests' shards; later ones override."""
    words = (
        *("--data.train", shards, "--data.valid", shards, "--image-size", 32, "--model.no-aux-logits", "--torch-threads", 1),
        *("--device", "cpu", "--epochs", 2, "--batch-size", 8, "--log-every", 1, "--resume", "auto", "--run-dir", run, *more),
    )
    return [str(word) for word in words]


def alone(script: str | None = None) -> list[str]:
    """The command for one process: train.py, or a script that meddles with it before it calls `train.main()`."""
    return [sys.executable, "-W", "error", *(["-c", script] if script else [str(ROOT / "train.py")])]


def torchrun(num_ranks: int, *options: str) -> list[str]:
    """The command for several."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", *options]
    return [*launcher, "--no-python", sys.executable, "-W", "error", str(ROOT / "train.py")]


def environment(folder: Path = ROOT) -> dict[str, str]:
    """This process's, with the modules in a folder before all others."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def start(command: Sequence[str], folder: Path) -> "subprocess.Popen[str]":
    """Starts a command in a folder; its output comes together on its stdout."""
    # Each run has but one thread: otherwise those of two ranks wait for each other's cores.
    one_thread = environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Waits for the end, generously; gives what was printed."""
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            for pid in (*workers(process).values(), process.pid):  # of torchrun; they would go on without it
                os.kill(pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == code, output
    return output


def wait_until(is_so: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Waits for something that a running process does."""
    deadline = time.monotonic() + 120
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_step(process: "subprocess.Popen[str]", run: Path, step: int) -> None:
    """Waits until a run has written down a step."""
    wait_until(lambda: (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text(), process)


def workers(torchrun: "subprocess.Popen[str]") -> dict[int, int]:
    """Process numbers of torchrun's processes by rank."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_text().split("\0")
        ranks |= {int(entry.removeprefix("RANK=")): child for entry in environment if entry.startswith("RANK=")}
    return ranks


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what the clock has put there."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def is_equal(one: Any, other: Any) -> bool:
    """Whether two states are the same, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def assert_same(run: Path, other: Path) -> None:
    """Both runs have the same metrics, and the same weights, of which the best are the same, too."""
    assert metrics(run) == metrics(other)
    for name in ("last.pt", "best.pt"):
        one, two = load_checkpoint(run / name), load_checkpoint(other / name)
        for part in ("model", "ema", "optimizer", "scheduler", "step", "best", "scores"):
            assert is_equal(one[part], two[part]), (name, part)
