"""`--model.class-weights`: a rare class is recognized more often, a file has several forms, and resuming keeps the weights."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from model.checkpoint import load_checkpoint
from model.config import ModelConfig
from model.distributed import alone
from model.evaluation import Evaluation
from pipelines.config import DataConfig
from pipelines.remote.object_store import filesystem
from pipelines.shards.shard_set import open_shards
from tests.helpers.command import Done, run_main
from tests.helpers.runs import all_metrics, is_equal, metrics
from tests.tools.test_report import Page
from tools.evaluate import cli as evaluate
from tools.report import cli as report
from tools.run.class_weights import read_class_weights, scaled
from tools.run.config import Config
from tools.run.data import Shards, open_splits
from tools.run.run_folder import RunFolder
from tools.shards.convert import convert
from tools.shards.plan import Options

ALONE = alone(torch.device("cpu"))
NETWORK = """
from torch import nn

def mean_color(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
"""
# The brightness of both classes is normally distributed, so a gray value says how likely each class is. With 15 common samples
# to a rare one, the rare class is the likelier one above 157, and with equal shares above 130.
COMMON, RARE = NormalDist(110, 20), NormalDist(150, 20)
COUNTS = {"train": (150, 10), "valid": (40, 20)}


@pytest.fixture(scope="module")
def grays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of gray images, and network.py beside them."""
    folder = tmp_path_factory.mktemp("grays")
    for split, counts in COUNTS.items():
        for name, distribution, count in zip(("common", "rare"), (COMMON, RARE), counts, strict=True):
            for i in range(count):
                gray = round(distribution.inv_cdf((i + 0.5) / count))
                path = folder / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((32, 32, 3), gray, np.uint8)).save(path)
        convert(folder / split, folder / "shards", Options(name=split), num_workers=1)
    (folder / "network.py").write_text(NETWORK)
    return folder


def run(grays: Path, path: Path, *more: object) -> Done:
    def main(words: Sequence[str]) -> None:
        train.main(words)
        sys.exit(0)  # after success, too, as at the end of the process

    shards = grays / "shards"
    return run_main(
        main,
        *("--data.train", shards, "--data.valid", shards, "--model.arch", f"{grays / 'network.py'}:mean_color"),
        *("--device", "cpu", "--torch-threads", 1, "--image-size", 32, "--batch-size", 16, "--epochs", 8),
        *("--optim.lr", 0.3, "--optim.min-lr", 0.3, "--optim.reference-batch-size", 0, "--optim.warmup-epochs", 0),
        *("--model.ema-decay", 0.9, "--run-dir", path, "--resume", "auto", *more),
    )


@pytest.fixture(scope="module")
def runs(grays: Path) -> dict[str, tuple[Path, str]]:
    """The folder and the output of a run without weights, and of one with balanced weights."""
    found = {}
    for name, more in (("none", ()), ("balanced", ("--model.class-weights", "balanced"))):
        done = run(grays, grays / name, *more)
        assert done.status == 0, done.stderr
        found[name] = grays / name, done.stdout
    return found


def test_the_rare_class_is_recognized_more_often(runs: dict[str, tuple[Path, str]]) -> None:
    (common, rare), (balanced_common, balanced_rare) = (all_metrics(path)[-1]["ema_recall"] for path, _ in runs.values())
    assert common >= 95
    assert rare <= 45
    assert balanced_common >= 65  # label smoothing, which is on, does not turn all samples into rare ones
    assert balanced_rare >= 65
    assert "class weights" not in runs["none"][1]
    assert runs["balanced"][1].count("class weights in the loss from 0.533 (common) to 8 (rare)\n") == 1


def test_what_a_run_says_about_its_classes(runs: dict[str, tuple[Path, str]]) -> None:
    path, printed = runs["balanced"]
    config = json.loads((path / "config.json").read_text())
    assert config["classes"] == ["common", "rare"]
    assert config["class_weights"] == pytest.approx([160 / (2 * 150), 160 / (2 * 10)], rel=1e-6)
    assert json.loads((runs["none"][0] / "config.json").read_text())["class_weights"] is None
    lines = [line for line in all_metrics(path) if line["split"] == "valid"]
    for line in lines:
        assert line["ema_mean_recall"] == pytest.approx(fmean(line["ema_recall"]), abs=0.01)
        assert line["ema_top1"] == pytest.approx((2 * line["ema_recall"][0] + line["ema_recall"][1]) / 3, abs=0.01)
    last = lines[-1]
    assert f"mean recall {last['mean_recall']:.1f} %, EMA {last['ema_mean_recall']:.1f} %\n" in printed

    events = EventAccumulator(str(path))
    events.Reload()
    for tag, expected in (
        *((f"valid/{name}", [line[name] for line in lines]) for name in ("mean_recall", "ema_mean_recall")),
        *((f"ema_recall/{name}", [line["ema_recall"][i] for line in lines]) for i, name in enumerate(config["classes"])),
    ):
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(expected, abs=0.01)
    raw = fmean(events.Scalars(f"recall/{name}")[-1].value for name in config["classes"])
    assert raw == pytest.approx(last["mean_recall"], rel=1e-6)
    assert "valid/ema_recall" not in events.Tags()["scalars"]


