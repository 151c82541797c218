"""`throughput tune`, run as a user runs it, and its search on made-up rates; how fast things are is for no test to judge."""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import DataConfig
from pipelines.tuned import HW_DECODER_LOAD, PREFETCH
from tests.helpers.runs import ROOT, alone, arguments, finish, start
from tools.throughput.rounds import TurnError
from tools.throughput.search import DEFAULTS, Choice, duel, search
from tools.throughput.tune import values_to_try

SMALL = (
    *("--device", "cpu", "--torch-threads", 1, "--image-size", 32, "--batch-size", 8, "--model.no-aux-logits"),
    *("--seconds", 2, "--rounds", 6),
)
CORES = len(os.sched_getaffinity(0))


def run(command: list[str], *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *command, *map(str, options)], capture_output=True, text=True, check=False, cwd=ROOT
    )


def tune(*options: object) -> subprocess.CompletedProcess[str]:
    return run(["-m", "tools.throughput", "tune"], *options)


def test_table_figures_and_file(tmp_path: Path, shards: Path) -> None:
    file, path = tmp_path / "tuned.json", tmp_path / "report.json"
    done = tune("--data.train", shards, *SMALL, "-o", file, "--json", path, "--plot", tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    report, tuned = json.loads(path.read_text()), json.loads(file.read_text())
    assert (tuned["device"], tuned["gpu"], tuned["cores"], tuned["hw_decoder_load"]) == ("cpu", None, CORES, None)
    assert report["tuned"] == tuned
    assert 2 <= report["step_images"] <= 8
    assert report["torch_threads"] == 1
    what = [result["what"] for result in report["results"]]
    assert what[0] == "the defaults"
    for setting in ("threads", "prefetch"):
        assert any(setting in name for name in what)
    for result in report["results"]:
        assert result["error"] is None
        assert len(result["ratio"]["rounds"]) == len(result["images_per_second"]["rounds"])
        assert re.search(rf"^{re.escape(result['what'])} +\d+ +[\d,.]+ +\(", done.stdout, re.MULTILINE)
    ratio = report["duel"] and report["duel"]["ratio"]
    is_won = ratio is not None and ratio["low"] > 1 and ratio["coverage"] >= 0.95  # a busy machine has time for few rounds
    assert is_won == (tuned["threads"] is not None or tuned["prefetch"] is not None)
    assert (report["verdict"] == "nothing that was tried is faster than the defaults") != is_won
    assert done.stdout.splitlines()[-2] == report["verdict"]
    if report["duel"] is not None:
        before, after, ratio = (report["duel"][name] for name in ("before", "after", "ratio"))
        pairs = zip(after["rounds"], before["rounds"], strict=True)
        assert ratio["rounds"] == pytest.approx([rate / other for rate, other in pairs])
        assert f"after: {report['best']}" in done.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["plot.png", "report.json", "tuned.json"]


# The step computes nothing. A batch lasts as long as is said, less where three are prefetched.
SLOW_SECONDS, FAST_SECONDS = 0.04, 0.01
SLOW = f"""
import time
import tools.throughput.cli, tools.throughput.jobs

def build_loader(config, *arguments, **options):
    if config.prefetch == 4:
        raise RuntimeError("no memory\\nfor so many")
    loader = build(config, *arguments, **options)
    given, seconds = loader.next, {FAST_SECONDS} if config.prefetch == 3 else {SLOW_SECONDS}
    def slow():
        end = time.perf_counter() + seconds
        batch = given()
        time.sleep(max(0, end - time.perf_counter()))
        return batch
    loader.next = slow
    return loader

build, tools.throughput.jobs.build_loader = tools.throughput.jobs.build_loader, build_loader
tools.throughput.jobs.train_step = lambda job, image, target: True
tools.throughput.cli.main()
"""


def test_a_setting_that_is_faster_is_found_and_trained_with(tmp_path: Path, shards: Path) -> None:
    file, path = tmp_path / "tuned.json", tmp_path / "report.json"
    done = run(["-c", SLOW, "tune"], "--data.train", shards, *SMALL, "-o", file, "--json", path)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert json.loads(file.read_text())["prefetch"] == 3
    assert 1 < report["duel"]["ratio"]["low"] <= report["duel"]["ratio"]["median"] < 1.3 * SLOW_SECONDS / FAST_SECONDS
    [failed] = [result for result in report["results"] if result["error"]]
    assert re.fullmatch(r"(threads \d, )?prefetch 4", failed["what"])
    assert failed["error"] == "no memory for so many"
    assert f"{failed['what']:<45}failed: no memory for so many\n" in done.stdout
    log = finish(start([*alone(), *arguments(shards, tmp_path / "run", "--data.tuned", file, "--epochs", 1)], tmp_path))
    assert f"tuned by {file}: " in log
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (data["tuned"], data["prefetch"]) == (str(file), 3)


def fake(speeds: dict[Choice, float], noise: float, seed: int) -> Any:
    """Turns of a machine that others use as well: rates as given, by default 100, times what is drawn for each turn."""
    draw = random.Random(seed)
    return lambda choice: speeds.get(choice, 100.0) * math.exp(draw.gauss(0, noise))


AXES = {"threads": (1, 3, 4), "prefetch": (1, 3, 4, 6)}


def found(speeds: dict[Choice, float], noise: float, seed: int) -> Choice:
    """What a whole search with its duel ends with."""
    turns = fake(speeds, noise, seed)
    best, _ = search(turns, AXES, seconds=60)
    final = None if best == DEFAULTS else duel(turns, best, rounds=9, seconds=60)
    return best if final is not None and final.is_won else DEFAULTS


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.5])
def test_noise_alone_keeps_the_defaults(noise: float) -> None:
    """But for one in fifty, which is what the interval promises."""
    kept = sum(found({}, noise, seed) == DEFAULTS for seed in range(300))
    assert kept == 300 if noise == 0 else kept >= 290


