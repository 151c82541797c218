"""Scores of a network: compared with a count by hand, with those of a run, and over several processes."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from model.checkpoint import load_checkpoint, save_checkpoint
from model.distributed import World, alone, join_world
from model.evaluation import MOST_MISTAKES, Evaluation, evaluate
from model.load_model import load_model
from tests.conftest import CLASSES
from tests.helpers.command import run_main
from tests.helpers.runs import ONE_THREAD, environment, metrics
from tools.evaluate import cli
from tools.evaluate.evaluate import describe_evaluation

ALONE = alone(torch.device("cpu"))
BATCH_SIZE = 8


class ReadsItsLogits(nn.Module):
    """A network whose logits are the first row of one of the image's channels."""

    def __init__(self, channel: int, num_classes: int) -> None:
        super().__init__()
        self.channel, self.num_classes = channel, num_classes

    def forward(self, image: Tensor) -> Tensor:
        assert not self.training
        return image[:, self.channel, 0, : self.num_classes]


def score(images: Tensor, targets: Tensor, num_classes: int, world: World = ALONE, **options: Any) -> Evaluation | None:
    """Scores channel 0 as the logits of the raw weights and channel 1 as those of the averaged ones, in batches."""
    loader: Any = [
        {"image": image, "target": target}
        for image, target in zip(images.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True)
    ]
    return evaluate(
        ReadsItsLogits(0, num_classes),
        ReadsItsLogits(1, num_classes),
        loader,
        num_classes=num_classes,
        world=world,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        **options,
    )


