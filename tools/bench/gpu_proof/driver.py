"""Runs the steps of a proof, ends those that take too long, and writes each result at once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.files import replace_text
from pipelines.printable import counted
from tools.bench.gpu_proof.plan import PLANS, Figures, Name, Setup
from tools.throughput.hardware import DALI_PACKAGES, DECODER_PACKAGES, describe_hardware, versions
from tools.throughput.process import ROOT

DISTRIBUTIONS = ("torch", *DALI_PACKAGES, *DECODER_PACKAGES, "nvidia-nvjpeg-cu12", "nvidia-nvjpeg", "webdataset", "numpy")
POLL_SECONDS = 0.1


class Proof:
    """A proof that is running. `out` is the folder of the summary and the archive."""

    def __init__(self, plan: Name, setup: Setup, out: Path) -> None:
        self._limits, self._setup, self._out = PLANS[plan], setup, out
        hardware = asdict(describe_hardware())
        self._summary: dict[str, Any] = {"plan": plan, "device": setup.device, "hardware": hardware}
        self._summary |= {"versions": versions(*DISTRIBUTIONS), "steps": {}}

    def run(self, names: Sequence[str], seconds: float) -> bool:
        """Runs the named steps; returns whether all of them succeeded in time.

        At the end of its time, the proof ends the step that is running, and the later steps do not begin.
        """
        end = time.monotonic() + seconds
        waiting = deque(name for name in self._limits if name in names)
        while waiting and time.monotonic() < end:
            self._work(waiting, end)
        for name in waiting:
            self._note(name, {"seconds": 0.0, "error": "no time was left"})
        return not any("error" in found for found in self._summary["steps"].values())

    def _work(self, waiting: deque[str], end: float) -> None:
        """Starts a process for the waiting steps, and follows it until a step has to be ended, or all have ended."""
        command = [sys.executable, "-m", "tools.bench.gpu_proof.worker", self._setup.device, str(self._setup.work), *waiting]
        worker = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        is_alive = True
        try:
            while waiting and is_alive:
                found = self._await(waiting[0], worker, end)
                is_alive = found.pop("has_ended", False)
                if not is_alive:
                    _end(worker)
                self._note(waiting.popleft(), found)
                self._archive()
        finally:
            _end(worker)

    def _await(self, name: str, worker: "subprocess.Popen[bytes]", end: float) -> Figures:
        """Returns the figures of a step that has just begun; with an error if it takes too long, or if its process ends."""
        start = time.monotonic()
        limit, result = min(start + self._limits[name], end), self._setup.work / f"{name}.json"
        while True:
            has_died = worker.poll() is not None
            found: Figures = json.loads(result.read_text()) if result.exists() else {}
            passed = time.monotonic() - start
            if found.get("has_ended"):
                return found
            if has_died or start + passed > limit:
                error = f"its process ended with status {worker.returncode}" if has_died else f"ended after {passed:.0f} s"
                return {**found, "seconds": round(passed, 1), "error": error}
            time.sleep(POLL_SECONDS)

    def _note(self, name: str, found: Figures) -> None:
        self._summary["steps"][name] = found
        replace_text(self._out / "summary.json", json.dumps(self._summary, indent=1) + "\n")
        print(f"== {name}: {found['seconds']} s of {self._limits[name]}{'  FAILED' if 'error' in found else ''}", flush=True)
        passed = [key for key, value in found.items() if isinstance(value, dict) and value.get("outcome") == "passed"]
        if passed:
            print(f"   {counted(len(passed), 'test')} passed", flush=True)
        for key, value in found.items():
            if key not in ("seconds", *passed):
                print(f"   {key}: {json.dumps(value)}", flush=True)

    def _archive(self) -> None:
        """Packs logs, results, metrics and traces into OUT/proof.tar.gz, without shards and weights."""
        part = self._out / "proof.tar.gz.part"
        with tarfile.open(part, "w:gz", compresslevel=6) as archive:
            for path in sorted(self._setup.work.rglob("*")):
                name = path.relative_to(self._setup.work)
                if path.is_file() and name.parts[0] != "data" and path.suffix not in (".pt", ".tmp"):
                    with contextlib.suppress(FileNotFoundError):  # the next step is running
                        archive.add(path, name)
        part.replace(self._out / "proof.tar.gz")


def _end(worker: "subprocess.Popen[bytes]") -> None:
    """Kills a worker and its children. A worker that hangs in the GPU's driver is left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(10)
