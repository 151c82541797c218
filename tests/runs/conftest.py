"""An undisturbed run, with which others are compared."""

from pathlib import Path

import pytest

from tests.helpers.runs import alone, arguments, finish, start


@pytest.fixture(scope="session")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 2 epochs of 7 steps, with all its checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    more = ("--checkpoint.every-steps", 2, "--checkpoint.keep", 99)
    finish(start([*alone(), *arguments(shards, run, *more)], run.parent))
    # Every second step, and the ends of the epochs.
    saved = [f"step-{step:09d}.pt" for step in (2, 4, 6, 7, 8, 10, 12, 14)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == saved
    return run
