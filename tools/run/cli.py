"""The command line of train.py. This module imports no torch, so `--help` and wrong flags are answered at once."""

import argparse
import sys
from collections.abc import Sequence

import tyro

from tools.cli import run_command
from tools.run.config import Config
from tools.run.recipes import DEMO_DATA, RECIPES


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Parses the command line. Flags override the settings of the recipe.

    Raises:
        ValueError: The settings do not go together.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument.split("=")[0] == "--evaluate" for argument in arguments):
        raise ValueError("--evaluate is a command of its own now: evaluate CHECKPOINT SHARDS")
    recipes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipes.add_argument("--recipe")
    recipe = recipes.parse_known_args(arguments)[0].recipe or "None"  # as tyro writes it
    config = tyro.cli(Config, args=arguments, prog="train.py", default=RECIPES.get(recipe, Config()))
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
    return tyro.cli(Config, args=arguments, prog="train.py", default=RECIPES["demo"])


def check_arguments() -> None:
    """Ends the process now for `--help` and for wrong flags."""

    def check() -> int:
        parse()
        return 0

    run_command(check, exits=False)
