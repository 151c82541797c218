"""Inputs that nobody would write: mutated tars and images, and values drawn by hypothesis."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.conftest import write_tree
from tests.faults import input_work, survive
from tests.faults.campaign import LONG, SEED, Outcomes, keep, record, seeds, size
from tests.faults.mutate import mutate_tar
from tests.faults.properties import PROPERTIES
from tests.faults.survive import Progress, Survivor
from tests.faults.valid import examples
from tests.helpers.runs import ROOT

INFO_KEYS = ("classes", "splits", "train", "filenames", "shard_lengths", "num_samples", "a", "b")
MOST_MEGABYTES = 2500  # of a process; torch, DALI and the decoders take about 700


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 JPEGs of different pictures and shapes."""
    return write_tree(tmp_path_factory.mktemp("photos"), 48)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def campaign(kind: str, count: int, photos: Path, folder: Path) -> Survivor:
    survivor = Survivor(input_work.WORK[kind], folder / "children", {"images": str(photos)})
    survivor.run(seeds(count))
    return survivor


def die_hang_and_fail(folder: str, arguments: str, seeds: Sequence[int], progress: str) -> None:
    """Dies at seed 3, raises an error at 8, and hangs at 12, which is a batch of its own."""
    tell = Progress(progress)
    for start in range(0, len(seeds), 4):
        batch = seeds[start : start + 4]
        tell.begin(batch, "work")
        if 3 in batch:
            os.kill(os.getpid(), signal.SIGSEGV)
        if 8 in batch:
            raise KeyError(8)
        if 12 in batch:
            time.sleep(600)
        for seed in batch:
            tell.happened(seed, "good")


def test_a_process_that_ends_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed at fault is found among those of a batch, and all others are tried."""
    monkeypatch.setattr(survive, "HANG_SECONDS", 5.0)
    survivor = Survivor(die_hang_and_fail, tmp_path, {})
    survivor.run(range(13))
    assert survivor.culprits == [(3, "died by signal 11"), (8, "failed: KeyError: 8"), (12, "hung in work")]
    assert survivor.outcomes["good"] == 10


def check_memory(survivor: Survivor) -> None:
    if survivor.megabytes > MOST_MEGABYTES:
        first, last = survivor.largest_after
        survivor.outcomes.fail("memory", f"{survivor.megabytes} MB at one of the seeds {first} to {last}")


def test_mutated_tars(photos: Path, tmp_path: Path) -> None:
    """Through index, convert, verify and the loader."""
    survivor = campaign("tars", count := size(300, 100_000), photos, tmp_path)
    base = input_work.originals(str(photos), 8)
    for seed, how in survivor.culprits[:100]:
        keep(f"tar-{seed}-{how[:40].replace(' ', '-').replace('/', '_')}.tar", mutate_tar(base[seed % 8], seed).content)
    check_memory(survivor)
    survivor.outcomes.finish("input", "mutated tars", inputs=count, megabytes=survivor.megabytes)


def test_mutated_images(photos: Path, tmp_path: Path) -> None:
    """JPEG, PNG, WebP, BMP, TIFF, JPEG 2000 and PNM through convert, verify and the loader, beside good images."""
    survivor = campaign("images", count := size(200, 20_000), photos, tmp_path)
    pictures = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))[:40]]
    for seed, how in survivor.culprits[:100]:
        extension, content, _ = input_work._mutated_image(pictures, seed)
        keep(f"image-{seed}-{how[:40].replace(' ', '-').replace('/', '_')}.{extension}", content)
    check_memory(survivor)
    survivor.outcomes.finish("input", "mutated images", inputs=count, megabytes=survivor.megabytes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(INFO_KEYS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


def contents(name: str) -> "st.SearchStrategy[bytes]":
    """Bytes of any kind, and valid contents with some bytes replaced, removed or inserted."""
    spliced = st.builds(
        lambda valid, at, length, new: valid[: at % (len(valid) + 1)] + new + valid[at % (len(valid) + 1) + length :],
        st.sampled_from(examples(name)),
        st.integers(0, 10**5),
        st.sampled_from((0, 1, 2, 8, 512)),
        st.binary(max_size=16)
        | st.sampled_from((b"\xff" * 12, bytes(512), b"9" * 30, b"-1", b"\x80" + bytes(11), "٣é\u2028".encode())),
    )
    kinds = spliced | st.binary(max_size=1500)
    return kinds | JSON.map(lambda value: json.dumps(value).encode()) if name in ("info", "label") else kinds


@pytest.mark.parametrize("name", PROPERTIES)
def test_any_bytes(name: str) -> None:
    """The reader returns, or raises a ValueError of one line; see tests/faults/properties.py."""
    count = size(500, 20_000)
    check = hypothesis.settings(
        max_examples=count, database=None, deadline=None, derandomize=SEED == 0, suppress_health_check=[*hypothesis.HealthCheck]
    )(hypothesis.given(contents(name))(PROPERTIES[name]))
    check()
    record("input", f"hypothesis: {name}", {"held": count})


@pytest.mark.skipif(not LONG, reason="takes minutes")
@pytest.mark.parametrize("name", PROPERTIES)
def test_coverage_guided(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install -e '.[faults]'")
    runs = int(os.environ.get("FUZZ_RUNS", "200000"))
    command = [sys.executable, "-m", "tests.faults.fuzz", name, tmp_path / "corpus", f"-runs={runs}", f"-seed={SEED + 1}"]
    limits = ["-timeout=20", "-rss_limit_mb=2500", "-max_len=20000", "-max_total_time=600", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run([*command, *limits], capture_output=True, text=True, check=False, cwd=ROOT)
    outcomes = Outcomes()
    found = [path for kind in ("crash", "timeout", "oom", "leak") for path in tmp_path.glob(f"{kind}-*")]
    for path in found:
        outcomes.fail(path.name.partition("-")[0], f"{keep(f'{name}-{path.name}', path.read_bytes())}: {done.stderr[-1500:]}")
    counted = re.findall(r"#(\d+)\s", done.stderr)
    if done.returncode and not found:
        outcomes.fail("failed", done.stderr[-1500:])
    outcomes["held"] += max(map(int, counted), default=0)
    outcomes.finish("input", f"atheris: {name}")
