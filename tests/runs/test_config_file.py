"""`--config` and `--write-config`: files of settings."""

import dataclasses
import json
import math
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import train
from pipelines.augment import (
    Augmentation,
    AutoAugment,
    ColorJitter,
    HorizontalFlip,
    RandomErasing,
    RandomResizedCrop,
    Rotate,
)
from tests.helpers.command import Done, run_main
from tests.helpers.runs import arguments, assert_same
from tests.test_structure import run_without_torch
from tools.run.cli import parse
from tools.run.config import Config
from tools.run.config_file import read_settings, write_settings
from tools.run.recipes import RECIPES
from tools.run.resume import settings_of

DATA = ["--data.train", "a.tar", "--data.valid", "b.tar"]
# Texts that YAML 1.1 or 1.2 takes for something else if they are not quoted, and characters that it escapes.
TEXTS = (
    *(
        "",
        "no",
        "yes",
        "null",
        "Null",
        "true",
        "y",
        "~x~",
        "1",
        "012",
        "0o7",
        "0x1F",
        "1_0",
        "1e3",
        "1.",
        ".5",
        "-.inf",
        ".nan",
    ),
    *(
        "5:32",
        "2026-01-01",
        "=",
        "<<",
        "a: b",
        "a #b",
        "# b",
        "- a",
        "? a",
        "[a",
        "{a",
        "a, b]",
        "'",
        '"',
        "&a",
        "*a",
        "!a",
        "%a",
    ),
    *(
        "@a",
        "`a",
        "|",
        ">",
        " a ",
        "a\nb\n",
        "\n\n a\n",
        "\t",
        "a\rb",
        "ä ü",
        "😀",
        "\udcff",
        "\x85\u2028",
        "\ufeff",
        "\x1b[0m",
        "\\",
    ),
    *("train-{000000..000007}.tar", "s3://bucket/x y.tar", "x" * 300, "word " * 60),
)
FLOATS = (0.0, 1.0, 0.1, -3.5, 1e-3, 5e-5, 1e16, 1e22, 5e-324, 1.7e308, math.inf, 1 / 3)
AUGMENTATIONS = (HorizontalFlip(), Rotate(30, 1e-7), RandomErasing(area=(0.1, 0.2)), AutoAugment(), ColorJitter(hue=0.1))


def drawn(kind: Any, rng: random.Random) -> Any:
    """Draws a value of a type, without the checks of a class of settings."""
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if get_origin(kind) is tuple:
        number = rng.randrange(4) if get_args(kind)[-1] is ... else len(get_args(kind))
        return tuple(drawn(get_args(kind)[0], rng) for _ in range(number))
    if NoneType in get_args(kind):
        return rng.choice([None, drawn(get_args(kind)[0], rng)])
    if dataclasses.is_dataclass(kind) and kind is not Augmentation:
        settings = object.__new__(kind)
        hints = get_type_hints(kind)
        vars(settings).update({field.name: drawn(hints[field.name], rng) for field in dataclasses.fields(kind)})
        return settings
    draw = {
        bool: lambda: rng.random() < 0.5,
        int: lambda: rng.choice([0, 1, -1, 30, 2**63]),
        float: lambda: rng.choice(FLOATS),
        str: lambda: rng.choice(TEXTS),
        Path: lambda: Path(rng.choice([*filter(None, TEXTS), "~", "~root", "file:x", "a/~", "/a/b"])),
        Augmentation: lambda: rng.choice(AUGMENTATIONS),
    }
    return draw[kind]()


def saved(path: Path, config: Config) -> Path:
    """Writes config.json as a run does."""
    path.write_text(json.dumps(settings_of(config) | {"transform_input": False}, indent=2) + "\n")
    return path


