"""`tools.bench.scale`, run as a developer runs it. No test judges what it measures."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.shards.index import scan_tar
from pipelines.shards.shard_set import open_shards
from tools.bench import start
from tools.bench.linked import LinkedShards, small

FEW = ("--batch-size", 4, "--image-size", 32, "--base-shards", 6, "--base-samples", 600, "--seconds", 0.01, "--rounds", 1)


def test_table_and_figures(tmp_path: Path, shards: Path) -> None:
    """A point or two of every axis; one point has too few samples, and the others go on."""
    axes = ["shards", "samples", "ranks", "threads", "sizes"]
    if importlib.util.find_spec("s3fs"):
        axes.append("bucket")
    command = [sys.executable, "-W", "error", "-m", "tools.bench.scale", *FEW, "--axes", *axes, "--latency", 1]
    command += ["--shards", 3, 150, "--samples", 6, "--ranks", 1, 2, "--threads", 1, "--sizes", 32, 64, "--bucket-shards", 40]
    command += ["--data", f"{shards}/train-*.tar", "--scratch", tmp_path / "scratch", "--json", tmp_path / "report.json"]
    command += ["--batch-size", 8]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert list((tmp_path / "scratch").iterdir()) == []
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    by_point = {(result["point"]["axis"], result["point"]["value"]): result for result in results}
    names = ("shards", "samples", "ranks", "threads", "image_size")
    found = {key: tuple(result["point"][name] for name in names) for key, result in by_point.items() if key[0] != "shards"}
    cores = by_point["sizes", 32]["point"]["threads"]
    assert found == {
        ("samples", 6): (6, 6, 1, cores, 32),
        ("ranks", 1): (6, 600, 1, 1, 32),
        ("ranks", 2): (6, 600, 2, 1, 32),
        ("threads", 1): (6, 600, 1, 1, 32),
        ("sizes", 32): (6, 600, 1, cores, 32),
        ("sizes", 64): (6, 600, 1, cores, 64),
        **({("bucket", 40): (40, 600, 1, cores, 32)} if "bucket" in axes else {}),
    }
    bad = by_point.pop(("samples", 6))
    assert "6 training samples cannot fill one batch of 8" in bad["error"]
    assert f"failed: {bad['error']}" in done.stdout
    for (axis, value), result in by_point.items():
        assert result["error"] is None
        for name in ("imports_seconds", "open_seconds", "first_seconds", "images_per_second"):
            assert result[name]["median"] > 0
        parts = result["open_seconds"]["median"] + result["first_seconds"]["median"]
        if (axis, value) != ("ranks", 2):  # of several it is the slowest one's
            assert result["start_seconds"]["median"] == pytest.approx(parts)
        side = result["point"]["image_size"]
        assert result["batch_bytes"] == 8 * 3 * side * side * 4
        assert result["beyond_batches_bytes"] == result["peak_memory_bytes"] - 2 * result["batch_bytes"] > 0
        assert f"\n{value:,}  " in done.stdout
    few, many = (by_point["shards", value]["open_files"] for value in (3, 150))
    assert few < many < few + 150  # each of the 150 is a shard of its own, and not all of them are open at once


def test_made_up_shards(tmp_path: Path) -> None:
    """Many names for a few tars: the indices list so many samples, and are those of their tars."""
    made = LinkedShards(tmp_path / "made", small)
    folder = made.make(10, 1234)
    assert made.make(10, 1234) == folder
    found = open_shards(str(folder), "train")
    assert (len(found.tars), found.num_samples, set(found.lengths)) == (10, 1234, {123, 124})
    assert found.indices[0].read_text().splitlines()[1].split()[1] == str(scan_tar(found.tars[0])[0][0].offset)
    assert sum(file.stat().st_size for file in (tmp_path / "made").glob("*.tar")) < 2_000_000


def test_a_rank_that_never_comes_is_not_awaited_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "MEETING_SECONDS", 0.1)
    with pytest.raises(TimeoutError, match=r"^after 0 s not all of the 2 ranks have a batch$"):
        start._meet(tmp_path, "0", 2)
