"""A command run as a process of its own, with its time and its memory."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.remote.object_store import is_url
from tools.throughput.rounds import TurnError

SAMPLE_SECONDS = 0.05
PROGRESS_BAR = re.compile(r"\d%\|")  # tqdm's, which may be the last thing that a failing program prints
# Of /proc/PID/status: what a process holds for itself and what it shares through /dev/shm, and not the libraries' code.
MEMORY_FIELDS = ("RssAnon:", "RssShmem:")


@dataclass(frozen=True)
class Run:
    """What a run of a command took.

    Attributes:
        seconds: From its start to its end.
        said: What the command measured itself: the JSON object in its last line, or nothing.
        peak_memory_bytes: The largest sum over the processes of the command that was seen at once.
    """

    seconds: float
    said: dict[str, float]
    peak_memory_bytes: int


def run_measured(command: Sequence[str | Path], folder: Path, logs: Path, environment: Mapping[str, str]) -> Run:
    """Runs a command to its end, and ends whatever it left running.

    Memory is sampled 20 times a second from /proc, anonymous and shared-memory pages of all processes that descend from the
    command: peaks between two samples are missed, and pages that forked processes share count for each of them. It costs the
    command some 0.1 % of a core.

    Args:
        command: Program and arguments.
        folder: To run it in.
        logs: Folder for what it prints; through files, which unlike pipes never make a process wait.
        environment: Variables set for it in addition to those of this process.

    Raises:
        TurnError: It failed; with the last line of its errors.
    """
    out, err = logs / "stdout", logs / "stderr"
    peak_memory_bytes = 0
    with out.open("wb") as stdout, err.open("wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            ended = os.pidfd_open(process.pid)  # unlike Popen.wait with a time-out, it wakes up at the very end
            running = True
            while running:
                peak_memory_bytes = max(peak_memory_bytes, _memory_bytes(process.pid))
                running = not select.select([ended], [], [], SAMPLE_SECONDS)[0]
            seconds = time.perf_counter() - started
            os.close(ended)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        lines = (err.read_text(errors="replace") or out.read_text(errors="replace")).splitlines()
        said = [line.strip() for line in lines if line.strip() and not PROGRESS_BAR.search(line)]
        raise TurnError(said[-1] if said else f"exit status {process.returncode}")
    return Run(seconds, _last_object(out.read_text(errors="replace")), peak_memory_bytes)


def absolute(location: str) -> str:
    """A path or a pattern of paths as it is called in every folder; URLs, and nothing, stay what they are."""
    return location if not location or is_url(location) else os.path.abspath(location)


def _last_object(printed: str) -> dict[str, float]:
    with contextlib.suppress(ValueError, IndexError, TypeError):
        return dict(json.loads(printed.splitlines()[-1]))
    return {}


def _memory_bytes(pid: int) -> int:
    """Of a process and all below it; processes that end meanwhile count nothing."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(MEMORY_FIELDS))
    return own + sum(map(_memory_bytes, children))
