"""The options of `throughput compare`."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tools.throughput.commands.output import Output, as_seen_from_here


@dataclass(frozen=True)
class Compare(Output):
    """Measure this project's loader against others, with the same images and the same work.

    `train` is a random resized crop, flip and normalization; `valid` resizes, crops the centre and normalizes. Each turn is a
    process of its own, which gives images epoch after epoch. Ratios are to DALI as its documentation has it. Peers that are
    not installed are named and left out.

    The decoder alone, beside them, decodes whole images in memory on all cores. It is no bound: in `train` DALI decodes no more
    of an image than the crop needs, and others have other decoders. On a GPU it is left out, and torchvision's decoding there
    takes part.
    """

    shards: tyro.conf.Positional[str]
    """Training shards, as --data.train takes them; local ones."""
    splits: tuple[Literal["train", "valid"], ...] = ("train", "valid")
    """What is done to the images."""
    rounds: int = 6
    """Turns of each loader; six are the fewest whose median has an interval of 95 %."""
    images: int = 2048
    """That a loader gives in a turn, once it is warm. All read the first shards that hold so many, one a thread at least."""
    batch_size: int = 64
    """Images a batch."""
    image_size: int = 224
    """Side of the images, pixels."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the batches are wanted, as --device of train.py."""
    threads: int | None = None
    """Threads or processes that decode; by default one a CPU."""
    only: tuple[str, ...] = ()
    """Names of loaders; a name that is not there gets the list of those that are. DALI is always there."""
    peers_python: str = sys.executable
    """Interpreter of an environment in which peers are installed (torchvision, litdata, mosaicml-streaming, spdl,
    ffcv)."""
    scratch: Path | None = None
    """Folder for what the loaders need to have written, made if need be; by default the system's for temporary files.
    Nothing is left in it."""

    def run(self) -> int:
        self.check()
        import tempfile

        from model.distributed import choose_device
        from tools.throughput.compare import benchmark

        report = benchmark(
            self.shards,
            splits=self.splits,
            rounds=self.rounds,
            images=self.images,
            batch_size=self.batch_size,
            image_size=self.image_size,
            device=str(choose_device(self.device)),
            threads=len(os.sched_getaffinity(0)) if self.threads is None else self.threads,
            only=self.only,
            peers_python=as_seen_from_here(self.peers_python),
            scratch=self.scratch or Path(tempfile.gettempdir()),
        )
        self.publish(report)
        return 1 if any(result.error for result in report.results) else 0
