"""The command line of train.py. This module imports no torch, so `--help` and wrong flags are answered at once."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from tools.augmentation_lists import AUGMENTATION_LISTS
from tools.cli import command_line, run_command
from tools.parse import parse as parse_words
from tools.run.config import Config
from tools.run.recipes import DEMO_DATA, RECIPES
from tools.run.trackers.build import require_installed


@dataclass(frozen=True)
class _Flags(Config):
    """The settings, and the flags about their file."""

    config: Path | None = None
    """Read settings from this YAML file, or the config.json of a run. Flags override them, and they override the recipe."""
    write_config: Path | None = None
    """Write all settings to this new YAML file, with their help, and end. --config reads it."""


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Parses the command line. Flags override the settings of the file, and these override the settings of the recipe.

    Raises:
        ValueError: The file cannot be used, or the settings do not go together.
        SystemExit: After `--help` and `--write-config`.
    """
    arguments = command_line(arguments)
    if any(argument.split("=")[0] == "--evaluate" for argument in arguments):
        raise ValueError("--evaluate is a command of its own now: evaluate CHECKPOINT SHARDS")
    if sum(argument.split("=")[0] == "--log" for argument in arguments) > 1:  # tyro would take the last
        raise ValueError("--log is given more than once; name both after one: --log wandb mlflow")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--recipe", "--run-dir", "--config", "--write-config"):
        names = dict.fromkeys((flag, f"--{flag[2:].replace('-', '_')}"))  # tyro takes both spellings
        parser.add_argument(*names, nargs="?")  # tyro says that a value is missing
    early = parser.parse_known_args(arguments)[0]
    for flag, value, what in (
        ("--run-dir", early.run_dir, "folder"),
        ("--config", early.config, "file"),
        ("--write-config", early.write_config, "file"),
    ):
        if value == "":  # as a path, it would be the current folder
            raise ValueError(f"{flag} has an empty value; name a {what}")
    path = Path(early.config) if early.config else None
    recipe = _recipe(early.recipe, path)
    config = _read(arguments, RECIPES.get(recipe, Config()), path)
    if recipe == "None" and not (config.data.train or config.data.valid):
        config = _read(arguments, RECIPES["demo"], path)
    if early.write_config:
        from tools.run.config_file import write_settings

        write_settings(Path(early.write_config), config)
        print(f"{early.write_config} has all settings; python train.py --config {early.write_config} trains with them")
        raise SystemExit(0)
    _require_inputs(config)
    return config


def _recipe(given: str | None, path: Path | None) -> str:
    """Returns the name of the recipe of the command line or the file; "None" if there is none, as tyro writes it.

    Raises:
        ValueError: The file cannot be used, or it names another recipe than the command line.
    """
    recipe = given or "None"
    if path is None:
        return recipe
    from tools.run.config_file import read_settings  # YAML takes time to import

    own = read_settings(path, RECIPES.get(recipe, Config())).recipe
    if given in (*RECIPES, "None") and str(own) != given:
        raise ValueError(
            f"--recipe {given}: --config {path} has recipe: {own or 'null'}, and its settings come before those of a recipe; "
            "omit --recipe, or remove recipe from the file"
        )
    return given or str(own)


def _require_inputs(config: Config) -> None:
    """Raises a `ValueError` if the settings lack data, weights or packages that they need."""
    is_given = {split: getattr(config.data, split) not in ("", str(DEMO_DATA)) for split in ("train", "valid")}
    if is_given["train"] != is_given["valid"]:
        given, missing = ("train", "valid") if is_given["train"] else ("valid", "train")
        raise ValueError(f"--data.{given} is given and --data.{missing} is not; training needs both")
    if config.recipe == "finetune" and config.init_from is None:
        raise ValueError("--recipe finetune needs --init-from, the initial weights, such as --init-from torchvision")
    if not config.data.train and config.recipe not in (None, "demo"):
        raise ValueError(f"--recipe {config.recipe} needs --data.train and --data.valid")
    require_installed(config.log)


def _read(arguments: Sequence[str], base: Config, path: Path | None) -> Config:
    """Reads the flags on top of a file and a recipe. What a check refuses is said to be in the file only if it is there."""
    if path is None:
        return _read_flags(arguments, base)
    from tools.run.config_file import read_settings

    settings = read_settings(path, base)
    try:
        return _read_flags(arguments, settings)
    except ValueError as error:
        for flags, below, culprit in (([], settings, f"--config {path}: "), (arguments, base, "")):
            try:
                _read_flags(flags, below)
            except ValueError as same:
                if str(same) == str(error):
                    raise ValueError(f"{culprit}{error}") from None
        raise ValueError(f"--config {path} with these flags: {error}") from None


def _read_flags(arguments: Sequence[str], base: Config) -> Config:
    def read(words: list[str]) -> Config:
        default = object.__new__(_Flags)  # not checked: flags may replace what a check would refuse
        vars(default).update(vars(base), config=None, write_config=None)
        flags = tyro.cli(
            _Flags, args=words, prog="train.py", description=Config.__doc__, default=default, registry=AUGMENTATION_LISTS
        )
        return Config(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Config)})

    return parse_words(read, arguments)


def check_arguments() -> None:
    """Ends the process now for `--help` and for wrong flags."""

    def check() -> int:
        parse()
        return 0

    run_command(check, exits=False)