def test_report_and_evaluate(runs: dict[str, tuple[Path, str]], grays: Path, tmp_path: Path) -> None:
    path, _ = runs["balanced"]
    lines = [line for line in all_metrics(path) if line["split"] == "valid"]
    best = max(lines, key=lambda line: float(max(line["top1"], line["ema_top1"])))
    done = run_main(report.main, path, "-o", tmp_path / "report.html")
    assert done.status == 0, done.stderr
    page = Page(tmp_path / "report.html")
    assert page.column("results", "mean recall, EMA (%) final") == [f"{lines[-1]['ema_mean_recall']:.2f}"]
    assert "Mean recall of the classes" in page.charts
    worst_first = sorted(zip(lines[-1]["ema_recall"], ("common", "rare"), best["ema_recall"], strict=True))
    assert page.tables["recall"]["tbody"] == [[name, f"{last:.2f}", f"{top:.2f}"] for last, name, top in worst_first]
    assert page.headings("recall") == ["class", f"final (epoch {len(lines)})", f"best.pt (epoch {best['epoch']})"]
    assert not [row for row in page.tables["settings"]["tbody"] if row[0] in ("classes", "class_weights")]

    words = (path / "last.pt", grays / "shards", "--arch", f"{grays / 'network.py'}:mean_color", "--device", "cpu")
    scores = json.loads(run_main(evaluate.main, *words, "--json").stdout)
    assert {name: scores[name] for name in scores if "mean" in name} == pytest.approx(
        {name: lines[-1][name] for name in ("mean_recall", "ema_mean_recall")}
    )
    *_, everything, mean = run_main(evaluate.main, *words).stdout.splitlines()
    assert everything.split()[:2] == ["all", "60"]
    raw, ema = (f"{scores[name]:.1f}" for name in ("mean_recall", "ema_mean_recall"))
    assert mean.replace("%", "").split() == ["mean", raw, ema, "100.0", "100.0"]


