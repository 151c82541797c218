"""A run is resumed with the settings that it had. A longer run is the same run if its learning rates are."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import train
from model.checkpoint import load_checkpoint
from tests.helpers.command import Done, run_main
from tests.helpers.runs import arguments, is_equal, metrics


def main(words: Sequence[str]) -> None:
    train.main(words)
    sys.exit(0)  # after success, too, as at the end of the process


def run(shards: Path, folder: Path, *more: object) -> Done:
    return run_main(main, *arguments(shards, folder, *more))


def way_out(folder: Path) -> str:
    return (
        "; set what it had before, or start a new run from its weights: the same command without --resume, with --init-from "
        f"{folder}/last.pt and another --run-dir\n"
    )


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        (("--seed", 5), "--seed 0 before, --seed 5 now"),
        (("--epochs", 4), "--optim.lr 0.002333 before, --optim.lr 0.004667 now; --epochs 2 before, --epochs 4 now"),
        (("--epochs", 4, "--optim.lr", 0.002333), "--epochs 2 before, --epochs 4 now"),
        (("--grad-clip", 1), "no --grad-clip before, --grad-clip 1.0 now"),
        (("--deterministic",), "--no-deterministic before, --deterministic now"),
        (("--model.aux-logits",), "--model.no-aux-logits before, --model.aux-logits now"),
        (("--data.crop.scale", 0.5, 1), "--data.crop.scale 0.08 1.0 before, --data.crop.scale 0.5 1.0 now"),
        (("--data.augment", "rotate"), "--data.augment horizontal-flip before, --data.augment rotate now"),
        (("--data.augment",), "--data.augment horizontal-flip before, --data.augment now"),
        (("--image-size", 64, "--seed", 1), "--image-size 32 before, --image-size 64 now; --seed 0 before, --seed 1 now"),
    ],
)
def test_other_settings_are_refused_with_a_way_out(whole: Path, shards: Path, more: tuple[object, ...], changes: str) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    done = run(shards, whole, *more)
    assert done.status == 2
    assert done.stderr == f"error: --resume auto: {whole} has other settings: {changes}{way_out(whole)}"
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_other_limits_are_no_other_settings(whole: Path, shards: Path, tmp_path: Path) -> None:
    """The messages about them name their flags, so a resumed run may have others."""
    shutil.copytree(whole, tmp_path / "run")
    done = run(shards, tmp_path / "run", "--data.timeout", 600, "--data.max-pixels", 10**9)
    assert done.status == 0, done.stderr
    assert "from random weights" not in done.stdout  # a resumed run has weights


@pytest.mark.parametrize("schedule", [("--optim.cycle-epochs", 1), ("--optim.min-lr", 0.01)])
def test_a_finished_run_goes_on_if_its_schedule_does_not_end(
    schedule: tuple[object, ...], shards: Path, tmp_path: Path
) -> None:
    """With cycles or a constant rate, one epoch and then another are bit for bit the same as two."""
    more = ("--optim.lr", 0.01, "--optim.warmup-epochs", 0, "--batch-size", 16, *schedule)
    for folder, epochs in (("one", 1), ("one", 2), ("two", 2)):
        done = run(shards, tmp_path / folder, *more, "--epochs", epochs)
        assert done.status == 0, done.stderr
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    one, two = (load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert is_equal(one["model"], two["model"])
    assert one["config"]["epochs"] == 2

    done = run(shards, tmp_path / "one", *more, "--epochs", 4, "--optim.warmup-epochs", 1)
    assert " settings: --optim.warmup-epochs 0.0 before, --optim.warmup-epochs 1.0 now; set " in done.stderr