def test_what_is_faster_is_found_in_noise() -> None:
    speeds: dict[Choice, float] = {(("threads", 3),): 115.0, (("threads", 3), ("prefetch", 4)): 140.0}
    winners = [found(speeds, 0.1, seed) for seed in range(100)]
    assert winners.count((("threads", 3), ("prefetch", 4))) >= 80
    assert winners.count(DEFAULTS) <= 2


def test_the_fewer_are_left_the_more_they_are_measured() -> None:
    _, tried = search(fake({(("prefetch", 6),): 200.0, (("prefetch", 1),): 50.0}, 0.0, 0), {"prefetch": (1, 3, 4, 6)}, 60)
    turns = {choice: len(of_choice.rates) for choice, of_choice in tried.items()}
    assert turns[DEFAULTS] == turns[(("prefetch", 6),)] == 2 * turns[(("prefetch", 1),)]


def test_without_time_nothing_is_found() -> None:
    """A round of the first setting is taken; a duel of a round tells nothing, however clear it is."""
    turns = fake({(("threads", 3),): 200.0}, 0.0, 0)
    best, tried = search(turns, AXES, seconds=1e-9)
    assert best in (DEFAULTS, (("threads", 3),))
    assert max(len(of_choice.rates) for of_choice in tried.values()) <= 1
    final = duel(turns, (("threads", 3),), rounds=9, seconds=0)
    assert final is not None
    assert len(final.ratio.rounds) == 1
    assert not final.is_won


def test_what_fails_is_left_out() -> None:
    def turns(choice: Choice) -> float:
        if choice in (DEFAULTS, (("threads", 3),)):
            return 100.0 + 10 * len(choice)
        raise TurnError("no")

    best, tried = search(turns, AXES, seconds=60)
    assert best == (("threads", 3),)
    assert {choice for choice, of_choice in tried.items() if of_choice.error is None} == {DEFAULTS, best}
    assert duel(turns, (("threads", 4),), rounds=6, seconds=60) is None

    def never(choice: Choice) -> float:
        raise TurnError("no shards")

    with pytest.raises(ValueError, match="the defaults cannot be measured: no shards"):
        search(never, AXES, seconds=60)


@pytest.mark.parametrize(
    ("device", "threads", "cores", "expected"),
    [
        ("cpu", 2, 2, (1, 3)),
        ("cpu", 1, 1, ()),
        ("cpu", 8, 64, (2, 4, 12, 16)),
        ("cuda", 16, 64, (4, 8, 24, 32)),
        ("cuda", 16, 16, (4, 8, 24)),
    ],
)
def test_what_is_tried(device: str, threads: int, cores: int, expected: tuple[int, ...]) -> None:
    values = values_to_try(DataConfig(), device, threads, cores)
    assert values.get("threads", ()) == expected
    assert ("hw_decoder_load" in values) == (device == "cuda")
    assert PREFETCH not in values["prefetch"]
    assert HW_DECODER_LOAD not in values.get("hw_decoder_load", ())
    assert list(values)[-1] == "prefetch"
    assert "threads" not in values_to_try(DataConfig(threads=3), device, threads, cores)  # what is given stays


def test_what_is_given_is_neither_searched_nor_lost(tmp_path: Path, shards: Path) -> None:
    file, path = tmp_path / "tuned.json", tmp_path / "report.json"
    options = (
        "--data.train",
        shards,
        *SMALL,
        "--rounds",
        6,
        "-o",
        file,
        "--json",
        path,
        "--data.threads",
        1,
        "--data.prefetch",
        5,
    )
    done = tune(*options)
    assert done.returncode == 0, done.stderr
    assert "the defaults: threads 1, prefetch 5\n" in done.stdout
    report, tuned = json.loads(path.read_text()), json.loads(file.read_text())
    assert (tuned["threads"], tuned["prefetch"]) == (1, 5)
    assert (report["results"], report["duel"]) == ([], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--data.train is needed, the shards to load"),
        (["--data.train", "s", "--data.tuned", "t"], "--data.tuned t: such a file is what is made here"),
        (["--data.train", "s", "--data.backend", "pillow"], "--data.backend pillow: the settings are those of"),
        (["--data.train", "s", "--data.size-schedule", "1:64"], "--data.size-schedule: one size is measured"),
        (["--data.train", "s", "--rounds", 5], "--seconds 75.0 --rounds 5: some time and at least 6 rounds are needed"),
        (["--data.train", "s", "--seconds", 0], "--seconds 0.0 --rounds 9: some time and at least 6 rounds are needed"),
        (["-o", "no/folder/t.json"], "--output no/folder/t.json: there is no folder no/folder; make it first"),
        (["-o", "."], "--output .: this is a folder; name a file in it"),
    ],
)
def test_mistakes(tmp_path: Path, options: list[object], message: str) -> None:
    done = tune("-o", tmp_path / "tuned.json", *options)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "tuned.json").exists()


def test_too_few_samples(tmp_path: Path, shards: Path) -> None:
    done = tune("-o", tmp_path / "tuned.json", "--data.train", shards, "--batch-size", 16)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --data.train {shards}: 64 samples in local shards, 4 batches, are needed; ")
