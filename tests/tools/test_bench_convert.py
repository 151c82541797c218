"""`throughput convert`, run as a user runs it; what it measures is for no test to judge."""

import functools
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_tree
from tools.throughput.rounds import TurnError, summarize, take_turns


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tools.throughput", "convert", *map(str, arguments)]


def throughput(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def six_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("throughput") / "images", 6)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, six_images: Path) -> tuple[str, dict[str, Any], Path]:
    """What is printed, what is in the file, and the scratch folder, of two rounds on nine images made from six."""
    folder = tmp_path_factory.mktemp("measured")
    options = ("--images", 9, "--rounds", 2, "--scratch", folder / "scratch", "--json", folder / "report.json")
    done = throughput(six_images, *options, "--only", "tar", "webdataset", "shards", "opencv")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, json.loads((folder / "report.json").read_text()), folder / "scratch"


def test_figures_follow_from_the_turns(measured: tuple[str, dict[str, Any], Path]) -> None:
    _, report, _ = measured
    assert report["settings"]["images"] == 9
    results = {result["name"]: result for result in report["results"]}
    reference = [turn["seconds"] for turn in results["tar"]["turns"]]
    for name in ("tar", "webdataset", "shards"):
        result = results[name]
        seconds = [turn["seconds"] for turn in result["turns"]]
        assert len(seconds) == 2
        assert result["images_per_second"]["rounds"] == pytest.approx([9 / each for each in seconds])
        assert result["images_per_second"]["median"] == pytest.approx(statistics.median(9 / each for each in seconds))
        assert result["ratio"]["rounds"] == pytest.approx([a / b for a, b in zip(reference, seconds, strict=True)])
        assert result["output_bytes"] > report["image_bytes"]
        assert result["peak_memory_bytes"] == max(turn["peak_memory_bytes"] for turn in result["turns"]) > 0
        if name != "tar":
            assert all(turn["seconds_without_start_up"] < turn["seconds"] for turn in result["turns"])
    assert results["tar"]["ratio"]["rounds"] == [1, 1]
    assert results["tar"]["images_per_second_without_start_up"] is None
    assert report["hardware"]["cores"] >= 1
    assert {"python", "webdataset", "pillow"} <= set(report["versions"])


def test_table(measured: tuple[str, dict[str, Any], Path]) -> None:
    printed, report, scratch = measured
    lines = printed.splitlines()
    assert lines[0].startswith("9 images, ")
    assert lines[2].split("  ")[0] == "copied"
    by_name = {result["what"]: result for result in report["results"]}
    for line in lines[3:6]:
        [result] = [result for what, result in by_name.items() if line.startswith(what)]
        assert f"{result['images_per_second']['median']:,.0f} (" in line
    if not report["results"][-1]["installed"]:
        assert lines[-1] == "OpenCV, webdataset ShardWriter, all cores  not installed"
    assert list(scratch.iterdir()) == []


def test_floor_counts_its_own_seconds(tmp_path: Path, six_images: Path) -> None:
    done = throughput(six_images, "--rounds", 1, "--only", "decode", "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    [result] = json.loads((tmp_path / "report.json").read_text())["results"]
    [turn] = result["turns"]
    assert result["images_per_second"] is None
    assert result["images_per_second_without_start_up"]["median"] == pytest.approx(6 / turn["seconds_without_start_up"])


def test_a_competitor_that_fails_does_not_stop_the_others(tmp_path: Path, six_images: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(six_images, folder)
    (folder / "ant" / "no_image.jpg").write_text("text")
    done = throughput(folder, "--rounds", 2, "--only", "pillow-1", "tar", "--scratch", tmp_path / "scratch")
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("Pillow, webdataset ShardWriter, 1 process")]
    assert len(failed) == 1
    assert "failed: PIL.UnidentifiedImageError: cannot identify image file" in failed[0]
    assert any(line.startswith("tar cf") and "1.00 (1.00-1.00)" in line for line in done.stdout.splitlines())
    assert list((tmp_path / "scratch").iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, six_images: Path) -> None:
    arguments = command(six_images, "--only", "webdataset", "--scratch", tmp_path)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not any((folder / "out").exists() for folder in tmp_path.iterdir()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate()
    assert (process.returncode, printed, errors) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/nowhere"], "nowhere: no images in class folders; SRC/CLASS/IMAGE is the layout needed"),
        (["{1}", "--rounds", "0"], "--rounds 0: at least 1 is needed"),
        (["{1}", "--only", "zip"], "--only zip: no such competitor; there are copied, checked, resized, tar, cp, shards, "),
        (["{1}", "--peers-python", "/bin/false"], "--peers-python /bin/false: not a Python interpreter"),
        (["{1}", "--json", "{0}/no/report.json"], "no/report.json: there is no folder {0}/no; make it first"),
        (["{1}", "--images", "1000000000000"], "GB needed; name another folder with --scratch, or fewer --images"),
    ],
)
def test_wrong_input_gets_one_clear_line(tmp_path: Path, six_images: Path, arguments: list[str], message: str) -> None:
    done = throughput(*[argument.format(tmp_path, six_images) for argument in arguments])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message.format(tmp_path) in done.stderr


def test_each_round_begins_with_another_competitor() -> None:
    order: list[str] = []

    def turn(name: str) -> str:
        order.append(name)
        if name == "b" and order.count("b") == 2:
            raise TurnError("tired")
        return name

    outcomes = take_turns({name: functools.partial(turn, name) for name in "ab"}, 3)
    assert order == ["a", "b", "b", "a", "a"]
    assert (outcomes["b"].turns, outcomes["b"].error) == (("b",), "tired")


def test_interval_says_what_it_is_worth() -> None:
    assert summarize([3, 1, 2, 5, 4]).coverage == 0.9375
    nine = summarize([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert (nine.median, nine.low, nine.high) == (5, 2, 8)
    assert 0.95 <= nine.coverage < 0.97
