"""The command line of `python -m tools.export`."""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tools.cli import run_command

EPILOG = """Exit status: 0 written; 1 not written, since something failed on the way or the file does not give what the network
gives; 2 a mistake in the command or its input, said in one line; 130 interrupted."""


@dataclass(frozen=True)
class Export:
    """Write a trained network to a file that needs none of this project: ONNX, or torch.export's.

    Input: `images`, float32 (N, 3, SIZE, SIZE), RGB from 0 to 1; the normalization is inside. N is free, SIZE is that of the
    checkpoint. Output: `probabilities`, float32 (N, classes). The file holds the classes' names and how images are to be
    resized. Before it gets its name its outputs are compared with those of the network.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """best.pt or last.pt of a run."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """File to write, .onnx or .pt2; replaced where there is one."""
    weights: Literal["ema", "raw"] = "ema"
    """ema: averaged over the steps of training. raw: those of the last step."""
    check: tuple[str, ...] = ()
    """Image files, folders or shards to compare the outputs on, the first 64 images; by default on drawn ones."""
    split: str = "valid"
    """Of shards in a folder with several splits."""

    def run(self) -> int:
        from model.load_model import load_trained
        from tools.export.export import DifferentError, export
        from tools.export.formats import format_of

        file_format = format_of(self.output)
        trained = load_trained(self.checkpoint, self.weights)
        try:
            print(export(trained, self.output, file_format, self.check, self.split))
        except DifferentError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit statuses are listed by `--help`."""
    description = f"{inspect.getdoc(Export)}\n\n{EPILOG}"
    run_command(
        lambda: tyro.cli(Export, prog="python -m tools.export", description=description, args=arguments).run(),
    )
