"""Loading networks from checkpoints, and files that are none."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model.ema import EMA
from model.fit import misfit
from model.googlenet import GoogLeNet
from model.load_model import Preprocessing, load_model
from tests.helpers import checkpoints

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("run") / "best.pt")


def test_weights(checkpoint: Path) -> None:
    """Raw and averaged networks give the same logits as before saving."""
    state = checkpoints.state()
    model = GoogLeNet(3).eval()
    model.load_state_dict(state["model"])
    average = EMA(model, 0.9)
    average.load_state_dict(state["ema"])
    with torch.inference_mode():
        raw, averaged = load_model(checkpoint, "raw").model(IMAGES), load_model(checkpoint).model(IMAGES)
        # The memory layout of the weights differs, and so does the order of additions.
        torch.testing.assert_close(raw, model(IMAGES), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(averaged, average(IMAGES), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(averaged, raw, atol=0.1)


def test_what_else_it_says(checkpoint: Path) -> None:
    trained = load_model(checkpoint)
    assert (trained.path, trained.weights, trained.epoch, trained.step) == (checkpoint, "ema", 2, 20)
    assert (trained.classes, trained.num_classes) == (("ant", "bee", "cat"), 3)
    assert trained.preprocessing == Preprocessing(32, 37, checkpoints.MEAN, checkpoints.STD)
    assert not trained.model.training
    assert all(parameter.requires_grad for parameter in trained.model.parameters())  # for further training
    assert [trained.class_name(number) for number in (0, 2)] == ["ant", "cat"]


def test_without_names_and_heads(tmp_path: Path) -> None:
    model = GoogLeNet(5, aux_logits=False, transform_input=True)
    path = checkpoints.write(
        tmp_path / "last.pt",
        model=model.state_dict(),
        classes=None,
        architecture={"num_classes": 5, "aux_logits": False, "transform_input": True},
    )
    trained = load_model(path, "raw")
    assert (trained.classes, trained.class_name(4), trained.num_classes) == (None, None, 5)
    with torch.inference_mode():
        assert torch.equal(trained.model(IMAGES), model.eval()(IMAGES))


def test_fewer_names_than_classes(tmp_path: Path) -> None:
    """So it is if validation shards without names have labels that the training shards do not name."""
    trained = load_model(checkpoints.write(tmp_path / "best.pt", classes=("ant", "bee")))
    assert [trained.class_name(number) for number in range(3)] == ["ant", "bee", None]


def test_random_numbers_are_left_alone(checkpoint: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_model(checkpoint)
    assert torch.equal(torch.rand(3), expected)


def flip_bytes(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0x55 for byte in content[middle : middle + 100]) + content[middle + 100 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "as torch.save writes it (File is not a zip file); name a best.pt"),
        (
            lambda content: content[:100],
            "it is not an archive as torch.save writes it (File is not a zip file); name a best.pt",
        ),
        (flip_bytes, "is not as it was written; name a best.pt"),  # torch loads such a file silently
    ],
)
def test_damaged(tmp_path: Path, checkpoint: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(change(checkpoint.read_bytes()))
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(path))} is damaged, or not a checkpoint: .*{re.escape(message)}"
    ) as error:
        load_model(path)
    assert "\n" not in str(error.value)


PREPROCESSING = {"image_size": 32, "resize_shorter": 37, "mean": checkpoints.MEAN, "std": checkpoints.STD}
ARCHITECTURE = {"num_classes": 3, "aux_logits": True, "transform_input": False}
DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("part", "name", "values", "needed"),
    [
        (
            "preprocessing",
            "image_size",
            (0, -1, 10**9, "x", 32.0, True, None, 10**500, DEEP),
            "a whole number from 32 to 4096",
        ),
        ("preprocessing", "resize_shorter", (0, 31, 10**9, "37"), "a whole number from 32, the image size, to 8192"),
        (
            *("preprocessing", "mean"),
            ((0.5, 0.5), (0.5, 0.5, math.nan), (1e400, 0, 0), "abc", 0.5, (-1, 0, 0), (10**400, 0, 0), [[0.5]] * 3),
            "three numbers from 0 to 1",
        ),
        (
            "preprocessing",
            "std",
            ((0.2, 0.2, 0.0), (0.2, 0.2), (0.2, 0.2, -0.1), (1, 1, math.inf), None),
            "three numbers above 0",
        ),
        ("architecture", "num_classes", (0, -3, 10**12, "3", 3.0, None), "a whole number from 1 to 10,000,000"),
        ("architecture", "aux_logits", (1, "yes", None), "True or False"),
        ("architecture", "transform_input", (0, torch.zeros(1)), "True or False"),
        ("", "classes", (tuple("abcd"), "ant", (1, 2, 3), {"ant": 0}, 3), "a list of up to 3 names"),
        ("", "epoch", (-1, 1.5, "2", None, (2,)), "a whole number of at least 0"),
        ("", "step", (-1, True, torch.tensor(3)), "a whole number of at least 0"),
    ],
)
def test_impossible_entries(tmp_path: Path, part: str, name: str, values: Sequence[Any], needed: str) -> None:
    """They are refused in one line that names the file and the key, before anything is built from them."""
    whole = {"preprocessing": PREPROCESSING, "architecture": ARCHITECTURE}
    for value in values:
        changes = {part: {**whole[part], name: value}} if part else {name: value}
        path = checkpoints.write(tmp_path / "best.pt", **{"model": {}, "ema": {}, **changes})
        with pytest.raises(
            ValueError, match=rf"best\.pt: {f'{part}.{name}'.strip('.')} is .* instead of {needed}; name a"
        ) as no:
            load_model(path)
        assert "\n" not in str(no.value)
        assert len(str(no.value)) < 400
    for value in (None, [], "x"):
        if part:
            with pytest.raises(ValueError, match=rf"best\.pt: .* it lacks {part}\.\w+; name a"):
                load_model(checkpoints.write(tmp_path / "best.pt", **{"model": {}, "ema": {}, part: value}))


@pytest.mark.parametrize("place", ["model", "ema"])
def test_impossible_tensors(tmp_path: Path, place: str) -> None:
    prefix = "module." if place == "ema" else ""
    for value, why in (
        (torch.zeros(1).expand(3, 1024), "a tensor that lacks the memory of its values"),
        (torch.zeros(1).expand(3, 10**12), "3x1000000000000 instead of 3x1024"),
        (torch.zeros(3, 1024, dtype=torch.int32), "a tensor of integers instead of floats"),
        (torch.zeros(3, 1024, dtype=torch.complex64), "a tensor of complex numbers instead of floats"),
        ([1.0], "a list instead of a tensor"),
    ):
        small = {f"{prefix}fc.bias": torch.zeros(3), f"{prefix}fc.weight": value}
        path = checkpoints.write(tmp_path / "best.pt", **{"model": {}, "ema": {}, place: small})
        with pytest.raises(
            ValueError, match=rf"not those of the network that it describes \({place}: .*; and \d+ more\)"
        ) as no:
            load_model(path, "raw" if place == "model" else "ema")
        assert "is missing" in str(no.value)
        assert misfit(value, torch.zeros(3, 1024)) == why
    for value in ([1], {1: torch.zeros(3)}):
        with pytest.raises(ValueError, match=rf"best\.pt: {place} is not a state dict; name a"):
            load_model(checkpoints.write(tmp_path / "best.pt", **{place: value}), "raw" if place == "model" else "ema")


@pytest.mark.parametrize(
    ("scores", "chosen", "why"),
    [
        ({"top1": 63.4, "ema_top1": 58.8}, "raw", "the better ones on the validation split"),
        ({"top1": 58.8, "ema_top1": 63.4}, "ema", "the better ones on the validation split"),
        ({"top1": 50.0, "ema_top1": 50.0}, "ema", "averaged; on the validation split, the raw ones scored the same"),
        ({}, "ema", "averaged; the checkpoint has no validation scores to choose by"),  # before the first validation
        (None, "ema", "averaged; the checkpoint has no validation scores to choose by"),
        ({"top1": math.nan, "ema_top1": "x"}, "ema", "averaged; the checkpoint has no validation scores to choose by"),
    ],
)
def test_the_better_weights_are_taken(tmp_path: Path, scores: Any, chosen: str, why: str) -> None:
    path = checkpoints.write(tmp_path / "best.pt", scores=scores)
    trained = load_model(path)
    assert (trained.weights, trained.why) == (chosen, why)
    assert torch.equal(trained.model.fc.weight * (3 if chosen == "ema" else 1), checkpoints.state()["model"]["fc.weight"])
    asked = load_model(path, "ema" if chosen == "raw" else "raw")
    assert (asked.weights, asked.why) == ("ema" if chosen == "raw" else "raw", "as --weights says")
