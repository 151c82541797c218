"""`tools.bench.convert`, run as a developer runs it. No test judges what it measures."""

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import write_tree
from tools.bench import peer_writers
from tools.throughput.peer_loaders import read_bytes


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tools.bench.convert", *map(str, arguments)]


@pytest.fixture(scope="module")
def six_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images, and a file that no program can decode."""
    folder = write_tree(tmp_path_factory.mktemp("throughput") / "images", 6)
    (folder / "ant" / "no_image.jpg").write_text("text")
    return folder


def test_figures_follow_from_the_turns(tmp_path: Path, six_images: Path) -> None:
    """Two rounds on nine files made from seven, one of which makes a competitor fail."""
    options = ("--images", 9, "--rounds", 2, "--scratch", tmp_path / "scratch", "--json", tmp_path / "report.json")
    only = ("tar", "webdataset", "shards", "opencv", "pillow-1", "decode")
    done = subprocess.run(command(six_images, *options, "--only", *only), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert list((tmp_path / "scratch").iterdir()) == []
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 9
    results = {result["name"]: result for result in report["results"]}
    baseline = [turn["seconds"] for turn in results["tar"]["turns"]]
    for name in ("tar", "webdataset", "shards"):
        result = results[name]
        seconds = [turn["seconds"] for turn in result["turns"]]
        assert len(seconds) == 2
        assert result["images_per_second"]["rounds"] == pytest.approx([9 / each for each in seconds])
        assert result["images_per_second"]["median"] == pytest.approx(statistics.median(9 / each for each in seconds))
        assert result["ratio"]["rounds"] == pytest.approx([a / b for a, b in zip(baseline, seconds, strict=True)])
        assert result["output_bytes"] > report["image_bytes"]
        assert result["peak_memory_bytes"] == max(turn["peak_memory_bytes"] for turn in result["turns"])
        assert result["peak_memory_bytes"] > 0
        if name != "tar":
            assert all(turn["seconds_without_start_up"] < turn["seconds"] for turn in result["turns"])
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"{result['what']}  ")]
        assert f"{result['images_per_second']['median']:,.0f} (" in line
    assert results["tar"]["ratio"]["rounds"] == [1, 1]
    assert results["tar"]["images_per_second_without_start_up"] is None
    bound = results["decode"]
    own = [turn["seconds_without_start_up"] for turn in bound["turns"]]
    assert bound["images_per_second"] is bound["ratio"] is None
    assert bound["images_per_second_without_start_up"]["rounds"] == pytest.approx([9 / each for each in own])
    assert done.stdout.startswith("9 images, ")
    assert "failed: PIL.UnidentifiedImageError: cannot identify image file" in done.stdout
    if not results["opencv"]["is_installed"]:
        assert f"\n{results['opencv']['what']}  not installed\n" in done.stdout
    assert {"python", "webdataset", "pillow"} <= set(report["versions"])


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


def test_images_that_img2dataset_left_out_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(table: str, *, output_folder: str, **options: object) -> None:
        for number in range(2):
            report = {"successes": 3, "status_dict": {"success": 3, "HTTP Error 404": 1}}
            (Path(output_folder) / f"{number}_stats.json").write_text(json.dumps(report))

    (tmp_path / "shards").mkdir()
    monkeypatch.setitem(sys.modules, "img2dataset", SimpleNamespace(download=download))
    with pytest.raises(RuntimeError, match=r"^img2dataset wrote 6 of 8 images: 6 success, 2 HTTP Error 404$"):
        peer_writers.img2dataset([("/x.jpg", 0)] * 8, str(tmp_path), 1, read_bytes)
