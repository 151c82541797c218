"""Unpacked files of a source: whole or not there, whatever a killed process left, and with several writers at once."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT
from tools.shards.sources.scratch import unpacked_path, write_unpacked

KILLED = """
import os, sys
from pathlib import Path
from tools.shards.sources.scratch import write_unpacked
def parts():
    yield b"x" * 100_000
    os.kill(os.getpid(), 9)
write_unpacked(Path(sys.argv[1]), parts)
"""


def test_the_next_run_uses_what_a_killed_one_left(tmp_path: Path) -> None:
    target = tmp_path / "x.tar"
    done = subprocess.run([sys.executable, "-c", KILLED, target], cwd=ROOT, check=False)
    [left] = tmp_path.iterdir()
    assert (done.returncode, left.stat().st_size >= 90_000) == (-9, True)
    write_unpacked(target, lambda: [b"ab", b"cd"])  # shorter than what was left
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.tar", b"abcd")]


def test_two_may_write_one_file_at_once(tmp_path: Path) -> None:
    target = tmp_path / "x.tar"

    def parts() -> Iterator[bytes]:
        yield b"ab"
        write_unpacked(target, lambda: [b"ab", b"cd"])  # another process, which ends earlier
        assert target.read_bytes() == b"abcd"
        yield b"cd"

    write_unpacked(target, parts)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.tar", b"abcd")]


def test_an_error_of_the_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"ab"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/x\.tar'"):
        write_unpacked(tmp_path / "x.tar", parts)
    assert not list(tmp_path.iterdir())


def test_the_name_tells_states_and_options_apart(tmp_path: Path) -> None:
    source = tmp_path / "x.parquet"
    names = set()
    for content in (b"1", b"12"):
        source.write_bytes(content)
        names |= {unpacked_path(tmp_path, source, label).name for label in ("label", "other")}
    assert len(names) == 4
