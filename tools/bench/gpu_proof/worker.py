"""Runs steps of a proof in one process, one after the other: `python -m tools.bench.gpu_proof.worker DEVICE WORK PLAN STEP...`.

A step leaves WORK/NAME.log, with all that it prints, and WORK/NAME.json: its figures so far, whether it has ended, and if it
failed why.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

from pipelines.files import replace_text
from tools.bench.gpu_proof.plan import PLANS, Figures, Ground, Step


def main() -> None:
    """Runs the steps that the command line names."""
    device, work, plan, *names = sys.argv[1:]
    for step in PLANS[plan]:  # type: ignore[index]
        if step.name in names:
            take(step, Ground(device, Path(work)))


def take(step: Step, ground: Ground) -> None:
    """Takes one step. An error in it is a result: the next step has its turn."""
    _print_to(ground.work / f"{step.name}.log")
    start, found = time.monotonic(), Figures()

    def note(**more: object) -> None:
        found.update(more, seconds=round(time.monotonic() - start, 1))
        replace_text(ground.work / f"{step.name}.json", json.dumps(found, indent=1))

    try:
        for figures in step.run(ground):
            note(**figures)
    except Exception as error:
        traceback.print_exc()
        note(error=f"{type(error).__name__}: {error}")
    note(has_ended=True)


def _print_to(log: Path) -> None:
    """Sends what this process prints to a file, what libraries in C++ print too."""
    sys.stdout.flush(), sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    main()
