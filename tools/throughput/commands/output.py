"""Where the figures of every command go, and what is asked of paths before anything is measured."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from tools.throughput.report import Report


def check_place(option: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ValueError(f"{option} {path}: this is a folder; name a file in it")


def as_seen_from_here(program: str) -> str:
    """A path to it that holds in other folders too, where competitors run; a bare name is found on PATH."""
    return os.path.abspath(program) if os.sep in program else program


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a measurement goes, beside the table that is printed."""

    json: Path | None = None
    """File to write all figures to: every turn, medians with their intervals, hardware, versions."""
    plot: Path | None = None
    """File to draw the medians to as bars with their intervals, a PNG; needs matplotlib, the extra `plot`."""

    def check(self) -> None:
        """Whether there is somewhere to write, before anything is measured.

        Raises:
            ValueError: A file has no folder, or is one, or nothing is there that draws.
        """
        for option, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None:
                check_place(option, path)
        if self.plot is None:
            return
        if self.plot.suffix != ".png":
            raise ValueError(f"--plot {self.plot}: a PNG is drawn; end the name with .png")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib, which is not installed; pip install 'googlenet-dali[plot]'")

    def publish(self, report: Report) -> None:
        """Prints the table; writes and draws the figures."""
        print(report, flush=True)
        if self.json is not None:
            self.json.write_text(report.as_json() + "\n")
        if self.plot is not None:
            from tools.throughput.chart import draw

            draw(report, self.plot)
