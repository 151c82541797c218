"""The CPUs that this process may use, and who uses them."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def num_cpus() -> int:
    """Returns the number of CPUs that this process may use: by its affinity, and by the CPU quota of its container.

    A part of a CPU counts as one, because threads that sleep while they wait use all of a quota.
    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _quota())))


def has_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16 arithmetic: AVX512-BF16 or AMX, or BF16 on ARM."""
    flags = {word for line in Path("/proc/cpuinfo").read_text().splitlines() for word in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def cpu_seconds() -> float:
    """Returns the CPU time of this process, of its descendants, and of those that have ended (man 5 proc_pid_stat)."""
    ticks = 0
    for pid in family(os.getpid()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat", "rb") as file:
            # The name in front may contain anything. From field 14 on: user and system time, and those of ended children.
            ticks += sum(map(int, file.read().rpartition(b")")[2].split()[11:15]))
    return ticks / CLOCK_TICKS


def family(pid: int) -> Iterator[int]:
    """Yields a process and all its descendants. Some may have ended already."""
    yield pid
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in _children(f"/proc/{pid}/task/{task}/children"):
                yield from family(child)


def _children(path: str) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(path, "rb") as file:
        return [*map(int, file.read().split())]
    return []


def busy_and_idle() -> tuple[float, float]:
    """Returns the seconds that the CPUs of this process were busy and idle (man 5 proc_stat). Stolen time is busy."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    # user, nice, system, idle, iowait, irq, softirq, steal; guests' time follows, and is part of the user's
    times = [[int(ticks) for ticks in row[1:9]] for row in rows if row[0] in cores]
    idle = sum(row[3] + row[4] for row in times)
    return (sum(map(sum, times)) - idle) / CLOCK_TICKS, idle / CLOCK_TICKS


def _quota() -> float:
    """Returns the cores of the tightest quota of the process's control groups, or infinity (man 7 cgroups)."""
    quotas = [math.inf]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = next((place for place in (CGROUPS / controllers, CGROUPS) if controllers and place.is_dir()), CGROUPS)
        own = root / path.lstrip("/")
        # In a container, the path may be the host's, and its files be at the root.
        quotas += [_quota_of(group) for group in (own, *own.parents) if group.is_relative_to(root)]
    return min(quotas)


def _quota_of(group: Path) -> float:
    try:
        if (group / "cpu.max").exists():  # version 2
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    except OSError:  # this group has no quota
        return math.inf
    return int(quota) / int(period) if quota.strip() not in ("max", "-1") else math.inf
