"""Which steps a proof has, in their order, and how long each may take."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Name = Literal["quick", "peers"]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Ground:
    """What the steps of a proof work on.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal, which measures next to nothing.
        work: Folder for data, logs and results.
    """

    device: str
    work: Path

    @property
    def is_rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def originals(self) -> Path:
        """Shards of images as ImageNet has them, drawn."""
        return self.work / "data" / "originals"

    @property
    def resized(self) -> Path:
        """Shards of smaller images, as `shards convert --resize 256` makes them."""
        return self.work / "data" / "resized"


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: The name of its function in `tools/bench/gpu_proof/steps.py`, `-` for `_`.
        seconds: After so many it is ended.
    """

    name: str
    seconds: int

    def run(self, ground: Ground) -> Iterator[Figures]:
        """Does it, in this process; gives what goes into the summary, part by part."""
        from tools.bench.gpu_proof import steps  # takes seconds to import, and whoever starts the steps needs none of it

        function: Callable[[Ground], Iterator[Figures]] = getattr(steps, self.name.replace("-", "_"))
        yield from function(ground)


# The most important first: a machine that is lost takes little with it.
PLANS: dict[Name, tuple[Step, ...]] = {
    "quick": (
        Step("data", 40),
        Step("pipelines", 60),
        Step("damaged", 45),
        Step("waits", 45),
        Step("step", 100),
        Step("decode", 110),
        Step("job-originals", 80),
        Step("job-resized", 80),
        Step("tests", 120),
        Step("compiled", 90),
    ),
    "peers": (Step("data", 40), Step("compare-train", 125), Step("compare-valid", 125)),
}
