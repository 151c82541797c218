"""Loading networks from checkpoints, and files that are none."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_checkpoint
from model.ema import EMA
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
        (lambda content: b"", "File is not a zip file; name a best.pt"),
        (lambda content: b"hello\n", "File is not a zip file; name a best.pt"),
        (lambda content: content[: len(content) // 2], "File is not a zip file; name a best.pt"),
        (lambda content: content[:100], "File is not a zip file; name a best.pt"),
        (flip_bytes, "archive/.* is not as it was written; name"),  # torch loads such a file silently
        (lambda content: content[:300] + b"\0" * 100 + content[400:], "archive/data.pkl is not as it was written"),
    ],
)
def test_damaged(tmp_path: Path, checkpoint: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(change(checkpoint.read_bytes()))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is damaged, or not a checkpoint: {message}") as error:
        load_model(path)
    assert "\n" not in str(error.value)


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.pt: no such file; name a best\.pt or last\.pt that train\.py wrote"):
        load_model(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=rf"{tmp_path}: a folder; .*as in {tmp_path}/best\.pt"):
        load_model(tmp_path)


def test_other_things_that_torch_saves(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = GoogLeNet(3, aux_logits=False)
    torch.save(model, path)
    with pytest.raises(ValueError, match=r"model\.pt is not a checkpoint: it contains more than tensors"):  # it would run code
        load_model(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"model\.pt is not a checkpoint: it holds a list"):
        load_model(path)
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"not a checkpoint of this version of train\.py, it lacks model, ema, classes, epoch"):
        load_model(path)


def test_lacking_and_contradicting(tmp_path: Path) -> None:
    old = checkpoints.state()
    del old["architecture"], old["preprocessing"]
    save_checkpoint(tmp_path / "old.pt", old)
    with pytest.raises(ValueError, match=r"old\.pt: .* it lacks architecture, preprocessing; name a best\.pt"):
        load_model(tmp_path / "old.pt")
    path = checkpoints.write(tmp_path / "a.pt", architecture={"num_classes": 3, "aux_logits": True})
    with pytest.raises(ValueError, match=r"not a checkpoint of this version of train\.py \('transform_input'\)"):
        load_model(path)
    path = checkpoints.write(tmp_path / "b.pt", architecture={"num_classes": 4, "aux_logits": True, "transform_input": False})
    with pytest.raises(
        ValueError, match=r"b\.pt: its weights are not those of the network that it describes \(.*size mismatch"
    ) as error:
        load_model(path)
    assert "\n" not in str(error.value)
