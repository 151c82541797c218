"""Logs a run to Weights & Biases, or offline to the run folder if the server cannot be reached."""

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.run.preemption import EXIT_CODE
from tools.run.trackers.tracker import PROJECT, Line, RunIds, State, one_line

log = logging.getLogger("train")

ENVIRONMENT = {
    "WANDB_HTTP_TIMEOUT": "5",  # seconds in which the server has to confirm the API key
    "WANDB_ERROR_REPORTING": "false",  # it sends reports about errors also in offline mode
}
LOCAL_MODES = ("offline", "dryrun", "disabled")
START_SECONDS, UPLOAD_SECONDS = 10.0, 15.0
CODES: dict[State, int] = {"finished": 0, "interrupted": EXIT_CODE, "failed": 1}


class WandbTracker:
    """Logs a run to Weights & Biases.

    Args:
        path: The folder of the run. The library's folder `wandb` is in it.
        settings: Its settings by flat names.
    """

    name = "wandb"

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path.resolve(), settings

    def start(self) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import wandb

        self._ids = RunIds(self._path / "wandb.json", self._settings)
        mode = wandb.setup(self._options()).settings.mode  # of WANDB_MODE or of wandb's files; online by default
        reason = f"the mode is {mode}"
        if mode not in LOCAL_MODES:
            try:
                self._run = self._connected(mode)
                log.info("wandb: run %s at %s", self._run.id, self._run.url)
            except Exception as error:
                mode, reason = "offline", one_line(error)
                wandb.teardown()  # otherwise the failed run would keep its id
        if mode in LOCAL_MODES:
            self._run = self._begun(mode, self._ids.get("run"))
        if mode in LOCAL_MODES and mode != "disabled":
            log.info("wandb: %s; logging to the run folder; upload it with: %s", reason, self._upload())
        self._ids.put("run", self._run.id)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")  # wandb's own steps cannot go back to the checkpoint of a killed run

    def _connected(self, mode: str) -> Any:
        """Begins a run at the server, or continues it.

        Raises:
            Exception: There is no API key, or the server does not take it or does not answer.
        """
        import wandb

        if not wandb.login(prompt=False, verify=True):
            raise ValueError("there is no API key (wandb login)")
        known = self._ids.get("run")
        try:
            return self._begun(mode, known)
        except wandb.Error as error:
            if known is None or "deleted" not in str(error):
                raise
        log.info("wandb: run %s has been deleted; a new one begins", known)
        return self._begun(mode, None)

    def _begun(self, mode: str, run_id: str | None) -> Any:
        """Begins a run. What the environment says about it comes before the defaults here."""
        import wandb

        values = {"WANDB_PROJECT": PROJECT, "WANDB_NAME": self._path.name, "WANDB_RUN_ID": run_id}
        project, name, run_id = (None if os.environ.get(key) else value for key, value in values.items())
        return wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume=None if mode == "offline" else "allow",
            mode=mode,
            dir=self._path,
            config=self._settings,
            settings=self._options(),
        )

    def _options(self) -> Any:
        import wandb

        return wandb.Settings(
            console="off",  # otherwise it captures what the run prints
            silent=True,
            allow_val_change=True,  # of settings that changed on resuming
            init_timeout=START_SECONDS,
            finish_timeout=UPLOAD_SECONDS,
            finish_timeout_raises=True,
        )

    def _upload(self) -> str:
        return shlex.join(["wandb", "sync", str(self._run.settings.sync_dir)])

    def log(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self._run.log({**line.metrics, "step": line.step, "_timestamp": line.milliseconds / 1000})

    def finish(self, state: State, results: dict[str, float]) -> None:
        import wandb

        try:
            self._run.summary.update(results)
            if state == "interrupted":
                self._run.mark_preempting()
            self._run.finish(exit_code=CODES[state])
        except TimeoutError:
            problem = f"the upload takes longer than {UPLOAD_SECONDS:.0f} s"
            raise TimeoutError(f"{problem}; continue it with: {self._upload()}") from None
        finally:
            wandb.teardown()  # ends its process
