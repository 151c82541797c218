"""The command line of `report`."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.files import replace_bytes
from pipelines.printable import counted, printable
from tools.cli import check_output, run_command
from tools.parse import parse


@dataclass(frozen=True)
class Report:
    """Plot training runs over each other: losses, accuracy, learning rate and throughput.

    A run that is still in progress is plotted up to its last line. Needs matplotlib: pip install -e '.[plot]'.

    Exit status: 0 on success; 1 if an error occurred, such as a full disk; 2 for a mistake in the command or its input; 130 if
    interrupted.
    """

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")
    ]
    """Run folders written by train.py."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE", help_behavior_hint="")] = None
    """A self-contained .html page, or a .png of the charts. Default: report.html in the first run folder."""

    def run(self) -> int:
        self._check()
        from tools.report.runs import read_runs

        runs = read_runs(self.runs)
        from tools.report.charts import draw_png
        from tools.report.page import page

        output = self.output or self.runs[0] / "report.html"
        replace_bytes(output, draw_png(runs) if output.suffix.lower() == ".png" else page(runs))
        print(f"{printable(str(output))}: {counted(len(runs), 'run')}, {output.stat().st_size / 1000:,.0f} kB")
        return 0

    def _check(self) -> None:
        output = self.output
        if not self.runs:
            raise ValueError("no runs given; name one or more run folders, for example runs/20260101-120000-1234")
        if output is not None:
            if output.suffix.lower() not in (".html", ".png"):
                raise ValueError(f"--output {output}: the name has to end in .html or .png")
            check_output("--output", output)
            if output.exists() and not output.is_file():
                raise ValueError(f"--output {output}: exists, and is not a file; name another")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("matplotlib, which draws the charts, is not installed; pip install -e '.[plot]'")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. `--help` lists the exit statuses."""
    run_command(lambda: parse(lambda words: tyro.cli(Report, prog="report", args=words), arguments).run())
