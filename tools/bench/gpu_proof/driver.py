"""Has the steps of a proof taken, ends those that take too long, and writes down at once what came of each."""

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
from tools.bench.gpu_proof.plan import PLANS, Figures, Ground, Name, Step
from tools.throughput.hardware import describe_hardware, versions

ROOT = Path(__file__).parents[3]
DISTRIBUTIONS = ("torch", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "nvidia-nvjpeg-cu12", "webdataset", "numpy")
POLL_SECONDS = 0.1


class Proof:
    """A proof that is under way.

    Args:
        plan: Which.
        ground: What the steps work on.
        out: Folder of the summary and the archive.
    """

    def __init__(self, plan: Name, ground: Ground, out: Path) -> None:
        self._plan, self._ground, self._out = plan, ground, out
        self._summary: dict[str, Any] = {
            "plan": plan,
            "device": ground.device,
            "hardware": asdict(describe_hardware()),
            "versions": versions(DISTRIBUTIONS),
            "steps": {},
        }

    def run(self, names: Sequence[str], seconds: float) -> bool:
        """Takes the named steps; whether all of them ended well, in time.

        Args:
            names: Of steps of the plan.
            seconds: For all of them. A step that has not ended by then is ended, and those after it are not begun.
        """
        end = time.monotonic() + seconds
        waiting = deque(step for step in PLANS[self._plan] if step.name in names)
        while waiting and time.monotonic() < end:
            self._work(waiting, end)
        for step in waiting:
            self._note(step, {"seconds": 0.0, "error": "no time was left"})
        return not any("error" in found for found in self._summary["steps"].values())

    def _work(self, waiting: deque[Step], end: float) -> None:
        """Has a process take the waiting steps, up to the last one or to one that has to be ended."""
        command = (sys.executable, "-m", "tools.bench.gpu_proof.worker", self._ground.device, self._ground.work, self._plan)
        worker = subprocess.Popen((*command, *(step.name for step in waiting)), cwd=ROOT, start_new_session=True)
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

    def _await(self, step: Step, worker: "subprocess.Popen[bytes]", end: float) -> Figures:
        """What comes of a step that has just begun; with an error where it takes too long, or where its process ends."""
        start = time.monotonic()
        limit = min(start + step.seconds, end)
        while True:
            has_died = worker.poll() is not None
            found = self._read(step)
            if found.get("has_ended"):
                return found
            passed = time.monotonic() - start
            if has_died:
                return {**found, "seconds": round(passed, 1), "error": f"its process ended with status {worker.returncode}"}
            if start + passed > limit:
                return {**found, "seconds": round(passed, 1), "error": f"ended after {passed:.0f} s"}
            time.sleep(POLL_SECONDS)

    def _read(self, step: Step) -> Figures:
        result = self._ground.work / f"{step.name}.json"
        return json.loads(result.read_text()) if result.exists() else {}

    def _note(self, step: Step, found: Figures) -> None:
        self._summary["steps"][step.name] = found
        replace_text(self._out / "summary.json", json.dumps(self._summary, indent=1) + "\n")
        print(f"== {step.name}: {found['seconds']} s of {step.seconds}{'  FAILED' if 'error' in found else ''}", flush=True)
        passed = [name for name, value in found.items() if isinstance(value, dict) and value.get("outcome") == "passed"]
        if passed:
            print(f"   {len(passed)} tests passed", flush=True)
        for name, value in found.items():
            if name not in ("seconds", *passed):
                print(f"   {name}: {json.dumps(value)}", flush=True)

    def _archive(self) -> None:
        """Packs logs, results, metrics and traces into OUT/proof.tar.gz; neither shards nor weights."""
        part = self._out / "proof.tar.gz.part"
        with tarfile.open(part, "w:gz", compresslevel=6) as archive:
            for path in sorted(self._ground.work.rglob("*")):
                name = path.relative_to(self._ground.work)
                if path.is_file() and name.parts[0] != "data" and path.suffix not in (".pt", ".tmp"):
                    with contextlib.suppress(FileNotFoundError):  # the next step is at work
                        archive.add(path, name)
        part.replace(self._out / "proof.tar.gz")


def _end(worker: "subprocess.Popen[bytes]") -> None:
    """Kills a worker and what it has started. One that hangs in the GPU's driver is left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(10)
