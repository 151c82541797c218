"""The command line of `throughput`."""

from collections.abc import Callable, Sequence

import tyro

from tools.bench.convert_options import Convert
from tools.bench.plan_options import Plan
from tools.bench.remote_options import Remote
from tools.bench.scale_options import Scale
from tools.bench.step_options import Step
from tools.cli import run_command
from tools.throughput.commands.compare import Compare
from tools.throughput.commands.loader import Loader
from tools.throughput.commands.model import Model
from tools.throughput.commands.train import Train
from tools.throughput.commands.tune import Tune

DESCRIPTION = """How fast things are here, against their peers and against what they cannot be faster than.

All competitors take turns in one run, on the same data and the same machine; what counts are the ratios.

Exit status: 0 done; 1 failed on the way, or a competitor did; 2 a mistake in the command or its input, said in one line; 130
interrupted."""

COMMANDS: dict[str, Callable[..., Compare | Convert | Loader | Model | Plan | Remote | Scale | Step | Train | Tune]] = {
    "compare": Compare,
    "convert": Convert,
    "loader": Loader,
    "model": Model,
    "plan": Plan,
    "remote": Remote,
    "scale": Scale,
    "step": Step,
    "train": Train,
    "tune": Tune,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit statuses are listed by `throughput --help`."""
    run_command(
        lambda: tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="throughput", description=DESCRIPTION, args=arguments).run()
    )
