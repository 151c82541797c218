"""The `report` command: pages and pictures of runs in every state."""

import base64
import importlib.util
import json
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command import Done, run_main
from tools.report import cli

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, lines: list[dict[str, Any]], **settings: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"data": {"train": "shards/mine", "crop": {"scale": [0.5, 1.0]}}, "epochs": 2, "run_dir": str(folder)}
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def train_line(epoch: int, step: int, **more: object) -> dict[str, object]:
    """A line of a current run on a GPU."""
    loss = 4.0 - step / 100
    return {
        "split": "train",
        "epoch": epoch,
        "step": step,
        "loss": loss,
        "main_loss": loss / 2,
        "aux2_loss": loss,
        "aux1_loss": 1,
        "lr": 0.05 / step,
        "gradient_norm": 1.5,
        "scale": 1.0,
        "skipped_steps": 0,
        "images_per_second": 1000.0 + step,
        "data_wait_percent": 0.5,
        "gpu_memory_gigabytes": 7.25,
        "bad_samples": 0,
        **more,
    }


def valid_line(epoch: int, step: int, top1: float, loss: float) -> dict[str, object]:
    scores = {"top1": top1, "top5": top1 + 10, "ema_top1": top1 + 1, "ema_top5": top1 + 11}
    return {"split": "valid", "epoch": epoch, "step": step, **scores, "loss": loss, "bad_samples": 0}


def old_line(line: dict[str, object]) -> dict[str, object]:
    """The line as an older version wrote it, without the losses of the heads and the gradient norm."""
    train = ("loss", "lr", "images_per_second", "data_wait_percent", "step")
    kept = train if line["split"] == "train" else ("top1", "top5", "ema_top1", "ema_top5", "loss")
    return {name: line[name] for name in ("split", "epoch", *kept)}


WHOLE = [
    *(train_line(1, 20), train_line(1, 40), valid_line(1, 40, 71.5, 0.9)),
    *(train_line(2, 60), train_line(2, 80), valid_line(2, 80, 70.25, 1.125)),
]


def report(*arguments: object) -> Done:
    return run_main(cli.main, *arguments)


