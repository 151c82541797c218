"""`throughput scale`, run as a user runs it; what it measures is for no test to judge."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.shards.index import scan_tar
from pipelines.shards.shard_set import open_shards
from tools.bench.linked import LinkedShards, small

FEW = ("--batch-size", 4, "--image-size", 32, "--base-shards", 6, "--base-samples", 600, "--seconds", 0.01, "--rounds", 1)
PNG = b"\x89PNG"


def scale(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "tools.throughput", "scale", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def measured(folder: Path, *options: object) -> tuple[str, list[dict[str, Any]]]:
    """The table and the results."""
    scratch = folder / "scratch"
    done = scale(*FEW, *options, "--scratch", scratch, "--json", folder / "report.json", "--plot", folder / "report.png")
    assert done.returncode == 0, done.stderr
    assert list(scratch.iterdir()) == []
    assert (folder / "report.png").read_bytes().startswith(PNG)
    return done.stdout, json.loads((folder / "report.json").read_text())["results"]


def points(results: list[dict[str, Any]], *names: str) -> list[tuple[object, ...]]:
    return [tuple(result["point"][name] for name in names) for result in results]


def test_shards_samples_and_ranks(tmp_path: Path) -> None:
    options = ("--shards", 3, 150, "--samples", 60, 601, "--ranks", 1, 2)
    table, results = measured(tmp_path, "--axes", "shards", "samples", "ranks", *options)
    assert points(results, "axis", "value", "shards", "samples", "ranks") == [
        ("shards", 3, 3, 600, 1),
        ("shards", 150, 150, 600, 1),
        ("samples", 60, 6, 60, 1),
        ("samples", 601, 6, 601, 1),
        ("ranks", 1, 6, 600, 1),
        ("ranks", 2, 6, 600, 2),
    ]
    for result in results:
        for name in ("imports_seconds", "open_seconds", "first_seconds", "images_per_second"):
            assert result[name]["median"] > 0
        parts = result["open_seconds"]["median"] + result["first_seconds"]["median"]
        if result["point"]["ranks"] == 1:  # of several it is the slowest one's
            assert result["start_seconds"]["median"] == pytest.approx(parts)
        assert result["batch_bytes"] == 4 * 3 * 32 * 32 * 4
        assert result["beyond_batches_bytes"] == result["peak_memory_bytes"] - 2 * result["batch_bytes"]
        assert result["beyond_batches_bytes"] > 0
        assert f"{result['point']['value']:>12,}" in table
    few, many = (result["open_files"] for result in results[:2])
    assert few < many < few + 150  # each of the 150 is a shard of its own, and not all of them are open at once


def test_threads_and_sizes_of_given_shards(tmp_path: Path, shards: Path) -> None:
    options = ("--threads", 1, 2, "--sizes", 32, 64, "--data", f"{shards}/train-*.tar")
    table, results = measured(tmp_path, "--axes", "threads", "sizes", *options)
    assert points(results, "axis", "threads", "image_size")[:2] == [("threads", 1, 32), ("threads", 2, 32)]
    assert points(results, "axis", "image_size")[2:] == [("sizes", 32), ("sizes", 64)]
    assert [result["batch_bytes"] for result in results[2:]] == [4 * 3 * 32 * 32 * 4, 4 * 3 * 64 * 64 * 4]
    assert "batches of 4 x 32 pixels" in table


def test_a_bucket(tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    _, results = measured(tmp_path, "--axes", "bucket", "--bucket-shards", 3, 40, "--latency", 1)
    assert points(results, "axis", "value", "shards", "samples") == [("bucket", 3, 3, 600), ("bucket", 40, 40, 600)]
    assert all(result["error"] is None for result in results)


def test_made_up_shards(tmp_path: Path) -> None:
    """Many names for a few tars: the indices list so many samples, and are those of their tars."""
    made = LinkedShards(tmp_path / "made", small)
    folder = made.make(10, 1234)
    assert made.make(10, 1234) == folder
    found = open_shards(str(folder), "train")
    assert (len(found.tars), found.num_samples, set(found.lengths)) == (10, 1234, {123, 124})
    assert found.indices[0].read_text().splitlines()[1].split()[1] == str(scan_tar(found.tars[0])[0][0].offset)
    assert sum(file.stat().st_size for file in (tmp_path / "made").glob("*.tar")) < 2_000_000


def test_one_point_fails_and_the_others_do_not(tmp_path: Path) -> None:
    done = scale(*FEW, "--axes", "ranks", "--ranks", 1, 2, "--base-samples", 6, "--json", tmp_path / "report.json")
    assert done.returncode == 1, done.stderr
    good, bad = json.loads((tmp_path / "report.json").read_text())["results"]
    assert (good["error"], good["images_per_second"]["median"] > 0) == (None, True)
    assert "6 training samples over 2 rank(s) do not fill one batch of 4" in bad["error"]
    assert f"failed: {bad['error']}" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", 0, 10], "--shards 0 10: numbers from 1 on are needed"),
        (["--axes", "bucket", "--bucket-shards", 0], "--bucket-shards 0: numbers from 1 on are needed"),
        (["--base-samples", 0], "--base-samples 0: at least 1 is needed"),
        (["--rounds", 0], "--rounds 0: at least 1 is needed"),
        (["--seconds", 0], "--seconds 0 --latency 30: more than 0 is needed, and no less than 0"),
        (
            ["--axes", "shards", "--shards", 10, 100, "--base-samples", 50],
            "axis shards at 100: 50 samples are not one for each of 100 shards; lower --shards, --bucket-shards or "
            "--base-shards, or raise --samples or --base-samples",
        ),
        (["--data", "nowhere", "--axes", "sizes"], "no such shard: 'nowhere'; looked from {here}"),
    ],
)
def test_mistakes(options: list[object], message: str) -> None:
    done = scale(*options)
    assert (done.returncode, done.stderr) == (2, f"error: {message.format(here=Path.cwd())}\n")
