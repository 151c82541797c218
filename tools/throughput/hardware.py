"""What a measurement ran on, for the record beside its figures."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hardware:
    """The machine.

    Attributes:
        cpu: Model name.
        cores: That this process may use.
        memory_bytes: Of the machine.
        system: Operating system and its release.
        gpus: NVIDIA's, each with its memory and its driver.
    """

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join([f"{self.cores} cores of {self.cpu}", *self.gpus])


def describe_hardware() -> Hardware:
    """Of the machine that this process runs on."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return Hardware(
        cpu=model[1] if model else platform.machine(),  # ARM's cpuinfo has no names
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=platform.platform(),
        gpus=_gpus(),
    )


def _gpus() -> tuple[str, ...]:
    command = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):  # no driver, or none that works
        return ()
    return tuple("{} ({}, driver {})".format(*line.split(", ")) for line in listed.splitlines())


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Of Python and those of the distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The date and the time, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
