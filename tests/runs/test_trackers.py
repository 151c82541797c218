"""`--log wandb` and `--log mlflow`: what arrives at real servers and in the run folder, whatever happens to the server."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model.distributed import alone as alone_in
from tests.helpers.command import run_main
from tests.helpers.runs import all_metrics, alone, arguments, finish, start, torchrun, wait_for_step, wait_until
from tests.helpers.tracker_servers import MlflowServer, WandbServer, wandb_records
from tools.run.run_folder import RunFolder
from tools.run.trackers import background

pytestmark = pytest.mark.skipif(not (find_spec("mlflow") and find_spec("wandb")), reason="pip install -e '.[dev]'")

WORLD = alone_in(torch.device("cpu"))
# Trains, and waits before some steps until files exist.
WAITING = """
import json, sys, time
from pathlib import Path
import train

files = json.loads({files!r})
real = train.train_step

def train_step(job, image, target):
    while not all(Path(name).exists() for name in files.get(str(job.step), [])):
        time.sleep(0.01)
    return real(job, image, target)

train.train_step = train_step
train.main()
"""
# Gives a command a terminal.
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


def waiting(run: Path, files: dict[int, list[Path]], shards: Path, *more: object) -> list[str]:
    script = WAITING.format(files=json.dumps({step: [str(path) for path in paths] for step, paths in files.items()}))
    return [*alone(script), *arguments(shards, run, *more)]


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides what the user of this machine has set and saved for the libraries."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


def runs_at(uri: str, name: str) -> list[Any]:
    """Returns the runs of a name in the experiment of this project."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("googlenet-dali")
    return [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == name]


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return sorted((metric.step, metric.value) for metric in MlflowClient(uri).get_metric_history(run_id, name))