@pytest.mark.parametrize("name", [*RECIPES, None])
def test_what_is_written_gives_the_same_settings(name: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*([] if name is None else ["--recipe", name]), *DATA, "--run-dir", "run", "--resume", "auto", "--optim.lr", "1e-3"]
    words += ["--data.augment", "rotate:degrees=30", "random-erasing:area=0.1..0.2,probability=1", "--init-from", "x.pth"]
    words += ["--data.size-schedule", "5:32", "--data.crop.ratio", "0.7", "1.5", "--checkpoint.every-minutes", "5"]
    config = parse(words)
    file = tmp_path / "run.yaml"
    with pytest.raises(SystemExit) as end:
        parse([*words, "--write-config", str(file)])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"{file} has all settings; python train.py --config {file} trains with them\n"
    assert parse(["--config", str(file)]) == config
    assert parse([f"--config={file}", "--seed", "5", "--resume", "no"]) == dataclasses.replace(config, seed=5, resume="no")
    # The config.json of a run: without its folder.
    there = saved(tmp_path / "config.json", config)
    assert parse(["--config", str(there)]) == dataclasses.replace(config, run_dir=None, resume="no")


def test_any_settings_survive_the_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(25):
        config = drawn(Config, rng)
        write_settings(tmp_path / f"{number}.yaml", config)
        assert read_settings(tmp_path / f"{number}.yaml", Config()) == config
        as_json = vars(config) | {"init_from": Path("x.pth")}  # unlike YAML, it does not tell ./~ from ~
        vars(config).update(as_json)
        again = read_settings(saved(tmp_path / "config.json", config), Config())
        assert vars(again) == as_json | {"run_dir": None, "resume": "no"}


def test_without_data_a_recipe_is_a_template(tmp_path: Path) -> None:
    file = tmp_path / "imagenet.yaml"
    with pytest.raises(SystemExit):
        parse(["--recipe", "imagenet", "--write-config", str(file)])
    with pytest.raises(ValueError, match="--recipe imagenet needs --data"):
        parse(["--config", str(file)])
    assert parse(["--config", str(file), *DATA]) == parse(["--recipe", "imagenet", *DATA])
    with pytest.raises(SystemExit):
        parse(["--write-config", str(tmp_path / "demo.yaml")])
    assert parse(["--config", str(tmp_path / "demo.yaml")]) == RECIPES["demo"]


