"""`--init-from`: which weights are loaded, which are reset, and which files are refused."""

import functools
import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import train
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import ModelConfig, StepConfig
from model.distributed import alone
from model.ema import averaged_weights
from model.googlenet import GoogLeNet
from model.init_from import read_initial_weights
from model.job import Job, build_job
from tests.helpers import checkpoints
from tests.helpers.command import run_main
from tests.helpers.runs import train_command

ALONE = alone(torch.device("cpu"))

State = dict[str, Tensor]
PREPROCESSING = {"image_size": 32, "resize_shorter": 37, "mean": checkpoints.MEAN, "std": checkpoints.STD}
ON = (
    "transform_input: on, because the statistics of its first layer are those of inputs with a deviation of 0.5; "
    "--model.transform-input False overrides it\n"
)
OFF = (
    "transform_input: off, because the statistics of its first layer are those of inputs with ImageNet's deviation; "
    "--model.transform-input True overrides it\n"
)
UNKNOWN = (
    "transform_input: off; the file does not tell whether its weights need it, as torchvision's published ones do; "
    "--model.transform-input True turns it on\n"
)


def make_photos() -> Tensor:
    """Returns images `(16, 3, 64, 64)` like photos: structure at every scale, mostly gray; normalized as ImageNet's."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(16, 3, 64, 64)
    for cells in (1, 2, 4, 8, 16):
        gray, colors = (torch.randn(16, channels, cells, cells, generator=generator) for channels in (1, 3))
        images += interpolate(gray + 0.3 * colors, size=(64, 64), mode="bicubic")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (checkpoints.MEAN, checkpoints.STD))
    return ((0.45 + 0.14 * images).clamp(0, 1) - mean) / std


@functools.cache
def _trained(num_classes: int, *, transform_input: bool) -> State:
    torch.manual_seed(5)
    network = GoogLeNet(num_classes, transform_input=transform_input)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(make_photos())
    return network.state_dict()


def make_state(num_classes: int = 1000, *, aux_logits: bool = True, transform_input: bool = True) -> State:
    """Returns weights with the statistics of photos. By default, they need a renormalized input, as torchvision's do."""
    state = _trained(num_classes, transform_input=transform_input)
    return {name: value.clone() for name, value in state.items() if aux_logits or not name.startswith("aux")}


def make_job(
    num_classes: int = 3,
    *,
    path: Path | None = None,
    is_partial: bool = False,
    classes: tuple[str, ...] | None = None,
    **model: Any,
) -> Job:
    return build_job(
        StepConfig(epochs=2, batch_size=4, image_size=32, model=ModelConfig(**model)),
        ALONE,
        num_classes=num_classes,
        classes=classes,
        autocast_dtype=None,
        steps_per_epoch=10,
        preprocessing=PREPROCESSING,
        initial=None if path is None else read_initial_weights(path, is_partial=is_partial),
    )