def of_wandb(pid: int) -> list[str]:
    """Returns the processes that wandb has started for a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        found += [" ".join(words)] if "wandb-core" in words[0] and str(pid) in words else []
    return found


def test_a_run_is_stopped_and_goes_on(
    server: MlflowServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both trackers. wandb has no API key, and does not ask for one at a terminal."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("//", "//user:secret@"))
    run = tmp_path / "stopped"
    more = ("--log", "mlflow", "wandb", "--epochs", 1)
    process = start(waiting(run, {0: [run / "mlflow.json", run / "wandb.json"]}, shards, *more), tmp_path)
    wait_for_step(process, run, 3)
    assert len(of_wandb(process.pid)) == 1
    process.send_signal(signal.SIGTERM)
    output = finish(process, 75)
    assert of_wandb(process.pid) == []
    [stopped] = runs_at(server.url, "stopped")
    assert stopped.info.status == "KILLED"
    assert output.count(f"mlflow: run {stopped.info.run_id} at {server.url}\n") == 1
    assert "secret" not in output
    [folder] = run.glob("wandb/offline-run-*")
    assert (
        f"wandb: there is no API key (wandb login); logging to the run folder; upload it with: wandb sync {folder}\n" in output
    )

    command = [*alone(), *arguments(shards, run, *more, "--checkpoint.keep", 4)]
    output = finish(start([sys.executable, "-c", TERMINAL, *command], tmp_path))
    assert "there is no API key" in output
    assert "metrics.jsonl has all metrics" not in output
    [resumed] = runs_at(server.url, "stopped")
    assert (resumed.info.run_id, resumed.info.status) == (stopped.info.run_id, "FINISHED")
    assert resumed.data.params["optim.momentum"] == "0.9"
    assert resumed.data.params["checkpoint.keep"] == "3"  # as at first
    written = all_metrics(run)
    for split, name in (("train", "loss"), ("valid", "ema_top1")):
        values = [(line["step"], line[name]) for line in written if line["split"] == split]
        assert history(server.url, resumed.info.run_id, f"{split}/{name}") == values
    assert resumed.data.metrics["result/top1"] == written[-1]["top1"]
    check_wandb_records([[*wandb_records(part)] for part in sorted(run.glob("wandb/offline-run-*"))], written)
    assert not (tmp_path / "wandb").exists()


def check_wandb_records(parts: list[list[Any]], written: list[dict[str, Any]]) -> None:
    """Checks the two parts of a run that was stopped. `wandb sync` makes one run of them, as they have the same id."""
    [before, after] = parts
    ids, names, projects = (
        {getattr(record.run, key) for record in (*before, *after) if record.HasField("run")}
        for key in ("run_id", "display_name", "project")
    )
    assert (len(ids), names, projects) == (1, {"stopped"}, {"googlenet-dali"})
    assert [record.exit.exit_code for part in parts for record in part if record.HasField("exit")] == [75, 0]
    assert [any(record.HasField("preempting") for record in part) for part in parts] == [True, False]
    histories = [record.history.item for record in (*before, *after) if record.HasField("history")]
    items = [{item.nested_key[0]: json.loads(item.value_json) for item in history if item.nested_key} for history in histories]
    assert [item["step"] for item in items] == [line["step"] for line in written]
    losses = [line["loss"] for line in written if line["split"] == "train"]
    assert [item["train/loss"] for item in items if "train/loss" in item] == losses
    [config, *_] = [record.run.config.update for record in before if record.HasField("run")]
    assert {entry.key: entry.value_json for entry in config}["optim.momentum"] == "0.9"
    results = [entry for record in after if record.HasField("summary") for entry in record.summary.update]
    assert written[-1]["top1"] in [json.loads(entry.value_json) for entry in results if entry.key == "result/top1"]


def test_two_ranks_make_one_run(server: MlflowServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    run = tmp_path / "ranks"
    *launcher, python, warnings, error, script = torchrun(2)  # it would take --log for an abbreviation of its own options
    command = [*launcher, "--", python, warnings, error, script, *arguments(shards, run, "--epochs", 1, "--log", "mlflow")]
    finish(start(command, tmp_path))
    [found] = runs_at(server.url, "ranks")
    assert found.info.status == "FINISHED"
    steps = [line["step"] for line in all_metrics(run) if line["split"] == "train"]
    assert [step for step, _ in history(server.url, found.info.run_id, "train/loss")] == steps


def settings(**changes: Any) -> dict[str, Any]:
    return {"log": ["mlflow"], "resume": "no", "optim": {"lr": 0.1}, **changes}


def test_long_settings_and_values_that_are_no_numbers(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    many = {f"setting{number}": number for number in range(250)}
    with RunFolder(tmp_path / "long", settings(text="x" * 9000, **many), WORLD, resumed=None) as folder:
        for step in range(1, 601):  # more than a server takes at once
            folder.write({"split": "train", "epoch": 1, "step": step, "loss": 1 / step, "lr": float("nan")}, step)
        folder.write({"split": "valid", "epoch": 1, "step": 600, "top1": 50.0, "ema_recall": [1.0, None], "no": None}, 600)
    [run] = runs_at(server.url, "long")
    assert run.data.params == {name: str(value) for name, value in many.items()} | {
        "text": "x" * 500,
        "log": "['mlflow']",
        "resume": "no",
        "optim.lr": "0.1",
    }
    assert run.data.metrics == {"train/loss": 1 / 600, "valid/top1": 50.0}
    assert history(server.url, run.info.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 601)]
    assert run.info.status == "KILLED"  # it came to no results


def test_a_run_that_was_deleted_begins_anew(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    caplog.set_level("INFO", "train")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    for _ in range(2):
        with (
            pytest.raises(ValueError, match="diverged"),
            RunFolder(tmp_path / "deleted", settings(resume="auto"), WORLD, resumed=None),
        ):
            raise ValueError("diverged")
        [run] = runs_at(server.url, "deleted")
        assert run.info.status == "FAILED"
        MlflowClient(server.url).delete_run(run.info.run_id)
    assert caplog.text.count(" has been deleted; a new one begins") == 1


@pytest.mark.parametrize("uri", ["", "http://127.0.0.1:1"])
def test_without_a_server_a_database_in_the_run_folder_has_the_run(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "train")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for step in (1, 2):
        with RunFolder(Path("my run"), settings(resume="auto"), WORLD, resumed={"metrics_bytes": 0, "step": 0}) as folder:
            folder.write({"split": "train", "epoch": 1, "step": step, "loss": 1 / step}, step)
    database = f"sqlite:///{tmp_path}/my run/mlflow.db"
    [run] = runs_at(database, "my run")
    assert history(database, run.info.run_id, "train/loss") == [(1, 1.0), (2, 0.5)]
    reason = f"{uri}: [Errno 111] Connection refused" if uri else "MLFLOW_TRACKING_URI is not set"
    way = f"logging to a database in the run folder; view it with: mlflow ui --backend-store-uri '{database}'"
    assert caplog.messages == [f"mlflow: {reason}; {way}"] * 2
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["my run"]


def test_a_name_that_a_url_cannot_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunFolder(tmp_path / "what?", settings(), WORLD, resumed=None):
        pass
    assert "because of the question mark; training is not affected, and metrics.jsonl has all metrics" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["what?"]


def test_a_server_that_stands_still_delays_neither_training_nor_its_end(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first time, it goes on before the end, and gets what it has missed; the second time it does not."""
    caplog.set_level("INFO", "train")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.1)

    def lines(folder: RunFolder, steps: range) -> None:
        for step in steps:
            folder.write({"split": "train", "epoch": 1, "step": step, "loss": 1 / step}, step)

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with RunFolder(tmp_path / "still", settings(), WORLD, resumed=None) as folder:
        lines(folder, range(1, 3))
        wait_for(f"at {server.url}")
        server.signal(signal.SIGSTOP)
        lines(folder, range(3, 100))
        wait_for(f"mlflow: {server.url}: ")
        server.signal(signal.SIGCONT)
        wait_for("mlflow: has all metrics again")
    [run] = runs_at(server.url, "still")
    assert history(server.url, run.info.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 100)]
    assert caplog.text.count("metrics.jsonl has all metrics") == 1

    caplog.clear()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100")
    monkeypatch.setattr(background, "FINISH_SECONDS", 2.0)
    with RunFolder(tmp_path / "end", settings(), WORLD, resumed=None) as folder:
        wait_for(f"at {server.url}")
        server.signal(signal.SIGSTOP)
        lines(folder, range(1, 3))
        started = time.monotonic()
    assert time.monotonic() - started < 60
    assert caplog.messages[1:] == ["mlflow: no answer for 2 s; training is not affected, and metrics.jsonl has all metrics"]
    server.signal(signal.SIGCONT)
    while runs_at(server.url, "end")[0].info.status == "RUNNING":  # the thread ends after the run
        assert time.monotonic() - started < 60


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    done = run_main(train.main, "--log", name)
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr == f"error: --log {name}: the package is not installed; pip install -e '.[{name}]'\n"