class Page(HTMLParser):
    """The tables, charts and external links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, dict[str, list[list[str]]]] = {}  # name, thead or tbody, rows of cells
        self.charts: dict[str, ElementTree.Element] = {}
        self.loaded: list[str] = []
        self._text = ""
        self.feed(path.read_text("ascii"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.loaded += [attributes[name] for name in ("src", "href") if not attributes.get(name, "data:").startswith("data:")]
        if tag == "table":
            self._table = self.tables[attributes["id"]] = {}
        elif tag in ("thead", "tbody"):
            self._rows = self._table[tag] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._text, self._span = "", int(attributes.get("colspan", 1))
        elif tag == "img":
            kind, data = attributes["src"].split(",")
            assert kind == "data:image/svg+xml;base64"
            self.charts[attributes["alt"]] = ElementTree.fromstring(base64.b64decode(data))

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._rows[-1] += [self._text] * self._span

    def column(self, table: str, heading: str) -> list[str]:
        """Returns the cells of a column. Headings of several rows are joined."""
        headings = [" ".join(filter(None, cells)) for cells in zip(*self.tables[table]["thead"], strict=True)]
        return [row[headings.index(heading)] for row in self.tables[table]["tbody"]]

    def headings(self, table: str) -> list[str]:
        return self.tables[table]["thead"][-1]


def points(chart: ElementTree.Element) -> list[int]:
    """Counts the points of each line of a chart. Lines of axes, ticks and legends have at most two and are left out."""
    numbers = []
    for path in chart.iter("{http://www.w3.org/2000/svg}path"):
        commands = [word for word in path.get("d", "").split() if word in "MLCQZz"]
        if set(commands) <= {"M", "L"} and "fill: none" in path.get("style", ""):
            numbers.append(len(commands))
    return sorted(number for number in numbers if number > 2)


def test_usage() -> None:
    done = report("--help")
    assert (done.status, done.stdout.split("\n")[0]) == (0, "usage: report [-h] RUN [RUN ...] [-o FILE]")


def test_page_of_one_run(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "tools.report", str(write_run(tmp_path / "run", WHOLE))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'run' / 'report.html'}: 1 run, ")
    page = Page(tmp_path / "run" / "report.html")
    assert page.loaded == []
    assert "mean recall, EMA (%)" not in page.tables["results"]["thead"][0]  # a run of an earlier version
    for group, final, best in (
        ("top-1, EMA (%)", "71.25", "72.50 (epoch 1)"),
        ("top-1, raw (%)", "70.25", "71.50 (epoch 1)"),
        ("top-5, EMA (%)", "81.25", "82.50 (epoch 1)"),
        ("top-5, raw (%)", "80.25", "81.50 (epoch 1)"),
        ("validation loss (nats)", "1.1250", "0.9000 (epoch 1)"),
    ):
        assert page.column("results", f"{group} final") == [final]
        assert page.column("results", f"{group} best") == [best]
    assert page.column("results", "median images/s") == ["1,050.0"]
    for heading, cell in (
        *(("run", "run"), ("state", "finished"), ("epoch", "2 of 2"), ("step", "80"), ("training loss", "3.2000")),
        *(("gradient norm", "1.5"), ("learning rate", "0.000625"), ("GPU memory (GB)", "7.25"), ("skipped steps", "0")),
    ):
        assert page.column("state", heading) == [cell]
    assert list(page.charts) == [
        *("Training loss, all heads", "Validation loss", "Learning rate"),
        *("Training loss, main head", "Training loss, auxiliary head 2", "Training loss, auxiliary head 1"),
        *("Top-1 accuracy", "Top-5 accuracy", "Gradient norm", "Throughput", "Data wait", "GPU memory"),
    ]
    assert points(page.charts["Training loss, all heads"]) == [4]
    assert "differing" not in page.tables
    assert ["data.crop.scale", "[0.5, 1.0]"] in page.tables["settings"]["tbody"]
    assert [file.name for file in sorted((tmp_path / "run").iterdir())] == ["config.json", "metrics.jsonl", "report.html"]


def test_old_new_and_unfinished_runs(tmp_path: Path) -> None:
    """Names are as long as they must be to differ, missing values show as "-", and an incomplete line is ignored."""
    new = write_run(tmp_path / "a" / "<run> & $x$", [*WHOLE[:3], train_line(2, 60, skipped_steps=3, bad_samples=2)], seed=1)
    old = write_run(tmp_path / "b" / "<run> & $x$", [old_line(line) for line in WHOLE], seed=0)
    with open(new / "metrics.jsonl", "a") as file:
        file.write('{"split": "train", "epoch": 2, "st')
    output = tmp_path / "both.html"
    done = report(new, old, new, "-o", output)
    assert done.status == 0, done.stderr
    page = Page(output)
    assert page.column("state", "run") == ["a/<run> & $x$", "b/<run> & $x$"]
    assert page.column("state", "state") == ["not finished", "finished"]
    assert page.column("state", "epoch") == ["2 of 2", "2 of 2"]
    assert page.column("state", "step") == ["60", "80"]
    assert page.column("state", "skipped steps") == ["3", "-"]
    assert page.column("results", "top-1, raw (%) final") == ["71.50", "70.25"]
    assert page.column("results", "validation loss (nats) best") == ["0.9000 (epoch 1)", "0.9000 (epoch 1)"]
    assert page.tables["differing"]["tbody"] == [["seed", "1", "0"]]
    assert {"Skipped steps", "Bad samples"} <= set(page.charts)
    assert "Loss scale" not in page.charts
    assert points(page.charts["Training loss, all heads"]) == [3, 4]


def test_old_run_shows_only_what_it_has(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [old_line(line) for line in WHOLE])
    assert report(run).status == 0
    page = Page(run / "report.html")
    assert list(page.charts) == [
        *("Training loss, all heads", "Validation loss", "Learning rate", "Top-1 accuracy", "Top-5 accuracy"),
        *("Throughput", "Data wait"),
    ]
    assert not {"gradient norm", "GPU memory (GB)", "loss scale", "skipped steps"} & set(page.headings("state"))


def test_recall_of_the_classes(tmp_path: Path) -> None:
    """The worst classes come first, whichever run has them. Runs without recall, and classes without samples, are left out."""

    def run(name: str, recall: list[list[float | None]], classes: list[str] | None) -> Path:
        lines = [
            valid_line(epoch, 20 * epoch, 50 - epoch, 1) | {"ema_recall": values} for epoch, values in enumerate(recall, 1)
        ]
        return write_run(tmp_path / name, [train_line(1, 20), *lines], classes=classes)

    names = [f"class {i}" for i in range(58)]
    many = run("many", [[99.0] * 60, [30.0 + i for i in range(58)] + [None, None]], names)
    few = run("few", [[60, 10.5, 55, 70]], ["class 1", "class 0", "class 7", "class 7"])
    old = write_run(tmp_path / "old", WHOLE)
    assert report(old, many, few, "-o", tmp_path / "all.html").status == 0
    page = Page(tmp_path / "all.html")
    assert page.tables["recall"]["thead"] == [
        ["", "many", "many", "few", "few"],
        ["class", "final (epoch 2)", "best.pt (epoch 1)", "final (epoch 1)", "best.pt (epoch 1)"],
    ]
    rows = page.tables["recall"]["tbody"]
    assert rows[:3] == [
        ["class 0", "30.00", "99.00", "10.50", "10.50"],
        ["class 1", "31.00", "99.00", "60.00", "60.00"],
        ["class 2", "32.00", "99.00", "-", "-"],
    ]
    assert ["class 7 (2)", "-", "-", "55.00", "55.00"] in rows  # two classes of one name
    assert len(rows) == 50
    assert "The table has the 50 of 60 classes with the lowest." in (tmp_path / "all.html").read_text()
    assert "classes" not in page.column("settings", "setting")
    assert report(old, "-o", tmp_path / "old.html").status == 0
    assert "recall" not in Page(tmp_path / "old.html").tables
    assert report(few, "-o", tmp_path / "few.html").status == 0
    assert [row[0] for row in Page(tmp_path / "few.html").tables["recall"]["tbody"]] == [
        *("class 0", "class 7 (2)", "class 1", "class 7 (3)"),
    ]
    assert "The table has" not in (tmp_path / "few.html").read_text()


def test_single_line_with_values_that_are_not_finite(tmp_path: Path) -> None:
    run = write_run(tmp_path / "日本", [train_line(1, 20, gradient_norm=float("inf"), main_loss=None)])
    for output in (tmp_path / "report.html", tmp_path / "report.png"):
        done = report(run, "-o", output)
        assert done.status == 0, done.stderr
    page = Page(tmp_path / "report.html")
    assert page.column("state", "run") == ["日本"]
    assert page.column("state", "state") == ["not finished"]
    assert page.column("state", "training loss") == ["3.8000"]
    assert "gradient norm" not in page.headings("state")
    assert not {"Gradient norm", "Training loss, main head", "Top-1 accuracy"} & set(page.charts)


def test_picture_of_six_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"_{i}", WHOLE) for i in range(6)]
    done = report(*runs, "-o", tmp_path / "all.PNG")
    assert done.status == 0, done.stderr
    with Image.open(tmp_path / "all.PNG") as picture:
        assert picture.format == "PNG"
        assert picture.size == (3 * 520, 4 * 330 + 3 * 28)  # 12 panels in 3 columns, 6 names in 2
        # Six equal runs show only the last one's line. The legend has all colors, in this order.
        pixels = np.asarray(picture.convert("RGB"))
    for color, top in zip(("0072b2", "d55e00", "009e73"), (0, 28, 56), strict=True):
        rows, columns = (pixels[:84, :100] == list(bytes.fromhex(color))).all(2).nonzero()
        assert top <= rows.min() < rows.max() < top + 28
        assert columns.max() - columns.min() > 15
    assert (pixels[84:] == list(bytes.fromhex("56b4e9"))).all(2).any()
    assert not list(tmp_path.glob(".*"))


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    noise = random.Random(0)  # with a trend, because matplotlib drops points on a straight line
    losses = [i / 1000 + noise.uniform(2, 3) for i in range(5000)]
    lines = [{"split": "train", "epoch": 1, "step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    many, few = (write_run(tmp_path / name, lines[:number]) for name, number in (("many", 5000), ("few", 600)))
    for run in (many, few):
        assert report(run).status == 0
    page = Page(many / "report.html")
    [number] = points(page.charts["Training loss, all heads"])
    assert 150 < number <= 300
    [number] = points(Page(few / "report.html").charts["Training loss, all heads"])
    assert number > 500
    assert (many / "report.html").stat().st_size < 100_000


def test_run_without_lines_is_skipped(tmp_path: Path) -> None:
    run, empty = write_run(tmp_path / "run", WHOLE), write_run(tmp_path / "empty", [])
    done = report(run, empty, "-o", tmp_path / "all.html")
    assert done.status == 0, done.stderr
    assert done.stderr.startswith(f"skipped: {empty / 'metrics.jsonl'}: the run has not written a line yet")
    assert "1 run" in done.stdout


def test_a_report_of_nothing_writes_nothing(tmp_path: Path) -> None:
    nothing = write_run(tmp_path / "nothing", [{"split": "train", "epoch": 1, "step": 0, "loss": None}])
    before = sorted(tmp_path.rglob("*"))
    done = report(nothing, "-o", tmp_path / "report.png")
    assert (done.status, done.stdout) == (2, "")
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    done = report(write_run(tmp_path / "run", WHOLE))
    assert done.status == 2, done.stderr
    assert done.stderr == "error: matplotlib, which draws the charts, is not installed; pip install -e '.[plot]'\n"
