"""The command line of `throughput`."""

from collections.abc import Callable, Sequence

import tyro

from tools.augmentation_lists import AUGMENTATION_LISTS
from tools.cli import run_command
from tools.parse import parse
from tools.throughput.options import Compare, Loader, Model, Options, Train

DESCRIPTION = """Measure the throughput of loader, model and training on this machine, and compare the loader with others.

All competitors take turns in one run, on the same data and the same machine. Their ratios are what counts.

Exit status: 0 success; 1 an error on the way, or a competitor failed; 2 a mistake in the command or its input, explained in one
line; 130 interrupted."""

COMMANDS: dict[str, Callable[..., Options]] = {"compare": Compare, "loader": Loader, "model": Model, "train": Train}


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(lambda: parse(_read, arguments).run())


def _read(words: list[str]) -> Options:
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="throughput", description=DESCRIPTION, args=words, registry=AUGMENTATION_LISTS
    )