def test_flags_come_before_the_file_and_the_file_before_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "recipe: paper\nepochs: 7\noptim:\n  lr: 1e-3\ndata: {train: a.tar, valid: file:///b.tar, crop: {scale: [0.5, 1]}}\n"
    )
    config, paper = parse(["--config", str(file), "--epochs", "9"]), RECIPES["paper"]
    assert config == dataclasses.replace(
        paper,
        epochs=9,
        optim=dataclasses.replace(paper.optim, lr=1e-3),
        data=dataclasses.replace(paper.data, train="a.tar", valid="/b.tar", crop=RandomResizedCrop(scale=(0.5, 1.0))),
    )
    assert parse(["--config", str(file), "--recipe", "paper"]) == parse(["--config", str(file)])
    file.write_text("epochs: 7\n")
    assert parse(["--config", str(file)]) == dataclasses.replace(RECIPES["demo"], epochs=7)
    assert parse(["--config", str(file), "--recipe", "paper", *DATA]).model == paper.model
    # Only all settings together are checked.
    file.write_text("resume: auto\noptim: {lr: -1}\ndata:\n  # train: x\n")
    assert parse(["--config", str(file), "--run-dir", "runs/a", "--optim.lr", "1"]).resume == "auto"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there are no settings in it; --write-config FILE writes a file with all of them"),
        ("# epochs: 3\n", "there are no settings in it; --write-config FILE writes a file with all of them"),
        ("- epochs\n", "settings (NAME: VALUE) are needed, not a list"),
        ("epochs", "settings (NAME: VALUE) are needed, not 'epochs'"),
        ("epochs: 3\n---\nepochs: 4\n", "line 2, column 1: but found another document"),
        ("epochs: 3\n\tseed: 1\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("epochs: [3\n", "line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        ("epochs: 3\nepochs: 4\n", "line 2, column 1: epochs is given more than once"),
        ("optim: {lr: 1, lr: 2}", "line 1, column 16: lr is given more than once"),
        ("a: &a [x]\nb: *a\n", "line 1, column 4: anchors (&), aliases (*) and tags (!) are not allowed"),
        ("epochs: !!int '3'", "line 1, column 9: anchors (&), aliases (*) and tags (!) are not allowed"),
        ("x: !!python/object/apply:os.system [ls]", "line 1, column 4: anchors (&), aliases (*) and tags (!) are not allowed"),
        ("3: x", "line 1, column 1: the name of a setting is needed"),
        ("? [a]\n: x", "line 1, column 3: the name of a setting is needed"),
        ("[" * 600, "brackets are nested too deeply"),
        ("a: " + "{a: " * 5000, "brackets are nested too deeply"),
        (b"epochs: 3 # \xff", "byte 12 is not UTF-8 text"),
        ("epochs: 3".encode("utf-16"), "byte 0 is not UTF-8 text"),
        ("epochs: 3 # \x1b[0m", "YAML does not allow the character U+001B"),
        (b" " * 1_000_001, "more than 1 MB is too much for a file of settings"),
        ("optim:\n  lrr: 1\n", "optim.lrr: there is no such setting (did you mean optim.lr?)"),
        ("batch-size: 8", "batch-size: there is no such setting (did you mean batch_size?)"),
        ("lr: 8", "lr: there is no such setting (did you mean optim.lr?)"),
        ("optin: {lr: 8}", "optin: there is no such setting (did you mean optim?)"),
        ("data: {crop: {scales: [1, 1]}}", "data.crop.scales: there is no such setting (did you mean data.crop.scale?)"),
        ("transform_input: true", "transform_input: there is no such setting (did you mean model.transform_input?)"),
        ("config: x.yaml", "config: there is no such setting"),
        ("optim.lr: 8", "optim.lr: names have no dots; write optim:, and indented below it lr:"),
        ('"\\e[0m": 8', r"\x1b[0m: there is no such setting"),
        ("q" * 100 + ": 8", "q" * 60 + ": there is no such setting"),
        ("<<: {epochs: 3}", "<<: there is no such setting"),
        ("optim: 3", "optim: a block of settings (NAME: VALUE) is needed, not 3"),
        ("optim: [lr]", "optim: a block of settings (NAME: VALUE) is needed, not a list"),
        ("epochs: 3.0", "epochs: an integer is needed, not 3.0"),
        ("epochs: true", "epochs: an integer is needed, not true"),
        ("epochs: '3'", "epochs: an integer is needed, not '3'"),
        ("epochs:", "epochs: an integer is needed, not null"),
        ("optim: {lr: fast}", "optim.lr: a number is needed, not 'fast'"),
        ("optim: {lr: yes}", "optim.lr: a number is needed, not 'yes'"),
        ("optim: {lr: 1" + "0" * 400 + "}", "optim.lr: a number is needed, not 1" + "0" * 59 + "…"),
        ("deterministic: yes", "deterministic: true or false is needed, not 'yes'"),
        ("deterministic: 1", "deterministic: true or false is needed, not 1"),
        ("compile: false", "compile: one of no, default, reduce-overhead, max-autotune is needed, not false"),
        ("recipe: papers", "recipe: one of demo, paper, "),
        ("data: {train: 3}", "data.train: text is needed, not 3"),
        ("data: {train: }", "data.train: text is needed, not null"),
        ('data: {train: "\\0"}', r"data.train: text is needed, not '\x00'"),
        ("data: {train: 'file:x'}", "data.train: file:x: a file URL is file:// and an absolute path, with three slashes"),
        ("run_dir: ''", "run_dir: a path is needed, not ''"),
        ("data: {quarantine: runs/a}", "data.quarantine: a list is needed, not 'runs/a'"),
        ("data: {quarantine: [a, [b]]}", "data.quarantine[1]: text is needed, not a list"),
        ("data: {crop: {scale: 0.5}}", "data.crop.scale: a list of 2 is needed, not 0.5"),
        ("data: {crop: {scale: [0.1, 0.2, 0.3]}}", "data.crop.scale: a list of 2 is needed, not a list"),
        ("data: {augment: [flip]}", "data.augment[0]: there is no augmentation 'flip'; there are auto-augment"),
        ("data: {augment: [rotate, 3]}", "data.augment[1]: text is needed, not 3"),
        ("data: {augment: [{degrees: 3}]}", "data.augment[0]: text is needed, not a block"),
        ("data: {augment: [{name: flip}]}", "data.augment[0]: there is no augmentation 'flip'"),
        ("data: {augment: [{name: rotate, angle: 3}]}", "data.augment[0]: rotate has no parameter 'angle'; it has"),
        ("data: {augment: [rotate:degrees=200]}", "data.augment[0]: rotate: degrees 200.0: from 0 to 180 is possible"),
        ("epochs: 0", "--epochs 0: at least 1 is needed"),
        ("optim: {lr: .nan}", "--optim.lr nan: a positive number is needed"),
        ("data: {crop: {scale: [0.5, 0.1]}}", "crop.scale 0.5 0.1: two finite numbers above 0 are needed, the smaller first"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file(content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the message follows
        parse(["--config", str(file), "--seed", "1"])
    assert str(raised.value).startswith(f"--config {file}: {message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("null", "there are no settings in it"),
        ("{'epochs': 3}", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"epochs": 3, "epochs": 4}', "epochs is given more than once"),
        ('{"optim": {"lr": 3, "lr": 4}}', "lr is given more than once"),
        ("[" * 5000, "brackets are nested too deeply"),
        ('{"run_dir": 3}', "run_dir: a path is needed, not 3"),
        ('{"transform_input": true, "modell": {}}', "modell: there is no such setting (did you mean model?)"),
    ],
)
def test_what_is_wrong_with_a_json_file(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        parse(["--config", str(tmp_path / "config.json")])
    assert str(raised.value).startswith(f"--config {tmp_path}/config.json: {message}")


def test_files_need_neither_torch_nor_dali(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("epochs: 3")
    words = ("--config", str(tmp_path / "run.yaml"), "--write-config", str(tmp_path / "all.yaml"))
    run_without_torch("from tools.run.cli import parse", "parse(sys.argv[1:])", *words)
    assert parse(["--config", str(tmp_path / "all.yaml")]).epochs == 3


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    regular = "a regular file is needed, such as the config.json in the folder of a run"
    for name, message in (("no", "No such file or directory"), ("", regular), ("pipe", regular)):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            parse(["--config", str(tmp_path / name)])
        assert str(raised.value) == f"--config {tmp_path / name}: {message}"
    (tmp_path / "there.yaml").write_text("mine")
    (tmp_path / "link.yaml").symlink_to("nowhere")
    for name, message in (
        ("there.yaml", "this file exists; name another one, or remove it"),
        ("link.yaml", "this file exists; name another one, or remove it"),
        ("no/x.yaml", f"there is no folder {tmp_path}/no"),
    ):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            parse(["--write-config", str(tmp_path / name)])
        assert str(raised.value) == f"--write-config {tmp_path / name}: {message}"
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_who_is_to_blame(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("recipe: paper\nepochs: 3\ndata: {sampler: balanced}\n")
    together = "--data.sampler balanced draws samples from all shards; omit --data.order blocks"
    for words, message in (
        (["--epochs", "0"], "--epochs 0: at least 1 is needed"),
        (["--epoch", "3"], "train.py has no option --epoch (did you mean --epochs?); train.py --help lists its options"),
        (["--data.order", "blocks"], f"--config {file} with these flags: {together}"),
        (["--recipe", "demo"], f"--recipe demo: --config {file} has recipe: paper, and its settings come before those of a "
         "recipe; omit --recipe, or remove recipe from the file"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            parse(["--config", str(file), *DATA, *words])
        assert str(raised.value) == message


def test_a_run_is_repeated_and_resumed(shards: Path, tmp_path: Path) -> None:
    def run(*words: object) -> Done:
        def main(words: Sequence[str]) -> None:
            train.main(words)
            sys.exit(0)  # after success, too, as at the end of the process

        return run_main(main, *words)

    first, again = tmp_path / "first", tmp_path / "again"
    assert run(*arguments(shards, first, "--epochs", 1, "--data.augment", "rotate")).status == 0
    done = run("--config", first / "config.json", "--run-dir", again)
    assert done.status == 0, done.stderr
    assert_same(again, first)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (first, again))
    assert after == before | {"run_dir": str(again), "resume": "no"}
    resume = ("--config", again / "config.json", "--run-dir", again, "--resume", "auto")
    assert run(*resume).status == 0
    done = run(*resume, "--optim.momentum", 0.5)
    assert done.status == 2
    assert "has other settings: --optim.momentum 0.9 before, --optim.momentum 0.5 now; " in done.stderr
