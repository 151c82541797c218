"""Servers for `--log`: MLflow's own, and an imitation of the few answers that wandb needs. And what wandb has written."""

import http.server
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MlflowServer:
    """An MLflow server on this machine, with its database in a folder."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--default-artifact-root", str(folder)]
        fewer = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(folder / "server.log", "wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, env=os.environ | fewer, start_new_session=True
            )
        deadline = time.monotonic() + 180  # it takes seven seconds of a processor
        while not self._answers():
            assert self._process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return answer.status == 200
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        """Signals all processes of the server."""
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait()


class WandbServer:
    """Imitates a server of Weights & Biases. `deleted` has ids of runs that it refuses, `runs` those that were begun.

    `sent` has what was uploaded to a run, in the order of arrival.
    """

    def __init__(self) -> None:
        self.deleted, self.runs, self.sent = set[str](), list[str](), list[dict[str, Any]]()
        self._is_stopped = False
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if server._is_stopped:  # its threads go on with open connections
                    self.close_connection = True
                    return
                status, answer = server._answer(self.path, request)
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def _answer(self, path: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if "query" not in request:
            self.sent.append(request)
            return 200, {}
        query, run = request["query"], request.get("variables", {}).get("name")
        answers: dict[str, Any] = {}
        if "viewer" in query:
            answers["viewer"] = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        if "upsertBucket" in query:
            if run in self.deleted:
                return 409, {"errors": [{"message": f"run me/p/{run} was previously created and deleted"}], "data": None}
            project = {"id": "P", "name": "googlenet-dali", "entity": {"id": "E", "name": "me"}}
            bucket = {"id": run, "name": run, "displayName": run, "config": "{}", "project": project}
            answers["upsertBucket"] = {"bucket": bucket, "inserted": run not in self.runs}
            self.runs += [run] if run not in self.runs else []
        if "model(" in query:
            answers["model"] = {"id": "P", "name": "googlenet-dali", "bucket": None}
        if "createRunFiles" in query:
            answers["createRunFiles"] = {"runID": "R", "uploadHeaders": [], "files": []}
        return 200, {"data": answers}

    def stop(self) -> None:
        self._is_stopped = True
        self._http.shutdown()
        self._http.server_close()


def wandb_records(folder: Path) -> Iterator[Any]:
    """Yields the records of the `.wandb` file in a run's folder: a log in the format of LevelDB, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("*.wandb")
    content, at, record = path.read_bytes(), 7, b""
    while at < len(content):
        if (rest := -at % 2**15) < 7 and rest:  # too short for a header
            at += rest
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""
