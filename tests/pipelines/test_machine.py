"""The number of CPUs that a process may use."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from pipelines.machine import num_cpus
print(num_cpus())
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group for CPU time of either version, if this process may make one."""
    for root in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")):
        group = root / f"test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            if any((group / name).exists() for name in ("cpu.max", "cpu.cfs_quota_us")):
                yield group
                group.rmdir()
                return
            group.rmdir()
    pytest.skip("this process may not make a control group")


def set_quota(group: Path, percent: int) -> None:
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{1000 * percent} 100000")
    else:
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text(str(1000 * percent))


def test_a_quota_counts_in_whole_cpus(group: Path) -> None:
    """As in a container that was started with --cpus."""
    own = len(os.sched_getaffinity(0))
    for percent, expected in ((50, 1), (100, 1), (130, min(2, own)), (100 * own + 1, own)):
        set_quota(group, percent)
        done = subprocess.run([sys.executable, "-c", SCRIPT, group], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == (f"{expected}\n", ""), percent


def test_affinity_counts() -> None:
    script = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    script += "from pipelines.machine import num_cpus; print(num_cpus())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1\n", "")