def read(grays: Path, setting: str, **data: Any) -> list[float] | None:
    shards = str(grays / "shards")
    config = Config(model=ModelConfig(class_weights=setting), data=DataConfig(train=shards, valid=shards, **data))
    return read_class_weights(config, open_splits(config.data, ALONE), ALONE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.json", '{"rare": 6, "common": 2.0}'),
        ("w.json", '{"1": 0.03, "0": 0.01}'),
        ("w.txt", "common 2\nrare 6\n"),
        ("w.csv", "\ufeff\r\nrare,\t6e0\r\n\r\n  common , 2.0 \r\n"),
        ("w", "0\t2\n1.0\t6"),
    ],
)
def test_a_file_of_weights(grays: Path, tmp_path: Path, name: str, content: str) -> None:
    """Only the ratios count: the mean over the training samples becomes 1."""
    (tmp_path / name).write_text(content)
    mean = (150 * 1 + 10 * 3) / 160
    assert read(grays, str(tmp_path / name)) == pytest.approx([1 / mean, 3 / mean])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.txt", "common 1\n", ": no weight for class rare; each class needs one"),
        ("w.txt", "", ": no weight for class common and 1 more; each class needs one"),
        ("w.txt", "common 1\nrare\n", ", line 2: 'rare' is not a class and its weight, such as `cat 2.5`"),
        ("w.txt", "common 1\n0 2", ", line 2: class common has a weight already"),
        ("w.txt", "common x", ", line 1: the weight of class common is 'x'; a finite number above 0 is needed"),
        ("w.txt", "rare 0", ", line 1: the weight of class rare is 0.0; a finite number above 0 is needed"),
        ("w.txt", "rare nan", ", line 1: the weight of class rare is nan; a finite number above 0 is needed"),
        ("w.txt", "2 1", ", line 1: class 2 is out of range; there are 2 classes, from 0 on"),
        ("w.txt", "rarer 1", ", line 1: the label is 'rarer', which is none of the 2 classes of _info.json nor a class number"),
        ("w.txt", b"\xff 1", ": not UTF-8 text"),
        ("w.json", "[1, 2]", ": an object is needed, not [1, 2]"),
        ("w.json", '{"rare": 1, "rare": 2}', ": class rare has a weight already"),
        ("w.json", '{"rare": true}', ": the weight of class rare is True; a finite number above 0 is needed"),
        ("w.json", '{"rare": {"a": 1}}', ": the weight of class rare is (('a', 1),); a finite number above 0 is needed"),
        ("w.json", '{"rare": NaN}', ": not usable JSON (NaN is no number in JSON)"),
    ],
)
def test_a_file_that_is_refused(grays: Path, tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read(grays, str(file))
    assert str(raised.value) == f"{file}{message}"


def test_the_mean_over_the_samples_is_one(grays: Path) -> None:
    counts = [50, 0, 7, 1]
    assert scaled(None, counts) == pytest.approx([58 / (3 * 50), 1, 58 / (3 * 7), 58 / 3])  # of scikit-learn
    for given in (None, [3.0, 1.0, 0.5, 9.0], [1e308, 1.0, 1e-320, 1e300]):
        weights = scaled(given, counts)
        assert weights[1] == 1
        assert sum(weight * count for weight, count in zip(weights, counts, strict=True)) / 58 == pytest.approx(1)
    assert read(grays, "") is None
    assert read(grays, "balanced", sampler="balanced") == [1, 1]  # the sampler has balanced them already


def test_remote_shards(grays: Path, tmp_path: Path) -> None:
    """Their labels are not read, so the weights of a file are used as they are."""
    filesystem("memory://grays").put(f"{grays / 'shards'}/", "memory://grays/shards", recursive=True)
    (tmp_path / "w.txt").write_text("common 1\nrare 3\n")
    train_shards = open_shards("memory://grays/shards/train-000000.tar", "train")
    config = Config(model=ModelConfig(class_weights=str(tmp_path / "w.txt")))
    assert read_class_weights(config, Shards(train_shards, train_shards, 2), ALONE) == [1, 3]


def test_resuming_needs_the_same_weights(grays: Path, tmp_path: Path) -> None:
    """The same, not the same file: it may move, and what it says must not change."""
    first, moved = tmp_path / "first.txt", tmp_path / "moved.json"
    first.write_text("common 1\nrare 6\n")
    moved.write_text('{"common": 0.5, "rare": 3}')
    path = tmp_path / "run"

    def resume(setting: object, epochs: int = 2) -> Done:
        return run(grays, path, "--epochs", epochs, "--model.class-weights", setting)

    assert run(grays, tmp_path / "whole", "--epochs", 2, "--model.class-weights", first).status == 0
    assert resume(first, epochs=1).status == 0
    before = (path / "metrics.jsonl").read_bytes()
    newest = path / "checkpoints" / "step-000000010.pt"
    way_out = "; set --model.class-weights to what it was, a file with the content that it had, or start in another --run-dir"
    first.write_text("common 1\nrare 7\n")
    for setting, change in (
        (first, "class common had the weight 0.7619… in the loss, and now has 0.7272…"),
        ("", "the run was started with the class weights [0.7619…], and now has no class weights"),
    ):
        done = resume(setting)
        pattern = "error: --resume auto: " + re.escape(change).replace("…", r"[\d., ]*") + re.escape(way_out)
        assert re.match(pattern, done.stderr), done.stderr
        assert (done.status, done.stderr.endswith(f" with --init-from {newest}\n")) == (2, True)
        assert (path / "metrics.jsonl").read_bytes() == before
    assert resume(moved).status == 0
    assert metrics(path) == metrics(tmp_path / "whole")
    one, whole = (load_checkpoint(folder / "last.pt")["model"] for folder in (path, tmp_path / "whole"))
    assert is_equal(one, whole)

    assert run(grays, tmp_path / "none", "--epochs", 1).status == 0
    done = run(grays, tmp_path / "none", "--epochs", 2, "--model.class-weights", "balanced")
    assert "the run was started with no class weights, and now has the class weights [0.533" in done.stderr


def test_many_classes_have_a_histogram(tmp_path: Path) -> None:
    counts = torch.zeros(60, 5, dtype=torch.float64)
    counts[:50, 0] = 4  # ten classes without samples
    counts[:10, 1], counts[:20, 3] = 4, 4
    with RunFolder(tmp_path, {}, ALONE, resumed=None) as folder:
        folder.write_evaluation(Evaluation(counts, 0.0, None, None), None, 7)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for tag, num_recognized in (("valid/recall", 10), ("valid/ema_recall", 20)):
        (event,) = events.Histograms(tag)
        histogram = event.histogram_value
        assert (event.step, histogram.num, histogram.min, histogram.max) == (7, 50, 0, 100)
        assert [number for number in histogram.bucket if number] == [50 - num_recognized, num_recognized]
    assert events.Tags()["scalars"] == []
