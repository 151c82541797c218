"""The command line of train.py. This module imports no torch, so `--help` and wrong flags are answered at once."""

import argparse
from collections.abc import Sequence

import tyro

from tools.cli import command_line, run_command
from tools.parse import parse as parse_words
from tools.run.config import Config
from tools.run.recipes import DEMO_DATA, RECIPES


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Parses the command line. Flags override the settings of the recipe.

    Raises:
        ValueError: The settings do not go together.
    """
    arguments = command_line(arguments)
    if any(argument.split("=")[0] == "--evaluate" for argument in arguments):
        raise ValueError("--evaluate is a command of its own now: evaluate CHECKPOINT SHARDS")
    recipes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipes.add_argument("--recipe")
    recipe = recipes.parse_known_args(arguments)[0].recipe or "None"  # as tyro writes it
    config = _read(arguments, RECIPES.get(recipe, Config()))
    is_given = {split: getattr(config.data, split) not in ("", str(DEMO_DATA)) for split in ("train", "valid")}
    if is_given["train"] != is_given["valid"]:
        given, missing = ("train", "valid") if is_given["train"] else ("valid", "train")
        raise ValueError(f"--data.{given} is given and --data.{missing} is not; training needs both")
    if recipe == "finetune" and config.init_from is None:
        raise ValueError("--recipe finetune needs --init-from, the initial weights")
    if config.data.train:
        return config
    if recipe != "None":
        raise ValueError(f"--recipe {recipe} needs --data.train and --data.valid")
    return _read(arguments, RECIPES["demo"])


def _read(arguments: Sequence[str], default: Config) -> Config:
    return parse_words(lambda words: tyro.cli(Config, args=words, prog="train.py", default=default), arguments)


def check_arguments() -> None:
    """Ends the process now for `--help` and for wrong flags."""

    def check() -> int:
        parse()
        return 0

    run_command(check, exits=False)