def make_samples(count: int, num_classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = 2 * torch.randn(count, 3, num_classes, num_classes, generator=generator)
    targets = torch.randint(num_classes - 1, (count,), generator=generator)  # the last class has no sample
    return images, targets


def test_scores_are_those_counted_by_hand() -> None:
    num_classes = 7
    images, targets = make_samples(45, num_classes)
    evaluation = score(images, targets, num_classes)
    assert evaluation is not None
    confusion = [[0] * num_classes for _ in range(num_classes)]
    rows = [dict.fromkeys(("samples", "top1", "top5", "ema_top1", "ema_top5"), 0) for _ in range(num_classes)]
    loss, wrong = 0.0, []
    for number, (image, target) in enumerate(zip(images.tolist(), targets.tolist(), strict=True)):
        rows[target]["samples"] += 1
        for channel, prefix in ((0, ""), (1, "ema_")):
            logits = image[channel][0]
            ranked = sorted(range(num_classes), key=lambda c: -logits[c])
            rows[target][f"{prefix}top1"] += ranked[0] == target
            rows[target][f"{prefix}top5"] += target in ranked[:5]
            total = sum(map(math.exp, logits))
            surprise = math.log(total) - logits[target]
            if channel == 0:
                loss += surprise / len(targets)
            else:
                confusion[target][ranked[0]] += 1
                if ranked[0] != target:
                    wrong.append((surprise, number, target, ranked[0], math.exp(logits[ranked[0]]) / total))

    names = tuple("abcdefg")
    expected = [
        {"class": name, "samples": row.pop("samples")} | {key: 100 * value / of for key, value in row.items()}
        for name, row in zip(names, rows, strict=True)
        if (of := row["samples"])
    ]
    assert len(expected) == num_classes - 1
    assert evaluation.of_classes(names) == expected
    assert [row["class"] for row in evaluation.of_classes(None)] == [str(number) for number in range(6)]
    assert [row["class"] for row in evaluation.of_classes(names[:2])][:4] == ["a", "b", "2", "3"]
    scores = {"loss": loss}
    for name in ("top1", "top5", "ema_top1", "ema_top5"):
        scores[name] = sum(row[name] * row["samples"] for row in expected) / len(targets)
    for name in ("top1", "ema_top1"):
        assert evaluation.recall(name) == [*(row[name] for row in expected), None]  # the last class has no sample
        scores[name.replace("top1", "mean_recall")] = sum(row[name] for row in expected) / len(expected)
    assert evaluation.scores() == pytest.approx(scores, rel=1e-5)
    assert evaluation.confusion is not None
    assert evaluation.confusion.tolist() == confusion

    wrong.sort(reverse=True)
    assert len(wrong) > MOST_MISTAKES > BATCH_SIZE  # the worst come together from several batches
    losses, numbers, truths, predictions, probabilities = map(list, zip(*wrong[:MOST_MISTAKES], strict=True))
    mistakes = evaluation.mistakes
    assert mistakes is not None
    assert torch.equal(mistakes.images, images[torch.tensor(numbers)])
    assert (mistakes.targets.tolist(), mistakes.predictions.tolist()) == (truths, predictions)
    assert mistakes.losses.tolist() == pytest.approx(losses, rel=1e-5)
    assert mistakes.probabilities.tolist() == pytest.approx(probabilities, rel=1e-5)


def test_what_is_right_is_no_mistake_and_many_classes_have_no_confusion() -> None:
    images, targets = make_samples(20, 60)
    images[torch.arange(20), 1, 0, targets] += 100
    wrong = [3, 11]
    images[wrong, 1, 0, 59] += 300
    evaluation = score(images, targets, 60)
    assert evaluation is not None
    assert evaluation.confusion is None
    assert evaluation.scores()["ema_top1"] == 90
    assert evaluation.mistakes is not None
    assert sorted(evaluation.mistakes.targets.tolist()) == sorted(targets[wrong].tolist())
    assert evaluation.mistakes.predictions.tolist() == [59, 59]


def test_nobody_to_wait() -> None:
    images, targets = make_samples(20, 7)
    assert score(images, targets, 7, is_interrupted=lambda: True) is None


def test_a_network_that_has_failed_is_scored() -> None:
    images, targets = make_samples(20, 7)
    evaluation = score(images * math.nan, targets, 7)
    assert evaluation is not None
    assert math.isnan(evaluation.loss)
    assert evaluation.mistakes is None  # a loss of NaN cannot be ranked
    printed = json.loads(describe_evaluation(evaluation, None, as_json=True), parse_constant=pytest.fail)
    assert printed["loss"] is None


def score_a_share(rank: int, port: int, folder: Path) -> None:
    """Scores the share of one rank. The first rank has most of the samples, and the last has none."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    images, targets = make_samples(50, 7)
    share = slice(*((0, 40), (40, 50), (50, 50))[rank])
    with join_world("cpu") as world:
        evaluation = score(images[share], targets[share], 7, world)
    torch.save(evaluation and evaluation.mistakes, folder / f"{rank}.pt")


def test_the_worst_are_those_of_all_ranks(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(score_a_share, (port, tmp_path), nprocs=3)
    together, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3))
    assert others == [None, None]
    alone = score(*make_samples(50, 7), 7)
    assert alone is not None
    assert alone.mistakes is not None
    assert len(alone.mistakes.losses) == MOST_MISTAKES
    for name in ("images", "targets", "predictions", "probabilities", "losses"):
        assert torch.equal(getattr(together, name), getattr(alone.mistakes, name))


@pytest.fixture
def run(finished: tuple[Path, str]) -> Path:
    return finished[0]


def command(checkpoint: Path, shards: object, *more: object) -> list[str]:
    options = ("--batch-size", BATCH_SIZE, "--torch-threads", 1, "--device", "cpu", *more)
    return [str(word) for word in (checkpoint, shards, *options)]


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in a separate process, whose modules are those of the repository."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment() | ONE_THREAD,
    )


def test_a_checkpoint_has_the_scores_of_its_run(run: Path, shards: Path, tmp_path: Path) -> None:
    done = start("-W", "error", "-m", "tools.evaluate", *command(run / "last.pt", shards, "--json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = load_model(run / "last.pt")
    assert trained.weights == ("raw" if metrics(run)[-1]["top1"] > metrics(run)[-1]["ema_top1"] else "ema")
    assert done.stderr == f"predict and export-model take these weights: {trained.weights} ({trained.why})\n"
    assert [*tmp_path.iterdir()] == []  # it writes no file
    scores = json.loads(done.stdout)
    logged = metrics(run)[-1]
    assert logged["split"] == "valid"
    assert {name: scores[name] for name in ("top1", "top5", "ema_top1", "ema_top5", "loss")} == {
        name: logged[name] for name in ("top1", "top5", "ema_top1", "ema_top5", "loss")
    }
    classes = scores["classes"]
    assert [row["class"] for row in classes] == list(CLASSES)
    assert [row["samples"] for row in classes] == [9, 8, 8]
    assert scores["samples"] == 25
    for name in ("top1", "ema_top1"):
        assert sum(row[name] * row["samples"] for row in classes) == pytest.approx(25 * scores[name])


def test_raw_and_averaged_weights_are_told_apart(run: Path, shards: Path, tmp_path: Path) -> None:
    state = load_checkpoint(run / "last.pt")
    for part, prefix, always in (("model", "", "bee"), ("ema", "module.", "ant")):  # constant predictions
        state[part][f"{prefix}fc.weight"].zero_()
        state[part][f"{prefix}fc.bias"] = torch.tensor([float(name == always) for name in CLASSES])
    save_checkpoint(tmp_path / "told.pt", state)
    done = run_main(cli.main, *command(tmp_path / "told.pt", shards))
    assert done.status == 0
    assert [line.replace("%", "").split() for line in done.stdout.splitlines()] == [
        ["class", "samples", "top-1", "EMA", "top-5", "EMA"],
        ["ant", "9", "0.0", "100.0", "100.0", "100.0"],
        ["bee", "8", "100.0", "0.0", "100.0", "100.0"],
        ["cat", "8", "0.0", "0.0", "100.0", "100.0"],
        ["all", "25", "32.0", "36.0", "100.0", "100.0"],
        ["mean", "33.3", "33.3", "100.0", "100.0"],
    ]


def test_two_processes_score_as_one(run: Path, shards: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tools.evaluate")
    done = start(*launcher, *command(run / "last.pt", shards, "--json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores, logged = json.loads(done.stdout), metrics(run)[-1]  # printed once
    for name in ("top1", "top5", "ema_top1", "ema_top5", "loss"):
        assert scores[name] == pytest.approx(logged[name], rel=1e-6)
    assert [row["samples"] for row in scores["classes"]] == [9, 8, 8]


def test_a_checkpoint_without_shards_is_refused(run: Path) -> None:
    done = run_main(cli.main, run / "last.pt")
    assert (done.status, done.stdout) == (2, "")
    assert "SHARDS" in done.stderr
