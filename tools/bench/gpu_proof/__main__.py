"""The command line of a proof: `python -m tools.bench.gpu_proof --help`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

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
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="gpu-proof-") as temporary:
            work = (self.work or Path(temporary)).absolute()
            if any(work.glob("*")):
                raise ValueError(f"--work {work} holds another proof; name another folder")
            work.mkdir(parents=True, exist_ok=True)
            proof = Proof(self.plan, Setup(self.device, work), self.out)
            return 0 if proof.run(self.steps or known, self.seconds or SECONDS[self.plan]) else 1


if __name__ == "__main__":
    run_command(lambda: parse(lambda words: tyro.cli(Options, prog="python -m tools.bench.gpu_proof", args=words), None).run())
