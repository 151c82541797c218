"""The options of `throughput convert`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from tools.throughput.commands.output import Output, as_seen_from_here


@dataclass(frozen=True)
class Convert(Output):
    """Measure the conversion of images to shards.

    Three groups: `copied` writes the images as they are, against tar; `checked` decodes each of them first, against the decoder
    alone; `resized` writes smaller JPEGs, against decoding, resizing and encoding alone. Files are read from the page cache.
    Peers that are not installed are named and left out.
    """

    src: tyro.conf.Positional[Path]
    """Folder with one folder a class."""
    rounds: int = 5
    """Turns of each competitor."""
    images: int | None = None
    """So many images, repeated where SRC has fewer; by default those that there are."""
    scratch: Path | None = None
    """Folder for what the competitors write, left empty; by default the system's for temporary files."""
    resize: int = 256
    """Shorter side in pixels of the group `resized`."""
    quality: int = 90
    """Quality of its JPEGs, 1 to 100."""
    only: tuple[str, ...] = ()
    """Names of competitors or of groups; a name that is not there gets the list of those that are."""
    peers_python: str = sys.executable
    """Interpreter of an environment in which peers are installed (litdata, mosaicml-streaming, img2dataset, opencv)."""

    def run(self) -> int:
        self.check()
        import tempfile

        from tools.bench.convert import benchmark

        report = benchmark(
            self.src,
            rounds=self.rounds,
            images=self.images,
            scratch=self.scratch or Path(tempfile.gettempdir()),
            resize=self.resize,
            quality=self.quality,
            only=self.only,
            peers_python=as_seen_from_here(self.peers_python),
        )
        self.publish(report)
        return 1 if any(result.error for result in report.results) else 0
