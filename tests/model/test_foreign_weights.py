"""`--init-from` with files of other programs: where their weights are found, and which input they need."""

import argparse
import importlib.util
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model.checkpoint import save_checkpoint
from model.ema import averaged_weights
from model.init_from import InitialWeights, read_initial_weights
from model.load_model import load_model
from tests.helpers import checkpoints
from tests.model.test_init_from import OFF, ON, UNKNOWN, State, make_state


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def make_small(*, transform_input: bool = True) -> State:
    """Returns the small tensors of a network, among them those of the first layer. Reading does not need the others."""
    state = make_state(3, transform_input=transform_input)
    return {name: value for name, value in state.items() if value.numel() < 10_000}


def read(path: Path, **options: Any) -> InitialWeights:
    found = read_initial_weights(path, **options)
    assert found is not None
    return found


def is_same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_common_prefix_is_removed(tmp_path: Path, *, is_old: bool) -> None:
    path, state = tmp_path / "weights.pth", make_small()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.", "net.0.module."):
        torch.save(prefixed(state, prefix), path, _use_new_zipfile_serialization=not is_old)
        found = read(path)
        assert is_same(found.state, state)
        assert found.which == f", without the prefix '{prefix}'"


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


@pytest.mark.parametrize(
    ("wrap", "which"),
    [
        (lambda state, _: {"state_dict": state, "epoch": 3, "optimizer": OPTIMIZER}, ", its 'state_dict'"),
        (lambda state, _: {"model": state, "lr_scheduler": {"milestones": Counter([3, 5])}}, ", its 'model'"),  # MultiStepLR's
        (lambda state, _: {"model_state_dict": state, "loss": 0.5}, ", its 'model_state_dict'"),
        (
            lambda state, other: {"model": other, "model_ema": prefixed(state, "module.") | {"n_averaged": torch.tensor(9)}},
            ", its 'model_ema', without the prefix 'module.', not taken: model, n_averaged",
        ),
        (lambda state, other: {"state_dict": other, "state_dict_ema": state}, ", its 'state_dict_ema', not taken: state_dict"),
        (
            lambda state, _: {"state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(3)}},
            ", its 'state_dict', without the prefix 'model.', not taken: criterion.weight",
        ),
        (lambda state, other: prefixed(state, "student.") | prefixed(other, "teacher."), None),
    ],
)
def test_weights_are_found_one_level_down(
    tmp_path: Path, wrap: Callable[[State, State], dict[str, Any]], which: str | None
) -> None:
    path, state = tmp_path / "checkpoint.pth", make_small()
    torch.save(wrap(state, make_small(transform_input=False)), path)
    found = read(path)
    assert is_same(found.state, state)
    assert which is None or found.which == which
    if which is None:
        assert found.which.startswith(", without the prefix 'student.', not taken: teacher.*, teacher.conv1.")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"),
        (lambda state: {"state_dict": prefixed(state, "model."), "path": Path("x")}, "pathlib"),
        (lambda state: {"module": torch.nn.Linear(2, 2), "state_dict": state}, "torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("is_old", [False, True])
def test_objects_are_not_loaded_and_the_command_to_extract_the_weights_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Callable[[State], dict[str, Any]], named: str, *, is_old: bool
) -> None:
    path, state = tmp_path / "their checkpoint.pth", make_small()
    torch.save(content(state), path, _use_new_zipfile_serialization=not is_old)
    with pytest.raises(
        ValueError, match=f"it contains more than tensors and plain values, which is not loaded: .*{named}"
    ) as no:
        read(path)
    text = str(no.value)
    assert "\n" not in text
    assert "safe_globals" not in text
    before, command = text.split(": python ")
    assert "weights_only" not in before
    option, code, *words = shlex.split(command)
    assert (option, words) == ("-c", [str(path), "weights.pth"])
    monkeypatch.setattr(sys, "argv", ["-c", *words])
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert is_same(read(tmp_path / "weights.pth").state, state)


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("is_old", [False, True])
def test_no_code_runs(tmp_path: Path, protocol: int, *, is_old: bool) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"a": RunsCode(tmp_path / "ran")}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not is_old)
    with pytest.raises(ValueError, match="which is not loaded"):
        read(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_installed", [False, True])
def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_installed: bool) -> None:
    path, header = tmp_path / "googlenet.safetensors", b'{"fc.bias": {}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    library = argparse.Namespace(load_file=lambda path: make_state(3))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: library if is_installed else None)
    monkeypatch.setattr(importlib, "import_module", lambda name: library)
    if is_installed:
        assert is_same(read(path).state, make_state(3))
        return
    with pytest.raises(
        ValueError, match=r"is a file of safetensors, and safetensors is not installed; pip install safetensors$"
    ):
        read(path)


