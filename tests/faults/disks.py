"""Disks that are small, and folders that are read-only even for root. Both need the right to mount."""

import contextlib
import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def _mount(*words: object) -> bool:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, check=False)
    return done.returncode == 0


@functools.cache
def _may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        if not _mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder):
            return False
        subprocess.run(["umount", folder], check=True)
        return True


def require_mounts() -> None:
    """Skips the test where this process may not mount."""
    if not _may_mount():
        pytest.skip("needs the right to mount")


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Mounts an empty disk of this size at a folder, and yields a function that changes its size."""
    assert _mount("-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder)
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True) and None
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Mounts a folder at itself, without the right to write."""
    assert _mount("--bind", folder, folder)
    try:
        assert _mount("-o", "remount,ro,bind", folder)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
