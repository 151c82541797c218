"""The command line of a proof: `python -m tools.bench.gpu_proof --help`."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pipelines.files import make_writable
from tools.bench.gpu_proof.driver import Proof
from tools.bench.gpu_proof.plan import PLANS, SECONDS, Name, Setup
from tools.cli import run_command
from tools.parse import parse


@dataclass(frozen=True)
class Options:
    """Prove and measure the GPU path within minutes. The result of each step is written as soon as the step ends.

    Exit status: 0 all steps succeeded; 1 a step failed; 2 a mistake in the command; 130 interrupted.
    """

    plan: tyro.conf.Positional[Name]
    """quick: tests, the training step, decoding, whole jobs. peers: other loaders on the same images."""
    out: tyro.conf.Positional[Path]
    """Folder for summary.json and proof.tar.gz; made if necessary."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu rehearses the plan with small figures."""
    seconds: float | None = None
    """Time limit of the proof; by default 480 for quick and 300 for peers."""
    steps: tuple[str, ...] = ()
    """Run only these steps of the plan."""
    work: Path | None = None
    """Folder for data and logs, which stays; by default a temporary one."""

    def run(self) -> int:
        known = [*PLANS[self.plan]]
        for name in self.steps:
            if name not in known:
                raise ValueError(f"--steps {name}: {self.plan} has no such step; it has {', '.join(known)}")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"--seconds {self.seconds:g}: a finite number above 0 is needed")
        make_writable(self.out, "name another folder")
        with tempfile.TemporaryDirectory(prefix="gpu-proof-") as temporary:
            work = self.work or Path(temporary)
            make_writable(work, "name another folder with --work")
            if any(work.iterdir()):
                raise ValueError(f"--work {work}: this folder is not empty; name another one")
            proof = Proof(self.plan, Setup(self.device, work.absolute()), self.out)
            return 0 if proof.run(self.steps or known, self.seconds or SECONDS[self.plan]) else 1


def main(arguments: Sequence[str] | None = None) -> None:
    prog = "python -m tools.bench.gpu_proof"
    run_command(lambda: parse(lambda words: tyro.cli(Options, prog=prog, args=words), arguments).run())


if __name__ == "__main__":
    main()
