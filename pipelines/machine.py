"""The CPUs that this process may use."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def num_cpus() -> int:
    """Returns the number of CPUs that this process may use: by its affinity, and by the CPU quota of its container.

    A part of a CPU counts as one, because threads that sleep while they wait use all of a quota.
    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _quota())))


def has_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16 arithmetic: AVX512-BF16 or AMX, or BF16 on ARM."""
    flags = {word for line in Path("/proc/cpuinfo").read_text().splitlines() for word in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


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
