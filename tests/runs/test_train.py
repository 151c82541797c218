"""`python train.py`, run as a user runs it."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from model.checkpoint import load_checkpoint
from model.googlenet import GoogLeNet
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.shards.index import read_index
from pipelines.shards.shard_set import open_shards
from tests.helpers.command import run_main
from tests.helpers.runs import ONE_THREAD, ROOT, all_metrics, metrics, train_command
from tools.evaluate import cli as evaluate
from tools.export import cli as export
from tools.predict import cli as predict
from tools.report import cli as report
from tools.run.config import Config
from tools.run.log import next_commands
from tools.run.recipes import RECIPES


def test_metrics(finished: tuple[Path, str]) -> None:
    lines = all_metrics(finished[0])
    train = [line for line in lines if line["split"] == "train"]
    valid = [line for line in lines if line["split"] == "valid"]
    assert [(line["epoch"], line["step"]) for line in train] == [(1, 3), (1, 6), (1, 7), (2, 10), (2, 13), (2, 14)]
    for line in train:
        assert set(line) == {
            *("split", "epoch", "step", "loss", "main_loss", "aux2_loss", "aux1_loss", "lr", "gradient_norm", "scale"),
            *("skipped_steps", "images_per_second", "data_wait_percent", "bad_samples"),
        }
        assert line["loss"] == pytest.approx(line["main_loss"] + 0.3 * (line["aux1_loss"] + line["aux2_loss"]), rel=1e-5)
        assert line["main_loss"] > 0
        assert line["gradient_norm"] > 0
        assert line["images_per_second"] > 0
        assert 0 <= line["data_wait_percent"] <= 100
    assert [line["epoch"] for line in valid] == [1, 2]
    for line in valid:
        assert set(line) == {
            *("split", "epoch", "step", "top1", "top5", "ema_top1", "ema_top5", "loss", "bad_samples"),
            *("mean_recall", "ema_mean_recall", "ema_recall"),
        }
        samples = (9, 8, 8)
        hits = [recall * of / 100 for recall, of in zip(line["ema_recall"], samples, strict=True)]
        assert sum(hits) / 25 == pytest.approx(line["ema_top1"] / 100, abs=1e-4)
        assert 0 <= line["top1"] <= line["top5"] == 100  # three classes
        assert (line["top1"] * 25 / 100) % 1 == pytest.approx(0, abs=1e-9)  # of 25 images
    assert "mean recall" not in finished[1]  # the classes have about as many samples


def test_config_checkpoints_and_report(finished: tuple[Path, str], shards: Path) -> None:
    run, printed = finished
    config = json.loads((run / "config.json").read_text())
    assert config["epochs"] == 2
    assert config["optim"]["lr"] == pytest.approx(0.05 * 14 / 300, rel=1e-3)  # a run of 14 steps
    assert "learning rate 0.002333 x 8 / 64 = 0.000291625" in printed
    assert config["data"]["valid"] == f"{shards}/valid-*.tar"
    last = load_checkpoint(run / "last.pt")
    assert (last["epoch"], last["step"]) == (2, 14)
    assert last["config"] == config
    assert last["classes"] == ("ant", "bee", "cat")
    assert last["architecture"] == {"num_classes": 3, "aux_logits": True, "transform_input": False}
    assert last["preprocessing"]["image_size"] == 32
    GoogLeNet(num_classes=3).load_state_dict(last["model"])
    assert set(last) >= {"model", "ema", "optimizer", "scheduler", "scaler", "best"}
    valid = [line for line in all_metrics(run) if line["split"] == "valid"]
    assert last["best"] == max(max(line["top1"], line["ema_top1"]) for line in valid)
    assert load_checkpoint(run / "best.pt")["best"] == last["best"]
    assert re.search(r"epoch 1/2  step 3/7  loss \S+  lr \S+  \S+ images/s  data wait \S+ %  \d+m\d\ds left", printed)
    paces = re.findall(r"epoch (\d)/2  train: \S+ images/s  \(first 3 batches: \S+ s, \S+ s of them waiting\)  (.*)\n", printed)
    assert [epoch for epoch, _ in paces] == ["1", "2"]
    for _, verdict in paces:
        assert re.fullmatch(
            r"compute-bound: \d+\.\d % of the model's own rate|data-bound: waits \d+ % of the time for data", verdict
        )
    assert re.search(r"top-1 +\d+\.\d % +\d+\.\d %\n", printed)
    assert re.search(r"training: \d+\.\d images/s, \d+\.\d % of the time spent waiting for data", printed)
    assert str(run) in printed


def test_the_next_commands_work(finished: tuple[Path, str], tmp_path: Path) -> None:
    """After a run on one's own data, they are commands for its result."""
    run, printed = finished
    lines = [line.strip() for line in printed.split("next:")[1].splitlines()]
    assert [line.split()[0] for line in lines] == ["evaluate", "predict", "export-model", "report", "tensorboard"]
    for line, main in zip(lines, (evaluate.main, predict.main, export.main, report.main), strict=False):
        words = [word.replace(f"{run}/model.pt2", f"{tmp_path}/model.pt2") for word in shlex.split(line)[1:]]
        done = run_main(main, *words)
        assert done.status == 0, (line, done.stderr)