def taken_from(state: State, job: Job) -> set[str]:
    """Returns the names of the model's tensors that equal those of the state."""
    model = job.model.state_dict()
    return {name for name, value in model.items() if name in state and torch.equal(value, state[name])}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], dict[str, str]]:
    """A function that returns the log lines since its last call, by level."""
    caplog.set_level(logging.INFO, "train")

    def take() -> dict[str, str]:
        lines = {record.levelname: "" for record in caplog.records}
        for record in caplog.records:
            lines[record.levelname] += f"{record.getMessage()}\n"
        caplog.clear()
        return lines

    return take


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose averaged weights differ from the raw ones."""
    job = make_job(transform_input=True)
    job.model.train()
    for _ in range(3):
        train.train_step(job, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 2]))
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save_checkpoint(path, job.state_dict())
    return path


def test_a_checkpoint_gives_its_average_and_how_its_input_is_scaled(
    checkpoint: Path, said: Callable[[], dict[str, str]]
) -> None:
    saved = load_checkpoint(checkpoint)
    job = make_job(path=checkpoint)
    assert job.transform_input
    assert job.model.transform_input
    average = {name.removeprefix("module."): value for name, value in saved["ema"].items()}
    assert taken_from(average, job) == {*job.model.state_dict()}
    assert not torch.equal(average["fc.weight"], saved["model"]["fc.weight"])
    for name, value in job.ema.module.state_dict().items():  # the average starts there as well
        assert torch.equal(value, average[name])
    weights = "weights: ema (averaged; the checkpoint has no validation scores to choose by)"
    assert said() == {
        "INFO": "transform_input: on, as in the checkpoint; --model.transform-input False overrides it\n"
        f"loaded {len(average) - 1} of {len(average) - 1} tensors from {checkpoint}, {weights}\n"
    }
    assert not make_job(path=checkpoint, transform_input=False).model.transform_input  # the setting overrides the file


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_state_dict_as_torchvision_publishes_it(tmp_path: Path, said: Callable[[], dict[str, str]], *, is_zip: bool) -> None:
    """It has 1000 classes, in torch's present format or in the one of 2018, which the published file has."""
    state, path = make_state(), tmp_path / "googlenet-1378be20.pth"
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    assert zipfile.is_zipfile(path) == is_zip
    job = make_job(path=path)
    assert job.model.transform_input
    anew = {f"{layer}.{kind}" for layer in ("fc", "aux1.fc2", "aux2.fc2") for kind in ("weight", "bias")}
    assert {*state} - taken_from(state, job) <= anew
    assert job.model.fc.weight.shape == (3, 1024)
    assert job.model.fc.weight.std().item() == pytest.approx(0.88 * 0.01, rel=0.1)  # like fresh weights
    assert said()["INFO"] == (
        f"{ON}loaded {len(state) - len(anew)} of {len(state)} tensors from {path}\n"
        "the file has 1000 classes, and the data 3: the last layers are reset: fc, aux1.fc2, aux2.fc2\n"
    )
    whole = make_job(1000, path=path)
    assert taken_from(state, whole) == {*state}
    assert said() == {"INFO": f"{ON}loaded {len(state)} of {len(state)} tensors from {path}\n"}


def test_auxiliary_heads_on_one_side_only(tmp_path: Path, said: Callable[[], dict[str, str]]) -> None:
    path = tmp_path / "state.pth"
    bare, full = make_state(3, aux_logits=False), make_state(3)
    torch.save(bare, path)
    assert taken_from(bare, make_job(path=path)) >= {*bare}
    assert "the file lacks auxiliary heads; they are reset: aux1, aux2\n" in said()["INFO"]
    torch.save(full, path)
    assert taken_from(full, make_job(path=path, aux_logits=False)) == {*bare}
    assert said() == {"INFO": f"{ON}loaded {len(bare)} of {len(bare)} tensors from {path}\n"}
    torch.save(make_state(7, aux_logits=False), path)
    make_job(path=path, aux_logits=False)
    assert "the file has 7 classes, and the data 3: the last layers are reset: fc\n" in said()["INFO"]


def test_classes_of_other_names(tmp_path: Path, said: Callable[[], dict[str, str]]) -> None:
    """There are as many classes as before, but the last layers have learned others."""
    path, animals = tmp_path / "last.pt", ("ant", "bee", "cat")
    last = {f"{layer}.{kind}" for layer in ("fc", "aux1.fc2", "aux2.fc2") for kind in ("weight", "bias")}
    job = make_job(classes=animals)
    with torch.no_grad():
        for name in last:  # as if learned: all jobs draw the same initial weights
            job.ema.module.get_parameter(name).add_(1)
    save_checkpoint(path, job.state_dict())
    state = averaged_weights(load_checkpoint(path)["ema"])
    for classes, anew in ((animals, set[str]()), (None, set[str]()), (("axe", "bow", "car"), last)):
        assert {*state} - taken_from(state, make_job(path=path, classes=classes)) == anew
        assert ("the classes have other names: the last layers are reset" in said()["INFO"]) == bool(anew)


def without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if name not in names}


def renamed(state: State, name: str, to: str) -> State:
    return {to if old == name else old: value for old, value in state.items()}


CONV, HEAD, AUX = "conv1.conv.weight", "fc.weight", "aux1.fc1.weight"