def test_a_folder_of_this_name_is_not_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert run_main(train.main, "--log", "wandb").stderr.startswith("error: --log wandb: the package is not installed; ")


# The part of a run that concerns trackers, in a process of its own, since wandb changes its process.
PART = """
import sys, time, torch
from pathlib import Path
from model.distributed import alone
from tools.cli import log_to
from tools.run.run_folder import RunFolder
from tools.run.trackers import to_wandb

to_wandb.START_SECONDS, to_wandb.UPLOAD_SECONDS = 5.0, 2.0
log_to(sys.stdout)
run, go = Path(sys.argv[1]), Path(sys.argv[2])
settings = {"log": ["wandb"], "resume": "auto", "optim": {"lr": 0.1}}
with RunFolder(run, settings, alone(torch.device("cpu")), resumed=None) as folder:
    while not go.exists():
        time.sleep(0.01)
    for step in (1, 2):
        folder.write({"split": "train", "epoch": 1, "step": step, "loss": 1 / step}, step)
    folder.write_results({"top1": 50.0})
"""


def test_runs_at_a_server_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is killed goes on with its id. After the run was deleted, there is a new one, and then the server ends."""
    server, run, go = WandbServer(), tmp_path / "run", tmp_path / "go"
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)

    def part() -> "subprocess.Popen[str]":
        return start([*alone(PART), str(run), str(go)], tmp_path)

    def run_id() -> str:
        return str(json.loads((run / "wandb.json").read_text())["run"])

    process = part()
    wait_until((run / "wandb.json").exists, process)
    process.kill()
    finish(process, -signal.SIGKILL)
    deadline = time.monotonic() + 60
    while of_wandb(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)

    go.touch()
    first = run_id()
    output = finish(part())
    assert output == f"wandb: run {first} at {server.url}/me/googlenet-dali/runs/{first}\n"
    assert server.runs == [first]
    assert [request["exitcode"] for request in server.sent if request.get("complete")] == [0]
    files = [request["files"] for request in server.sent if "files" in request]
    lines = [line for part in files for line in part.get("wandb-history.jsonl", {}).get("content", [])]
    assert [(line["step"], line["train/loss"]) for line in map(json.loads, lines)] == [(1, 1.0), (2, 0.5)]

    go.unlink()
    server.deleted = {first}
    process = part()
    wait_until(lambda: run_id() != first, process)
    assert server.runs == [first, run_id()]
    server.stop()
    go.touch()
    output = finish(process)
    assert f"wandb: run {first} has been deleted; a new one begins\n" in output
    [folder] = run.glob(f"wandb/run-*-{run_id()}")
    problem = f"the upload takes longer than 2 s; continue it with: wandb sync {folder}"
    assert output.endswith(f"wandb: {problem}; training is not affected, and metrics.jsonl has all metrics\n")
    assert of_wandb(process.pid) == []


def test_a_server_that_is_killed_does_not_end_the_run(
    server: MlflowServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test, as it kills the server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    run, go = tmp_path / "killed", tmp_path / "go"
    command = waiting(run, {0: [run / "mlflow.json"], 4: [go]}, shards, "--epochs", 1, "--log", "mlflow")
    process = start(command, tmp_path)
    wait_until(lambda: (run / "mlflow.json").exists() and len(runs_at(server.url, "killed")[0].data.metrics) > 0, process)
    server.kill()
    go.touch()
    output = finish(process)
    warnings = [line for line in output.splitlines() if "metrics.jsonl has all metrics" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"mlflow: {server.url}: ")
    assert [line["step"] for line in all_metrics(run)] == [*range(1, 8), 7]