def test_which_input_the_weights_need(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is decided by the statistics of the weights. The form of the file does not matter, and the setting overrides it."""
    path = tmp_path / "weights.pth"
    renormalized, normalized = make_small(), make_small(transform_input=False)
    untrained = {**normalized, "conv1.bn.running_mean": torch.zeros(64), "conv1.bn.running_var": torch.ones(64)}
    unusual = {**normalized, "conv1.bn.running_var": normalized["conv1.bn.running_var"] * 0.35}
    caplog.set_level("INFO", "train")
    for state, text in ((renormalized, ON), (normalized, OFF), (untrained, UNKNOWN), (unusual, UNKNOWN)):
        for content in (state, {"model": prefixed(state, "module.")}):
            torch.save(content, path)
            caplog.clear()
            assert read(path).choose_transform_input(None) == (text == ON)
            assert caplog.messages == [text.strip()]
            for setting, word in ((True, "on, as --model.transform-input"), (False, "off, as --model.transform-input")):
                caplog.clear()
                assert read(path).choose_transform_input(setting) == setting
                assert caplog.messages == [f"transform_input: {word} says"]


@pytest.mark.parametrize(("scores", "better"), [((63.4, 58.8), "raw"), ((58.8, 63.4), "ema"), ((50.0, 50.0), "ema")])
def test_a_checkpoint_gives_its_better_weights(tmp_path: Path, scores: tuple[float, float], better: str) -> None:
    path = checkpoints.write(tmp_path / "best.pt", scores={"top1": scores[0], "ema_top1": scores[1], "top5": 90.0})
    both = {"raw": checkpoints.state()["model"], "ema": averaged_weights(checkpoints.state()["ema"])}
    for weights, expected in (("auto", better), ("raw", "raw"), ("ema", "ema")):
        found = read(path, weights=weights)
        assert is_same(found.state, both[expected])
        why = load_model(path, weights).why
        assert found.which == f", weights: {expected} ({why})"


def test_the_run_records_its_choice(shards: Path, tmp_path: Path) -> None:
    """Also for the best.pt that the run itself leaves."""
    torch.save(prefixed(make_state(3, aux_logits=False), "module."), tmp_path / "weights.pth")
    common = (
        *("--data.train", shards, "--data.valid", shards, "--epochs", 1, "--batch-size", 30, "--image-size", 32),
        *("--device", "cpu", "--torch-threads", 1, "--model.no-aux-logits"),
    )
    for source, run, is_on in ((tmp_path / "weights.pth", "a", True), (tmp_path / "a" / "best.pt", "b", True)):
        train.main([*map(str, (*common, "--init-from", source, "--run-dir", tmp_path / run))])
        assert json.loads((tmp_path / run / "config.json").read_text())["transform_input"] is is_on


def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    state = checkpoints.state()
    state["model"] = {**state["model"], "fc.weight": torch.zeros(1).expand(3, 1024)}
    save_checkpoint(tmp_path / "best.pt", state)
    with pytest.raises(ValueError, match=r"\(model: fc.weight is a tensor that lacks the memory of its values\)"):
        read(tmp_path / "best.pt", weights="raw")
