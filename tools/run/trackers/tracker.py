"""The interface of a tracker, and the file that keeps the id of its run."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pipelines.files import replace_text
from pipelines.json_file import read_json

PROJECT = "googlenet-dali"

State = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Line:
    """The numbers of a line of metrics.jsonl, named `SPLIT/NAME`, and when it was written, in milliseconds since 1970."""

    step: int
    milliseconds: int
    metrics: dict[str, float]


def milliseconds() -> int:
    """Returns the time in milliseconds since 1970."""
    return round(1000 * time.time())


def one_line(error: object) -> str:
    """Returns the message of an error for a log line."""
    return " ".join(str(error).split())[:300]


class Tracker(Protocol):
    """Logs a run to a server, or to a local store if there is none. One thread calls all methods; they may raise anything."""

    name: str

    def start(self) -> None:
        """Begins the run with its settings, or continues it, and says in the log where it can be seen."""

    def log(self, lines: Sequence[Line]) -> None:
        """Logs lines of metrics. After an error, the same lines come again."""

    def finish(self, state: State, results: dict[str, float]) -> None:
        """Ends the run. `results` has the final scores, if the run is finished."""


class RunIds:
    """The ids of a tracker's runs that belong to a run folder, in `FOLDER/NAME.json`: one for each place.

    Args:
        path: The file.
        settings: The settings of the run. Only a resumed run goes on with an earlier id.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        is_resumed = settings["resume"] == "auto" and path.exists()
        self._path, self._ids = path, dict[str, str](read_json(path) if is_resumed else {})

    def get(self, place: str) -> str | None:
        return self._ids.get(place)

    def put(self, place: str, run_id: str) -> None:
        if self._ids.get(place) != run_id:
            self._ids[place] = run_id
            replace_text(self._path, json.dumps(self._ids, indent=2) + "\n")
