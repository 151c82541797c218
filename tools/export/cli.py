"""The command line of `export`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model.config import Arch, check_arch
from tools.cli import run_command
from tools.parse import parse


@dataclass(frozen=True)
class Export:
    """Write a trained network to an ONNX or torch.export file, which runs without this project.

    The input `images` is (N, 3, SIZE, SIZE), RGB; the file includes the normalization. N is free, and SIZE comes from the
    checkpoint. The output `probabilities` is float32 (N, classes). The file also stores the class names and how images are
    resized. It is written only if its outputs agree with those of the network.

    Exit status: 0 if the file was written; 1 if an error occurred or the outputs differ; 2 for a mistake in the command or its
    input; 130 if interrupted.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """The best.pt or last.pt of a run."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """File to write, .onnx or .pt2. An existing file is replaced."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """auto: those that scored better in validation. ema: averaged over the training steps. raw: from the last step."""
    input: Literal["float32", "uint8"] = "float32"
    """Type of the input: float32 from 0 to 1, or uint8 from 0 to 255, as servers have it."""
    arch: str = ""
    """Factory of the checkpoint's network, as --model.arch of train.py. By default, GoogLeNet."""
    options: tuple[str, ...] = ()
    """Other arguments of the factory, as --model.options of train.py."""
    check: tuple[str, ...] = ()
    """Image files, folders or shards whose first 64 images are used to compare outputs. Default: synthetic images."""
    split: str = "valid"
    """Split to read from a folder of shards that holds several."""

    def run(self) -> int:
        from model.load_model import load_model
        from tools.export.export import MismatchError, export
        from tools.export.formats import choose_format

        check_arch("", self.arch, self.options)
        file_format = choose_format(self.output)
        trained = load_model(self.checkpoint, self.weights, arch=Arch(self.arch, self.options))
        try:
            print(export(trained, self.output, file_format, self.check, self.split, self.input))
        except MismatchError as error:
            print(f"error: {self.output} was not written: {error}", file=sys.stderr)
            return 1
        return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. `--help` lists the exit statuses."""
    run_command(lambda: parse(lambda words: tyro.cli(Export, prog="export-model", args=words), arguments).run())
