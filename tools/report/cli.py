"""The command line of the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tools.cli import run_command

DESCRIPTION = """Draw what runs have left behind, one over the other: losses, accuracy, learning rate, throughput.

Runs that are still going are drawn as far as they have come. Needs matplotlib: pip install 'googlenet-dali[plot]'.

Exit status: 0 done; 1 failed on the way, such as on a full disk; 2 a mistake in the command or its input, said in one line; 130
interrupted."""


@dataclass(frozen=True)
class Report:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, as train.py writes them."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write: .html, a page with charts and tables that needs no other file, or .png, the charts alone. By default
    report.html in the first run's folder."""

    def run(self) -> int:
        from tools.report.write import write_report

        print(write_report(self.runs, self.output))
        return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit statuses are listed by `--help`."""
    run_command(lambda: tyro.cli(Report, prog="python -m tools.report", description=DESCRIPTION, args=arguments).run())
