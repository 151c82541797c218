"""Competitors as processes of their own: their time, their memory, and what they leave on the disk."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.files import make_writable
from pipelines.machine import family
from tools.throughput.rounds import Turn, TurnError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "NO_ALBUMENTATIONS_UPDATE": "1",  # img2dataset would ask the network on each start
    # `python -m tools...` works with any interpreter, and finds no other `tools` in the current folder.
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "PYTHONSAFEPATH": "1",
}
SAMPLE_SECONDS = 0.05
PROGRESS_BAR = re.compile(r"\d%\|")  # of tqdm; it may be the last thing that a failing program prints
# Fields of /proc/PID/status: the private memory of a process and its shared memory in /dev/shm, without the code of libraries.
MEMORY_FIELDS = ("RssAnon:", "RssShmem:")


class Run(NamedTuple):
    """A finished run of a command."""

    seconds: float
    said: dict[str, float]  # the JSON object in its last line of output, or nothing
    peak_memory_bytes: int  # largest sum over the processes of the command at one time


def run_measured(command: Sequence[str | Path], logs: Path, environment: Mapping[str, str] | None = None) -> Run:
    """Runs a command to its end, and ends whatever it leaves running.

    Memory is sampled 20 times per second from /proc: anonymous and shared-memory pages of all descendants of the command. Peaks
    between samples are missed, and pages that forked processes share count for each of them. Sampling takes 0.1 % of a core.
    For a command that ends before the first sample, the kernel gives an upper bound: it includes this process's own peak.

    If the command fails, a TurnError holds the last line of its errors. `environment` adds variables to those of this process.
    """
    # Unlike pipes, files never make a process wait.
    out, err = logs / "stdout", logs / "stderr"
    peak_memory_bytes = 0
    variables = {**os.environ, **ENVIRONMENT, **(environment or {})}
    with out.open("wb") as stdout, err.open("wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=variables, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            ended = os.pidfd_open(process.pid)  # unlike Popen.wait with a time-out, it wakes up at the very end
            running = True
            while running:
                peak_memory_bytes = max(peak_memory_bytes, sum(map(_memory_bytes, family(process.pid))))
                running = not select.select([ended], [], [], SAMPLE_SECONDS)[0]
            seconds = time.perf_counter() - started
            os.close(ended)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = (err.read_text(errors="replace") or out.read_text(errors="replace")).splitlines()
        said = [line.strip() for line in lines if line.strip() and not PROGRESS_BAR.search(line)]
        raise TurnError(said[-1] if said else f"exit status {process.returncode}")
    return Run(seconds, _last_object(out.read_text(errors="replace")), peak_memory_bytes or 1024 * usage.ru_maxrss)


def _last_object(printed: str) -> dict[str, float]:
    with contextlib.suppress(ValueError, IndexError, TypeError):
        return dict(json.loads(printed.splitlines()[-1]))
    return {}


def _memory_bytes(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        status = Path(f"/proc/{pid}/status").read_text()
        return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(MEMORY_FIELDS))
    return 0


def run_loader(command: Sequence[str | Path], logs: Path, environment: Mapping[str, str] | None = None) -> Turn:
    """Runs a process that calls `measure_loader` in turn.py; adds the time of its start to the command."""
    _, said, peak_memory_bytes = run_measured([*command, str(time.monotonic())], logs, environment)
    return {
        "images_per_second": said["images"] / said["seconds"],
        "first_seconds": said["first_seconds"],
        "cpu_milliseconds": 1000 * said["cpu_seconds"] / said["images"],
        "peak_memory_bytes": peak_memory_bytes,
    }


def probe(python: str, modules: Sequence[str], distributions: Sequence[str]) -> tuple[set[str], dict[str, str]]:
    """Returns the modules and the versions of the distributions that an interpreter has."""
    script = (
        "import importlib.util, json, sys\n"
        "from tools.throughput.hardware import versions\n"
        "modules, distributions = json.loads(sys.argv[1])\n"
        "print(json.dumps([[m for m in modules if importlib.util.find_spec(m)], versions(*distributions)]))\n"
    )
    command = [python, "-c", script, json.dumps([modules, distributions])]
    said = ""
    try:
        done = subprocess.run(
            command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, errors="replace", check=False
        )
        status = f"exit status {done.returncode}" if done.returncode else "its output is not that of Python"
        said = (done.stderr.strip() or status).splitlines()[-1]
        present, found = json.loads(done.stdout)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else said
        raise ValueError(f"--peers-python {python}: does not work as a Python interpreter ({reason})") from None
    return set(present), found


@contextlib.contextmanager
def open_scratch(parent: Path | None, needed_bytes: int) -> Iterator[tuple[Path, dict[str, str]]]:
    """Makes a folder for the competitors and removes it with all its contents; also yields their environment.

    Temporary files of the competitors go to a second folder, which is removed as well. It lies in the system's folder, because
    it may contain sockets, whose paths Linux limits to 107 bytes.

    The parent is made if necessary; by default it is the system's folder. A ValueError says that it is not writable, or
    lacks the space needed.
    """
    parent = (parent or Path(tempfile.gettempdir())).absolute()
    make_writable(parent, "name another folder with --scratch")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise ValueError(
            f"{parent} has {free / 1e6:,.1f} MB free, but {needed_bytes / 1e6:,.1f} MB are needed; name another folder with "
            "--scratch"
        )
    with (
        tempfile.TemporaryDirectory(prefix="throughput-", dir=parent) as folder,
        tempfile.TemporaryDirectory(prefix="throughput-") as temporary,
    ):
        (Path(folder) / "logs").mkdir()
        yield (
            Path(folder),
            {
                "TMPDIR": temporary,
                "DATA_OPTIMIZER_CACHE_FOLDER": f"{folder}/litdata-chunks",
                "DATA_OPTIMIZER_DATA_CACHE_FOLDER": f"{folder}/litdata-data",
            },
        )
