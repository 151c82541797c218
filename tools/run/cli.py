"""The command line of train.py. This module imports no torch, so `--help` and wrong flags are answered at once."""

import argparse
import traceback
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
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?")  # tyro says that a value is missing
    parser.add_argument("--run-dir", nargs="?")
    early = parser.parse_known_args(arguments)[0]
    recipe = early.recipe or "None"  # as tyro writes it
    if early.run_dir == "":  # as a path, it would be the current folder
        raise ValueError("--run-dir has an empty value; name a folder")
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
    def read(words: list[str]) -> Config:
        try:
            return tyro.cli(Config, args=words, prog="train.py", default=default)
        except SystemExit as end:  # tyro has printed the error of a check, wrapped in a frame
            error = end.__context__
            while error is not None and type(error) is not ValueError:
                error = error.__context__
            if error is not None and _place(error).partition(".")[0] != "tyro":
                raise error from None
            raise

    return parse_words(read, arguments)


def _place(error: BaseException) -> str:
    """Returns the name of the module that raised an error."""
    frame, _ = [*traceback.walk_tb(error.__traceback__)][-1]
    return str(frame.f_globals["__name__"])


def check_arguments() -> None:
    """Ends the process now for `--help` and for wrong flags."""

    def check() -> int:
        parse()
        return 0

    run_command(check, exits=False)
