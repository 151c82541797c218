"""Logs a run to MLflow: to the server that MLFLOW_TRACKING_URI names, or to a database in the run folder."""

import contextlib
import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tools.run.trackers.tracker import PROJECT, Line, RunIds, State, milliseconds, one_line

log = logging.getLogger("train")

DATABASE = "mlflow.db"
# By default, a request is repeated for minutes, and each one waits for two. Here the thread repeats what failed.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "6",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
LONGEST_PARAM = 500  # characters that every server takes
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000  # that a server takes
STATUS: dict[State, str] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}

Item = TypeVar("Item")


class MlflowTracker:
    """Logs a run to MLflow.

    Args:
        path: The folder of the run.
        settings: Its settings by flat names.
    """

    name = "mlflow"

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path.resolve(), settings
        self._started, self._last_step = milliseconds(), 0

    def start(self) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow  # noqa: F401  (it sets up the logger below)

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        self._ids = RunIds(self._path / "mlflow.json", self._settings)
        uri, reason = os.environ.get("MLFLOW_TRACKING_URI"), "MLFLOW_TRACKING_URI is not set"
        if uri:
            try:
                self._begin(uri, place=re.sub("//[^/@]*@", "//", uri))  # without a password
                log.info("mlflow: run %s at %s", self._run_id, self._place)
                return
            except Exception as error:
                reason = one_line(error)
        if "?" in str(self._path):  # in a URL, its end is something else
            raise ValueError(f"{reason}, and {self._path} cannot have a database of MLflow, because of the question mark")
        database = f"sqlite:///{self._path / DATABASE}"
        self._begin(database, place=DATABASE)
        view = shlex.join(["mlflow", "ui", "--backend-store-uri", database])
        log.info("mlflow: %s; logging to a database in the run folder; view it with: %s", reason, view)

    def _begin(self, uri: str, place: str) -> None:
        """Begins a run at a server, or continues it.

        Args:
            uri: The server or database.
            place: Its name in messages and in the file of ids.
        """
        self._place = place
        with self._short_errors():
            self._begin_at(uri)

    def _begin_at(self, uri: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client, place = MlflowClient(uri), self._place
        known = os.environ.get("MLFLOW_RUN_ID") or self._ids.get(place)
        params = self._params_of(known) if known else None
        if known and params is not None:
            self._run_id = known
            self._client.update_run(known, status="RUNNING")
        else:
            if known:
                log.info("mlflow: run %s has been deleted; a new one begins", known)
            experiment = self._experiment(is_local=place == DATABASE)
            self._run_id = self._client.create_run(experiment, self._started, run_name=self._path.name).info.run_id
        self._ids.put(place, self._run_id)
        # A param never changes, so one that changed on resuming keeps its first value.
        new = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in self._settings.items() if name not in (params or {})]
        for part in _parts(new, PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=part)

    def _params_of(self, run_id: str) -> dict[str, str] | None:
        """Returns the params that a run has, or `None` if there is no such run."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run.data.params if run.info.lifecycle_stage == "active" else None

    def _experiment(self, *, is_local: bool) -> str:
        """Returns the id of the experiment, which is created if it does not exist."""
        from mlflow.exceptions import MlflowException

        given, name = os.environ.get("MLFLOW_EXPERIMENT_ID"), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if given and not is_local:
            return given
        found = self._client.get_experiment_by_name(name)
        if found is None:
            artifacts = (self._path / "mlartifacts").as_uri() if is_local else None  # otherwise ./mlruns
            try:
                return self._client.create_experiment(name, artifact_location=artifacts)
            except MlflowException:  # another run has just created it
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def log(self, lines: Sequence[Line]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, line.milliseconds, line.step) for line in lines for name, value in line.metrics.items()]
        with self._short_errors():
            for part in _parts(metrics, METRICS_AT_ONCE):
                self._client.log_batch(self._run_id, metrics=part)
        self._last_step = max([self._last_step, *(line.step for line in lines)])

    def finish(self, state: State, results: dict[str, float]) -> None:
        self.log([Line(self._last_step, milliseconds(), results)])
        with self._short_errors():
            self._client.set_terminated(self._run_id, STATUS[state])

    @contextlib.contextmanager
    def _short_errors(self) -> Iterator[None]:
        """Shortens errors to the place and the first cause. Otherwise, a message repeats the URL, with its password."""
        try:
            yield
        except Exception as error:
            first: BaseException = error
            while cause := first.__cause__ or first.__context__:
                first = cause
            raise OSError(f"{self._place}: {first}") from error


def _parts(items: Iterable[Item], size: int) -> Iterable[list[Item]]:
    """Yields the items in lists of a size."""
    rest = iter(items)
    while part := [*islice(rest, size)]:
        yield part
