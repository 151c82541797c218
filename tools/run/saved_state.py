"""Checks a checkpoint before a run resumes from it."""

import dataclasses
from pathlib import Path
from typing import Any

from model.fit import difference
from model.job import WAY_OUT, Job
from model.load_model import describe
from pipelines.loader import Loader
from pipelines.meter import Rates


def require_resumable(path: Path, saved: dict[str, Any]) -> None:
    """Checks what a checkpoint needs before its settings can be compared with those of the run.

    Raises:
        ValueError: An entry is missing, or it has another type.
    """
    describe(path, saved, WAY_OUT)
    problem = difference({"config": {}, "metrics_bytes": 0, "autocast_dtype": "", "global_batch_size": 0}, saved, "")
    if not problem and not (isinstance(ranks := saved.get("ranks"), list) and ranks):
        problem = "ranks is missing, or not a list of states"
    if problem:
        raise ValueError(f"{path} cannot be resumed: {problem}; {WAY_OUT}")


def require_ranks(saved: dict[str, Any], job: Job, loader: Loader) -> None:
    """Checks the states that differ between ranks.

    Raises:
        ValueError: An entry is missing, or it has another type or shape.
    """
    own = job.rank_state()
    del own["rng"]["cuda"]  # a run may move between CPU and GPU
    place = {name: value for name, value in loader.state_dict().items() if type(value) is int}
    own |= {"loader": {"settings": {}, **place}, "rates": dataclasses.asdict(Rates())}
    for i, rank in enumerate(saved["ranks"]):
        problem = difference(own, rank, f"ranks.{i}.")
        if not problem and rank["rates"].keys() != own["rates"].keys():
            problem = f"ranks.{i}.rates has other entries than {', '.join(own['rates'])}"
        if not problem and not _are_bad_samples(rank["loader"].get("bad_samples", {"rows": [], "reasons": []})):
            problem = f"ranks.{i}.loader.bad_samples is not a list of bad samples"
        if problem:
            raise ValueError(f"{saved['path']} cannot be resumed: {problem}; {WAY_OUT}")


def _are_bad_samples(value: Any) -> bool:
    """Returns whether a value is the state of a `Quarantine`: places of samples, and a reason for each."""
    rows, reasons = (value.get(name) if isinstance(value, dict) else None for name in ("rows", "reasons"))
    if not isinstance(rows, list) or not isinstance(reasons, list) or len(rows) != len(reasons):
        return False
    are_places = all(isinstance(row, list | tuple) and [*map(type, row)] == [int, int] for row in rows)
    return are_places and all(isinstance(reason, str) for reason in reasons)
