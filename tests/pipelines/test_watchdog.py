"""A read or a decoder that blocks ends the run in one line, with an exit status, and names what is awaited."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.watchdog import Watchdog
from tests.conftest import write_image
from tests.pipelines.test_bad_samples import write_shards

# What blocks, and how.
BLOCKS = {
    "reading": """
read, os.preadv = os.preadv, lambda descriptor, *rest: threading.Event().wait() if BLOCKED else read(descriptor, *rest)
""",
    "decoding": """
resize, WholeResize.resized = WholeResize.resized, lambda *rest: threading.Event().wait() if BLOCKED else resize(*rest)
""",
    "predicting": """
predict.TIMEOUT_SECONDS, ValidationDecoder.__call__, run = 0.5, lambda *rest: threading.Event().wait(), run_predict
""",
}
# A training run that blocks after its first batch. The imports take seconds, so the runs are forks of one process.
SCRIPT = """
import json, os, signal, sys, threading
from types import SimpleNamespace
import torch
from model.load_model import Preprocessing
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines import watchdog
from pipelines.dali.cpu_resize import WholeResize
from pipelines.dali.validation_decoder import ValidationDecoder
from pipelines.loader import MEAN, STD
from tools.predict import predict
from tools.predict.inputs import EncodedImage
from tools.cli import run_command
BLOCKED, watchdog.INTERRUPTED_SECONDS = False, 0.5

def run():
    global BLOCKED
    config = DataConfig(train=shards, timeout=timeout)
    spec = LoaderSpec(split="train", batch_size=6, image_size=32, device=torch.device("cpu"), num_threads=1, num_classes=60)
    with build_loader(config, spec) as loader:
        loader.next()
        BLOCKED = True
        os.write(1, f"{number} {os.getpid()}\\n".encode())  # in one piece: the runs share the pipe
        for _ in range(9):
            loader.next()
    return 0

def run_predict():
    trained = SimpleNamespace(model=torch.nn.Flatten(), preprocessing=Preprocessing(32, 32, MEAN, STD), num_classes=9)
    images = (EncodedImage({"path": f"{i}.jpg"}) for i in range(9))
    list(predict.predict(trained, images, top=1, batch_size=6, device=torch.device("cpu"), num_threads=1))

children = {}
for number, (block, shards, timeout, stderr) in enumerate(json.loads(sys.argv[1])):
    if not (child := os.fork()):
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
        exec(block)
        run_command(run)
    children[child] = number
for _ in list(children):
    child, status = os.wait()
    os.write(1, f"ended {children[child]} {os.waitstatus_to_exitcode(status)}\\n".encode())
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """Returns the exit status, the standard error and the shards of runs in which something blocks."""
    folder = tmp_path_factory.mktemp("watchdog")
    write_image(folder / "1.jpg", 1)
    shards = write_shards(folder / "shards", [(folder / "1.jpg").read_bytes()] * 60)
    runs = {**{what: (what, 0.5) for what in BLOCKS}, "interrupted": ("reading", 300.0)}
    tasks = [(BLOCKS[what], str(shards), timeout, str(folder / name)) for name, (what, timeout) in runs.items()]
    statuses = {}
    with subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(tasks)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            first, *numbers = line.split()
            if first == "ended":
                name = [*runs][int(numbers[0])]
                statuses[name] = (int(numbers[1]), (folder / name).read_text(), shards)
            elif [*runs][int(first)] == "interrupted":
                time.sleep(0.5)  # until the loader waits
                os.kill(int(numbers[0]), signal.SIGINT)
    assert process.returncode == 0
    return statuses


@pytest.mark.parametrize("what", ["reading", "decoding"])
def test_what_blocks_ends_the_run_and_is_named(ended: dict[str, tuple[int, str, Path]], what: str) -> None:
    status, stderr, shards = ended[what]
    assert status == 1, stderr
    [line] = stderr.splitlines()
    assert line.startswith(f"error: {what} batch ")
    assert " of training, epoch 1, on rank 0 began at " in line
    assert f"and has not ended after 0.5 s (--data.timeout); its samples: {shards}/train-00" in line
    assert line.endswith(" and 2 more")


def test_predict_names_the_images_at_which_its_decoder_blocks(ended: dict[str, tuple[int, str, Path]]) -> None:
    status, stderr, _ = ended["predicting"]
    assert status == 1, stderr
    began, _, rest = stderr.partition(" and has not ended after 0.5 s; ")
    assert re.fullmatch(r"error: decoding a batch began at [\d:]+", began)
    assert rest == "its images: 0.jpg, 1.jpg, 2.jpg, 3.jpg and 2 more\n"


def test_ctrl_c_during_a_blocked_read(ended: dict[str, tuple[int, str, Path]]) -> None:
    """The thread that reads cannot be ended, and the end of Python would wait for it."""
    assert ended["interrupted"][:2] == (130, "interrupted; closing the loader does not end\n")


def test_waits_that_end_and_waits_in_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait has its own time, and a wait within another one restarts the outer one's."""
    ended: list[str] = []
    monkeypatch.setattr("pipelines.watchdog._end", lambda wait, dog: ended.append(wait.what))
    dog = Watchdog(0.3, "--data.timeout")
    with dog.waiting("outer", str):
        for _ in range(10):
            with dog.waiting("inner", str):
                time.sleep(0.04)
    assert not ended
    time.sleep(0.4)  # not in a wait
    assert not ended
    with dog.waiting("last", str):
        time.sleep(0.5)
    assert set(ended) == {"last"}
    dog.close()


def test_only_the_end_after_ctrl_c_has_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may go on after Ctrl-C, for example in a notebook."""
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr("pipelines.watchdog._end", lambda wait, dog: ended.append((wait.what, wait.status)))
    monkeypatch.setattr("pipelines.watchdog.INTERRUPTED_SECONDS", 0.1)
    dog = Watchdog(1, "--data.timeout")
    with pytest.raises(KeyboardInterrupt), dog.waiting("interrupted", str):
        raise KeyboardInterrupt
    with dog.waiting("later", str):
        time.sleep(0.4)
    assert not ended
    with pytest.raises(KeyboardInterrupt), contextlib.closing(Closing(dog)):
        raise KeyboardInterrupt
    assert set(ended) == {("closing", 130)}
    dog.close()


class Closing:
    """Takes long to close."""

    def __init__(self, dog: Watchdog) -> None:
        self._dog = dog

    def close(self) -> None:
        with self._dog.waiting("closing", str):
            time.sleep(0.4)
