"""The command line of `shards`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Convert:
    """Turn a folder of class folders into the shards of one split.

    SRC/CLASS/.../IMAGE is the layout. The images' bytes are copied unchanged, in an order shuffled once over the whole set.
    Images that training could not decode are left out and listed in DST/rejected.jsonl. A second split of the same data set
    goes into the same DST under another --name and must use the same classes.
    """

    src: tyro.conf.Positional[Path]
    """Folder with one folder a class."""
    dst: tyro.conf.Positional[Path]
    """Folder of the data set; gets NAME-000000.tar, NAME-000000.idx, ... and _info.json."""
    name: str = "train"
    """Name of the split: 'train' and 'valid' are what train.py looks for."""
    shard_samples: int = 1000
    """Samples in a shard."""
    seed: int = 0
    """Seed of the shuffle."""
    overwrite: bool = False
    """Replace the split if it is there already."""

    def run(self) -> None:
        from tools.shards.convert import convert

        print(
            convert(
                self.src,
                self.dst,
                name=self.name,
                shard_samples=self.shard_samples,
                seed=self.seed,
                overwrite=self.overwrite,
            )
        )


@dataclass(frozen=True)
class Info:
    """Show the splits of a data set: shards, samples, classes, bytes."""

    dst: tyro.conf.Positional[Path]
    """Folder that `shards convert` wrote."""

    def run(self) -> None:
        from tools.shards.info import describe

        print(describe(self.dst))


@dataclass(frozen=True)
class Demo:
    """Draw the embedded image set, ten kinds of figures, and convert it to shards."""

    dst: tyro.conf.Positional[Path]
    """Folder of the data set."""
    train_samples: int = 2000
    """Images to train on."""
    valid_samples: int = 500
    """Images to validate with."""
    seed: int = 0
    """Seed of the drawing and of the shuffle."""
    overwrite: bool = False
    """Replace the splits if they are there already."""

    def run(self) -> None:
        from tools.shards.demo import make_demo

        for summary in make_demo(
            self.dst,
            train_samples=self.train_samples,
            valid_samples=self.valid_samples,
            seed=self.seed,
            overwrite=self.overwrite,
        ):
            print(summary, flush=True)


Command = (
    Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Exit status: 0 done; 1 failed on the way; 2 something that the user can mend, said in one line."""
    try:
        command: Convert | Info | Demo = tyro.cli(
            Command,
            prog="shards",
            description="Image collections in, WebDataset shards out.",
            args=arguments,
        )
        command.run()
    except BrokenPipeError:  # whoever read the output, `head` for one, has gone
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
