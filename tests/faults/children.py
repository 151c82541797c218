"""Processes that may be killed, may crash and may hang.

They are forked from a server that has imported everything that is slow to import, so a process takes 30 ms instead of seconds.
Each has a session of its own, so that it dies together with what it has started.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.runs import ROOT

PRELOADED = ("train", "tools.shards.cli", "tools.shards.convert", "tools.shards.encode", "tools.shards.verify", "model.job")
PRELOADED += ("pipelines.build", "pipelines.dali.loader", "tools.export.export", "tests.faults.kill_switch")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*PRELOADED])


class Ended(NamedTuple):
    """How a process ended: its exit status, or minus the number of a signal, or None if it was stopped because it hung."""

    status: int | None
    output: str

    @property
    def error(self) -> str:
        """The last line of the output."""
        return self.output.rstrip("\n").rpartition("\n")[2]


class Child:
    """A running process. Its output, stdout and stderr, goes to a file."""

    def __init__(self, function: Callable[..., None], *arguments: Any, log: Path, env: dict[str, str] | None = None) -> None:
        self._log = log
        variables = {**os.environ, **(env or {})}
        self._process: BaseProcess = _context.Process(target=_run, args=(function, arguments, str(log), variables))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def runs(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """Kills the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # it may not have its session yet
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 120) -> Ended:
        """Waits for its end, and kills it after that time."""
        self._process.join(seconds)
        hung = self._process.is_alive()
        self.kill()
        self._process.join()
        output = self._log.read_text(errors="replace") if self._log.exists() else ""
        return Ended(None if hung else self._process.exitcode, output)


def run(function: Callable[..., None], *arguments: Any, log: Path, env: dict[str, str] | None = None) -> Ended:
    """Runs a function in a process of its own, to its end."""
    return Child(function, *arguments, log=log, env=env).wait()


def command(main: str, *arguments: object) -> tuple[Callable[..., None], str, Sequence[str]]:
    """Returns a function and arguments for `Child`: the `module:function` of a command and its command line."""
    return _command, main, [*map(str, arguments)]


def _command(main: str, arguments: Sequence[str]) -> None:
    module, _, name = main.partition(":")
    getattr(importlib.import_module(module), name)(arguments)


def _run(function: Callable[..., None], arguments: Sequence[Any], log: str, variables: dict[str, str]) -> None:
    with contextlib.suppress(PermissionError):
        os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    try:
        function(*arguments)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)  # an error that a command would show as a traceback


def kill_after(child: Child, seconds: float) -> Ended:
    """Kills a process after some seconds, if it still runs."""
    end = time.monotonic() + seconds
    while child.runs() and time.monotonic() < end:
        time.sleep(0.002)
    child.kill()
    return child.wait()