@pytest.mark.parametrize(
    ("spoil", "complaints", "num_taken"),
    [
        (lambda state: without(state, CONV), [f"{CONV} is missing"], -1),
        (
            lambda state: renamed(state, CONV, "stem.weight"),
            [f"{CONV} is missing", "stem.weight is not one of the network's"],
            -1,
        ),
        (lambda state: state | {CONV: torch.zeros(64, 3, 3, 3)}, [f"{CONV} is 64x3x3x3 instead of 64x3x7x7"], -1),
        (lambda state: without(state, HEAD), [f"{HEAD} is missing"], -1),
        (lambda state: state | {HEAD: torch.zeros(3, 512)}, [f"{HEAD} is 3x512 instead of 3x1024"], -1),
        (lambda state: without(state, AUX), [f"{AUX} is missing"], -1),
        (lambda state: state | {AUX: torch.zeros(1024, 512)}, [f"{AUX} is 1024x512 instead of 1024x2048"], -1),
        (
            lambda state: {name: value for name, value in state.items() if "5b" not in name},
            ["inception5b.branch1.conv.weight is missing", "and 22 more"],
            -36,
        ),
    ],
)
def test_what_does_not_fit_is_refused_or_left(
    spoil: Callable[[State], State],
    complaints: list[str],
    num_taken: int,
    tmp_path: Path,
    said: Callable[[], dict[str, str]],
) -> None:
    path, state = tmp_path / "state.pth", make_state(3)
    torch.save(spoil(state), path)
    with pytest.raises(ValueError, match=r"^--init-from \S+ does not fit: .*; --init-from-partial loads what fits$") as refused:
        make_job(path=path)
    job = make_job(path=path, is_partial=True)
    lines = said()
    for text in (str(refused.value), lines["WARNING"]):
        assert [complaint for complaint in complaints if complaint not in text] == []
    assert lines["INFO"].endswith(f"loaded {len(state) + num_taken} of {len(state)} tensors from {path}\n")
    assert f"not loaded from {path}: " in lines["WARNING"]
    assert len(taken_from(state, job)) >= len(state) + num_taken


def save_text(path: Path) -> None:
    path.write_text("weights\n")


def save_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


def save_cut(path: Path) -> None:
    torch.save(make_state(3), path)
    path.write_bytes(path.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (Path.touch, "damaged, or not a checkpoint"),
        (save_text, "damaged, or not a checkpoint"),
        (save_zip, "is damaged, or not a checkpoint: torch finds no tensors"),
        (save_cut, "damaged, or not a checkpoint"),
        (lambda path: torch.save(torch.zeros(3), path), "it holds a Tensor"),
        (lambda path: torch.save([1], path, _use_new_zipfile_serialization=False), "it holds a list"),
        (lambda path: torch.save({1: torch.zeros(3)}, path), "neither a checkpoint of train.py nor a state dict"),
    ],
)
def test_what_holds_no_weights_is_refused(write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    write(path)
    with pytest.raises(ValueError, match=message) as refused:
        make_job(path=path, is_partial=True)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_fine_tuning_from_beginning_to_end(shards: Path, tmp_path: Path) -> None:
    """An incomplete file of torchvision is refused, then loaded in part. The run resumes without the file."""
    path, run, missing = tmp_path / "googlenet.pth", tmp_path / "run", "conv2.conv.weight"
    torch.save(without(make_state(), missing), path)
    command = (
        *("--data.train", shards, "--data.valid", shards, "--epochs", 2, "--batch-size", 20, "--image-size", 32),
        *("--device", "cpu", "--init-from", path, "--run-dir", run, "--resume", "auto"),
    )
    refused = run_main(train.main, *command)
    assert refused.status == 2
    (line,) = refused.stderr.splitlines()
    assert line == (f"error: --init-from {path} does not fit: {missing} is missing; --init-from-partial loads what fits")
    done = train_command(*command, "--init-from-partial", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the file has 1000 classes, and the data 3: the last layers are reset: fc, aux1.fc2, aux2.fc2\n" in done.stdout
    assert f"not loaded from {path}: {missing} is missing\n" in done.stdout
    first, last = sorted((run / "checkpoints").iterdir())
    whole = load_checkpoint(last)
    assert whole["architecture"]["transform_input"]
    assert ON in done.stdout

    last.unlink()
    path.unlink()
    done = train_command(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert json.loads((run / "config.json").read_text())["transform_input"] is True
    again = load_checkpoint(run / "last.pt")
    assert again["architecture"] == whole["architecture"]
    for part in ("model", "ema"):
        assert all(torch.equal(again[part][name], whole[part][name]) for name in whole[part])
    valid = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in valid if line["split"] == "valid"] == [3, 6]
    assert first.exists()
