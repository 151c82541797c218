"""`throughput train`, run as a user runs it, and compared with the verdict of train.py. No test judges what it measures."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT, arguments
from tools.throughput import jobs
from tools.throughput.rounds import TurnError

SMALL = ("--device", "cpu", "--torch-threads", 1, "--image-size", 32, "--batch-size", 8, "--model.no-aux-logits")


def run(command: list[str], *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *command, *map(str, options)], capture_output=True, text=True, check=False, cwd=ROOT
    )


def throughput(*options: object) -> subprocess.CompletedProcess[str]:
    return run(["-m", "tools.throughput", "train"], *options)


def rounds(result: dict[str, Any]) -> list[float]:
    return list(result["images_per_second"]["rounds"])


def test_table_and_figures(tmp_path: Path, shards: Path) -> None:
    path = tmp_path / "report.json"
    done = throughput("--data.train", shards, *SMALL, "--steps", 1, "--rounds", 3, "--data.threads", 1, "--json", path)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert (report["samples"], report["torch_threads"], report["data_threads"]) == (61, 1, 1)
    results = {result["name"]: result for result in report["results"]}
    model, job, loader = (results[name] for name in ("model", "job", "loader"))
    for result in results.values():
        assert result["what"] in done.stdout
        if result["error"] is None:
            pairs = zip(rounds(result), rounds(model), strict=True)
            assert result["ratio"]["rounds"] == pytest.approx([rate / own for rate, own in pairs])
    assert report["prep_stall_percent"]["rounds"] == pytest.approx([100 * (1 - ratio) for ratio in job["ratio"]["rounds"]])
    hand_over = [100 * (1 - ratio) for ratio in results["cached"]["ratio"]["rounds"]]
    assert report["hand_over_stall_percent"]["rounds"] == pytest.approx(hand_over)
    if results["cold"]["error"] is None:
        pairs = zip(rounds(results["cold"]), rounds(job), strict=True)
        assert report["fetch_stall_percent"]["rounds"] == pytest.approx([100 * (1 - cold / warm) for cold, warm in pairs])
    else:  # a file system in memory
        assert report["fetch_stall_percent"] is None
    models = map(max, rounds(model), rounds(results.get("model on all cores", model)))
    loaders = map(max, rounds(loader), rounds(results.get("loader on all cores", loader)))
    allowed = [100 * rate / (1 / (1 / one + 1 / other)) for rate, one, other in zip(rounds(job), models, loaders, strict=True)]
    assert report["of_both_percent"]["rounds"] == pytest.approx(allowed)
    assert done.stdout.splitlines()[-1] == report["verdict"]
    assert bool(report["trials"]) == (report["prep_stall_percent"]["median"] >= 5)
    for trial in report["trials"]:
        assert trial["error"] is None
        is_faster = min(rounds(trial)) > max(rounds(report["trials"][0]))
        assert (f"{trial['name']} makes it" in report["verdict"]) == is_faster


STEP_SECONDS, WAIT_SECONDS = 0.16, 0.08
# The step computes nothing, and takes its time; so does each batch, but for those of smaller images a quarter of it.
SLOW = f"""
import sys, time
import tools.throughput.cli, tools.throughput.jobs, tools.throughput.loops, train

def lasting(seconds, function):
    def slow(*arguments):
        end = time.perf_counter() + seconds
        given = function(*arguments)
        time.sleep(max(0, end - time.perf_counter()))
        return given
    return slow

def train_step(job, image, target):
    job.step += 1
    return True

def build_loader(config, *arguments, **options):
    loader = build(config, *arguments, **options)
    loader.next = lasting({WAIT_SECONDS} / (4 if config.train.endswith("resized") else 1), loader.next)
    return loader

build = train.build_loader
train.build_loader = tools.throughput.jobs.build_loader = build_loader
train.train_step = tools.throughput.loops.train_step = lasting({STEP_SECONDS}, train_step)
"""


def test_train_says_online_what_is_measured_here(tmp_path: Path, shards: Path) -> None:
    """On a loader that is slow by a known amount; and what mends it is found."""
    online = run(["-c", f"{SLOW}\ntrain.main()"], *arguments(shards, tmp_path / "run", "--epochs", 1))
    assert online.returncode == 0, online.stderr
    [percent] = re.findall(r"epoch 1/1  train: .*  data-bound: waits (\d+) % of the time for data\n", online.stdout)
    path = tmp_path / "report.json"
    options = ("train", "--data.train", shards, *SMALL, "--steps", 4, "--rounds", 3, "--json", path)
    measured = run(["-c", f"{SLOW}\ntools.throughput.cli.main()"], *options)
    assert measured.returncode == 0, measured.stderr
    report = json.loads(path.read_text())
    assert float(percent) == pytest.approx(100 * WAIT_SECONDS / (WAIT_SECONDS + STEP_SECONDS), abs=2)
    assert float(percent) == pytest.approx(report["prep_stall_percent"]["median"], abs=2)
    results = {result["name"]: result for result in report["results"]}
    assert results["job"]["wait_percent"]["median"] == pytest.approx(report["prep_stall_percent"]["median"], abs=2)
    loader, model = (f"{statistics.median(rounds(results[name])):,.0f}" for name in ("loader", "model"))
    assert report["verdict"].startswith(f"data-bound by decode: loader {loader} img/s, model {model} img/s; ")
    assert re.search(r"shards convert --resize 37 makes it 1\.[23]\d times as fast", report["verdict"])


def test_files_of_which_the_page_cache_cannot_be_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TurnError, match=r"^the system does not tell whether /proc/version is in the page cache \(.+\)$"):
        jobs.drop_from_page_cache(["/proc/version"])
    monkeypatch.setattr(jobs, "_drop", lambda path: False)
    monkeypatch.setattr(jobs, "DROP_SECONDS", 0)
    with pytest.raises(TurnError, match=r"^x\.tar does not leave the page cache$"):
        jobs.drop_from_page_cache(["x.tar"])