def test_next_commands_have_the_options_of_the_data_and_come_after_the_demo(shards: Path) -> None:
    valid = open_shards(str(shards), "valid")
    data = DataConfig(train="a", valid="my shards/*.tar", label_key="a.b", class_file="names.txt", image_key="input.jpg")
    board, run = "tensorboard --logdir 'my runs'", Path("my runs/one")
    assert next_commands(Config(data=data), valid, run) == [
        "evaluate 'my runs/one/best.pt' 'my shards/*.tar' --image-key input.jpg --label-key a.b --class-file names.txt",
        f"predict 'my runs/one/best.pt' {valid.tars[0]} --image-key input.jpg --label-key a.b",
        "export-model 'my runs/one/best.pt' -o 'my runs/one/model.pt2'",
        "report 'my runs/one'",
        board,
    ]
    assert next_commands(RECIPES["demo"], valid, run)[:2] == [
        board,
        "shards convert FOLDER_OF_CLASS_FOLDERS shards/mine --name train",
    ]


def test_tensorboard(finished: tuple[Path, str]) -> None:
    events = EventAccumulator(str(finished[0]))
    events.Reload()
    lines = all_metrics(finished[0])
    for split, name in (("train", "loss"), ("train", "lr"), ("valid", "ema_top1"), ("train", "data_wait_percent")):
        logged = [event.value for event in events.Scalars(f"{split}/{name}")]
        assert logged == pytest.approx([line[name] for line in lines if line["split"] == split], rel=1e-6)
    (picture,) = events.Images("train/batch")
    assert picture.width > 64  # a grid of images of 32 pixels


def test_scores_are_those_of_the_saved_weights(finished: tuple[Path, str], shards: Path) -> None:
    last = load_checkpoint(finished[0] / "last.pt")
    raw, ema = GoogLeNet(num_classes=3).eval(), GoogLeNet(num_classes=3).eval()
    raw.load_state_dict(last["model"])
    ema.load_state_dict({k.removeprefix("module."): v for k, v in last["ema"].items() if k != "n_averaged"})
    with build_loader(
        DataConfig(valid=str(shards), backend="pillow"),
        LoaderSpec(split="valid", batch_size=25, image_size=32, device=torch.device("cpu"), dtype=torch.float32, num_threads=0),
    ) as loader:
        batch = loader.next()
    assert batch is not None
    scores = all_metrics(finished[0])[-1]
    for model, name in ((raw, "top1"), (ema, "ema_top1")):
        with torch.no_grad():
            hits = (model(batch["image"]).argmax(1) == batch["target"]).float().mean().item()
        assert 100 * hits == pytest.approx(scores[name], abs=4.1)  # another decoder: one image of 25 may change


