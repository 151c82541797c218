"""Writes a report of all checks: `python -m tests.helpers.fake_cuda GUARD REPORT`."""

import ctypes
import json
import sys
from pathlib import Path


def main(guard: str, report: str) -> None:
    ctypes.CDLL(guard)  # before torch
    from tests.helpers.fake_cuda.checks import check_all
    from tests.helpers.fake_cuda.device import FakeCUDA, pretend

    pretend()
    with FakeCUDA():
        found = check_all()
    Path(report).write_text(json.dumps(found, indent=1))


main(*sys.argv[1:])
