"""The steps of each proof, in their order, with their time limits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Name = Literal["quick", "peers"]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What the steps of a proof work on."""

    device: str  # "cuda", or "cpu" for a rehearsal, whose measurements mean nothing
    work: Path  # folder for data, logs and results

    @property
    def is_rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def originals(self) -> Path:
        """Shards of drawn images of ImageNet's size."""
        return self.work / "data" / "originals"

    @property
    def resized(self) -> Path:
        """Shards of smaller images, as `shards convert --resize 256` makes them."""
        return self.work / "data" / "resized"


SECONDS: dict[Name, int] = {"quick": 480, "peers": 300}

# The steps, and their time limits in seconds. The most important come first, because the machine may be lost at any time.
PLANS: dict[Name, dict[str, int]] = {
    "quick": {
        "data": 40,
        "pipelines": 60,
        "damaged": 45,
        "waits": 45,
        "step": 100,
        "decode": 110,
        "job-originals": 80,
        "job-resized": 80,
        "tests": 120,
        "compiled": 90,
    },
    "peers": {"data": 40, "compare-train": 125, "compare-valid": 125},
}