def test_the_old_pair_trains_too(shards: Path, tmp_path: Path) -> None:
    done = train_command(
        *("--data.train", shards, "--data.valid", shards, "--data.backend", "pillow", "--data.threads", 1),
        *("--epochs", 2, "--batch-size", 20, "--image-size", 32, "--model.no-aux-logits", "--precision", "bf16"),
        *("--log-every", 3),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert [line["step"] for line in all_metrics(run) if line["split"] == "train"] == [3, 6]


def test_killed_and_resumed(finished: tuple[Path, str], shards: Path, tmp_path: Path) -> None:
    """After `kill -9` in the middle of epochs, the metrics are the same, and the weights are bit for bit the same."""
    run = tmp_path / "run"
    options = (
        *("--data.train", shards, "--data.valid", shards, "--epochs", 2, "--batch-size", 8, "--image-size", 32, "--seed", 3),
        *("--log-every", 3, "--device", "cpu", "--checkpoint.every-steps", 2, "--resume", "auto", "--run-dir", run),
    )
    command = [sys.executable, "-W", "error", str(ROOT / "train.py"), "--torch-threads", "1", *map(str, options)]
    for num_lines in (2, 2, 5):  # the second time, the resumed run has not written a line yet
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | ONE_THREAD, stdout=subprocess.DEVNULL)
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < num_lines:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"split": "tra')  # like an unfinished line
    done = train_command(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert "resuming" not in finished[1]

    assert metrics(run) == metrics(finished[0])
    killed, whole = (load_checkpoint(folder / "last.pt") for folder in (run, finished[0]))
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], killed[part][name]) for name in whole[part])
    done = train_command(*options, "--seed", 1, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --resume auto: {run} has other settings: --seed 3 before, --seed 1 now; ")


def test_a_bad_sample_does_not_end_a_run(shards: Path, tmp_path: Path) -> None:
    for path in [*shards.glob("*.tar"), *shards.glob("*.idx"), shards / "_info.json"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for split in ("train", "valid"):
        [image, *_] = read_index(tmp_path / f"{split}-000001.idx")[3]
        with open(tmp_path / f"{split}-000001.tar", "r+b") as file:
            file.seek(image.offset)
            file.write(b"x" * image.size)
    done = train_command(
        *("--data.train", tmp_path, "--data.valid", tmp_path, "--data.max-bad-fraction", 0.01, "--run-dir", tmp_path / "run"),
        *("--epochs", 2, "--batch-size", 8, "--image-size", 32),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    warning = r"left out a bad sample \((?:training, epoch \d|validation), batch \d, rank 0\): \S+-000001\.tar:\d+:\S+: not"
    assert len(re.findall(warning, done.stdout)) == 2
    assert [line["bad_samples"] for line in all_metrics(tmp_path / "run")][-1] == 1
    listed = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(Path(line["tar"]).name for line in listed) == ["train-000001.tar", "valid-000001.tar"]


def test_augmentations_and_mixes(shards: Path, tmp_path: Path) -> None:
    done = train_command(
        *(
            "--data.train",
            shards,
            "--data.valid",
            shards,
            "--data.augment",
            "horizontal-flip",
            "color-jitter:hue=0.1",
            "rotate",
        ),
        *("--mix.mixup-alpha", 0.2, "--mix.cutmix-alpha", 1, "--data.crop.scale", 0.5, 1),
        *("--epochs", 1, "--batch-size", 20, "--image-size", 32, "--precision", "bf16", "--run-dir", tmp_path / "run"),
        *("--log-every", 3),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [step["name"] for step in config["data"]["augment"]] == ["horizontal-flip", "color-jitter", "rotate"]
    assert config["data"]["augment"][1]["hue"] == 0.1
    assert config["data"]["crop"]["scale"] == [0.5, 1.0]
    assert config["mix"] == {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}
    train, _ = all_metrics(tmp_path / "run")
    assert 0 < train["loss"] < 10


SHARDS = ["--data.train", "SHARDS", "--data.valid", "SHARDS"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.train", "SHARDS"], "--data.train is given and --data.valid is not"),
        (["--data.train", "x-*.tar", "--data.valid", "SHARDS"], "no such shard: 'x-*.tar'"),
        ([*SHARDS, "--epochs", "many"], "--epochs"),
        ([*SHARDS, "--device", "tpu"], "--device"),
        ([*SHARDS, "--precision", "fp16", "--device", "cpu"], "--precision fp16 needs a GPU; on a CPU use bf16 or fp32"),
        ([*SHARDS, "--batch-size", "99"], "lower --batch-size"),
        (["--recipe", "demo", "--data.train", "SHARDS"], "--data.train is given and --data.valid is not"),
        ([*SHARDS, "--batch-size", "8", "--run-dir", "RUN"], "holds a run already"),
        (["--evaluate=last.pt"], "error: --evaluate is a command of its own now: evaluate CHECKPOINT SHARDS"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str],
    message: str,
    shards: Path,
    finished: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"SHARDS": str(shards), "RUN": str(finished[0])}
    before = (finished[0] / "metrics.jsonl").read_bytes()
    done = run_main(train.main, "--torch-threads", 1, *[words.get(word, word) for word in arguments])
    assert done.status == 2
    assert message in done.stderr
    assert [*tmp_path.iterdir()] == []
    assert (finished[0] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--epochs", "many"], "--epochs"), (["--data.train", "a.tar"], "error: --data.train is given and --data.valid is not")],
)
def test_wrong_arguments_end_the_process_at_once(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = train_command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
