"""Runs many tries in a process that may die, hang or grow, and finds out at which try it did."""

import concurrent.futures
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.faults.campaign import LONG, Outcomes
from tests.faults.children import Child

HANG_SECONDS = 90  # without any progress, on a machine that may be busy
BATCH = 25  # tries that share the slow parts

# Processes that run at the same time.
PROCESSES = 2 if LONG else 1


class Progress:
    """What a child tells about its tries, as lines of a file."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  (until the process ends)

    def begin(self, seeds: Sequence[int], stage: str) -> None:
        self._file.write(json.dumps({"begin": list(seeds), "stage": stage}) + "\n")

    def happened(self, seed: int, outcome: str, wrong: str = "") -> None:
        """Reports an outcome. `wrong` describes a fault."""
        self._file.write(json.dumps({"seed": seed, "outcome": outcome, "wrong": wrong}) + "\n")

    def memory(self, megabytes: int, seeds: Sequence[int]) -> None:
        """Reports the largest memory of this process so far, after a batch."""
        self._file.write(json.dumps({"megabytes": megabytes, "after": [seeds[0], seeds[-1]]}) + "\n")


Work = Callable[[str, str, Sequence[int], str], None]  # a folder, arguments as JSON, seeds, and the file of the progress


class Survivor:
    """Runs `work` for all seeds in child processes, and counts what happens.

    Args:
        work: Runs in the child; uses `Progress`.
        folder: For the children's files.
        arguments: For `work`, as JSON.
    """

    def __init__(self, work: Work, folder: Path, arguments: dict[str, Any]) -> None:
        self._work, self._folder, self._arguments = work, folder, json.dumps(arguments)
        self.outcomes = Outcomes()
        self.megabytes, self.largest_after = 0, [0, 0]  # the seeds of the batch after which memory was largest
        self.culprits: list[tuple[int, str]] = []  # seeds at which a child died or hung, and how

    def run(self, seeds: Sequence[int]) -> None:
        share = -(-len(seeds) // PROCESSES)
        parts = [seeds[start : start + share] for start in range(0, len(seeds), share)]
        with concurrent.futures.ThreadPoolExecutor(PROCESSES) as threads:
            list(threads.map(self._run_part, parts))

    def _run_part(self, seeds: Sequence[int]) -> None:
        left = list(seeds)
        while left:
            lines, ended = self._run_child(left)
            if ended == "done":
                self._count(lines)
                return
            begun = next((line for line in reversed(lines) if "begin" in line), None)
            suspects = begun["begin"] if begun else left[:1]
            self._count(line for line in lines if line.get("seed") not in suspects)  # these are tried again
            left = left[left.index(suspects[-1]) + 1 :]
            self._find_culprits(suspects, f"{ended} in {begun['stage'] if begun else 'its start'}")

    def _find_culprits(self, suspects: Sequence[int], how: str) -> None:
        """Tries each of several seeds alone, of which one ended a process."""
        alone = list(suspects) if len(suspects) > 1 else []
        found = False
        for seed in alone:
            lines, ended = self._run_child([seed])
            self._count(lines)
            if ended != "done":
                found = True
                self._blame(seed, ended, lines)
        if not found:
            self._blame(suspects[0], f"{how}, together with seeds {list(suspects)}" if alone else how, [])

    def _blame(self, seed: int, how: str, lines: list[dict[str, Any]]) -> None:
        stages = [line["stage"] for line in lines if "begin" in line]
        self.outcomes.fail(how.partition(" in ")[0], f"seed {seed}: {how} {stages[-1:]}")
        self.culprits.append((seed, how))

    def _run_child(self, seeds: Sequence[int]) -> tuple[list[dict[str, Any]], str]:
        """Returns the progress of a child, and how it ended: "done", "died by signal N", "hung" or "failed: MESSAGE"."""
        folder = self._folder / f"child-{seeds[0]}-{len(seeds)}-{time.monotonic_ns()}"
        folder.mkdir(parents=True)
        progress = folder / "progress"
        child = Child(self._work, str(folder), self._arguments, list(seeds), str(progress), log=folder / "log")
        size, since = -1, time.monotonic()
        while child.runs() and time.monotonic() - since < HANG_SECONDS:
            time.sleep(0.02)
            now = progress.stat().st_size if progress.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
        ended = child.wait(0 if child.runs() else 60)
        lines = [json.loads(line) for line in progress.read_text().splitlines()] if progress.exists() else []
        if ended.status == 0:
            return lines, "done"
        if ended.status is None:
            return lines, "hung"
        return lines, f"died by signal {-ended.status}" if ended.status < 0 else f"failed: {ended.error[:300]}"

    def _count(self, lines: Iterable[dict[str, Any]]) -> None:
        for line in lines:
            if line.get("wrong"):
                self.outcomes.fail(line["outcome"], f"seed {line['seed']}: {line['wrong']}")
                self.culprits.append((line["seed"], line["outcome"]))
            elif "seed" in line:
                self.outcomes[line["outcome"]] += 1
            elif line.get("megabytes", 0) > self.megabytes:
                self.megabytes, self.largest_after = line["megabytes"], line["after"]
