"""The size of the fault campaign, its seeds, and the file that receives its results.

FAULTS=long makes it large (`make faults`); without it, it is small enough for every run of the suite. FAULTS_SEED changes what
is drawn, FAULTS_OUT names a file to which each test appends what it tried and what happened (`tests/faults/table.py` turns it
into the table of docs/reliability.md), and FAULTS_FOUND names a folder for the inputs that broke something.
"""

import collections
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

LONG = os.environ.get("FAULTS") == "long"
SEED = int(os.environ.get("FAULTS_SEED", "0"))


def size(short: int, long: int) -> int:
    """Returns how often to try something."""
    return long if LONG else short


def seeds(count: int) -> range:
    """Returns the seeds of `count` tries."""
    return range(SEED, SEED + count)


def some(items: list[int], most: int, seed: int = SEED) -> list[int]:
    """Returns all items in the long campaign, and in the short one at most `most` of them: the ends, and others at random."""
    if LONG or len(items) <= most:
        return items
    return sorted({items[0], items[-1], *random.Random(seed).sample(items, most - 2)})


def record(part: str, what: str, outcomes: Mapping[str, int], **more: object) -> None:
    """Appends what was tried to the file FAULTS_OUT, if it is given.

    Args:
        part: kill, disk, store, input, trust or long.
        what: What was tried, in words.
        outcomes: How often each thing happened, by words for it.
        more: What else was measured.
    """
    line = {"part": part, "what": what, "tries": sum(outcomes.values()), "outcomes": dict(outcomes), "seed": SEED, **more}
    if path := os.environ.get("FAULTS_OUT"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "long": LONG}) + "\n")


def keep(name: str, content: bytes) -> str:
    """Keeps an input that broke something in the folder FAULTS_FOUND, if it is given, and returns its path or its name."""
    if not (folder := os.environ.get("FAULTS_FOUND")):
        return name
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


class Outcomes(collections.Counter[str]):
    """Counts outcomes, and collects the tries that went wrong, so that one of them does not hide the others."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []

    def fail(self, kind: str, detail: str) -> None:
        self[kind] += 1
        self.wrong.append(f"{kind}: {detail}")

    def finish(self, part: str, what: str, **more: object) -> None:
        """Records the outcomes. The test fails if anything went wrong."""
        record(part, what, self, **more)
        if self.wrong:
            shown = "\n".join(self.wrong[:20])
            pytest.fail(f"{len(self.wrong)} of {sum(self.values())} tries of {what!r} went wrong:\n{shown}", pytrace=False)
