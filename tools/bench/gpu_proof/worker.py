"""Runs steps of a proof in one process: `python -m tools.bench.gpu_proof.worker DEVICE WORK STEP...`.

A step leaves WORK/NAME.log with its output, and WORK/NAME.json: its figures so far, its error, and whether it has ended.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

from pipelines.files import replace_text
from tools.bench.gpu_proof.plan import Figures, Setup


def run(name: str, setup: Setup) -> None:
    """Runs one step. An error is a result, so the next step follows."""
    # The output of C++ libraries goes to the log, too.
    sys.stdout.flush(), sys.stderr.flush()
    log = os.open(setup.work / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.close(log)
    start, found = time.monotonic(), Figures()

    def note(**more: object) -> None:
        found.update(more, seconds=round(time.monotonic() - start, 1))
        replace_text(setup.work / f"{name}.json", json.dumps(found, indent=1))

    try:
        from tools.bench.gpu_proof.steps import STEPS  # takes seconds, and may fail

        for figures in STEPS[name](setup):
            note(**figures)
    except Exception as error:
        traceback.print_exc()
        note(error=f"{type(error).__name__}: {error}")
    note(has_ended=True)


if __name__ == "__main__":
    device, work, *names = sys.argv[1:]
    for each in names:
        run(each, Setup(device, Path(work)))
