"""The machine and the software that a measurement ran on."""

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# For CUDA 12 and for CUDA 13; one of the two is installed.
DALI_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
DECODER_PACKAGES = ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13")
GPUS = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


@dataclass(frozen=True)
class Hardware:
    """The machine. `str()` returns its CPUs and GPUs."""

    cpu: str
    cores: int  # CPUs that this process may use
    memory_bytes: int
    system: str  # operating system and its release
    gpus: tuple[str, ...] = ()  # NVIDIA GPUs, each with its memory and driver

    def __str__(self) -> str:
        return ", ".join([f"{self.cores} cores of {self.cpu}", *self.gpus])


def describe_hardware() -> Hardware:
    """Describes the machine that this process runs on."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    try:
        gpus = subprocess.run(GPUS, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):  # no driver, or a broken one
        gpus = []
    return Hardware(
        cpu=model[1] if model else platform.machine(),  # ARM's cpuinfo has no names
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=platform.platform(),
        gpus=tuple("{} ({}, driver {})".format(*line.split(", ")) for line in gpus),
    )


def versions(*distributions: str) -> dict[str, str]:
    """Returns the versions of Python and of those distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
