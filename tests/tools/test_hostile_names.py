"""Names from files that would steer a terminal, a web page or TensorBoard: they appear as harmless text everywhere."""

import io
import json
import logging
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.distributed import alone
from model.evaluation import Evaluation
from pipelines.printable import counted, printable, printable_text
from tests.conftest import write_image
from tests.helpers import checkpoints
from tests.helpers.command import Done, run_main
from tests.tools.test_report import Page, train_line, valid_line, write_run
from tools.cli import log_to, run_command
from tools.evaluate.cli import main as evaluate
from tools.predict.cli import main as predict
from tools.report.cli import main as report
from tools.run.run_folder import RunFolder
from tools.run.tensorboard_images import batch_picture, captions, confusion_picture, mistake_captions
from tools.shards.cli import main as shards_main

# A terminal's title and color, a line that overwrites another, C1 controls, text that runs backwards, line breaks, markup.
BAD = "\x1b]0;title\x07\x1b[31m\r\x9b2J\u202ered\u2028\n<script>alert('\"&')</script>\x00\ud800"
CLASSES = (f"ant{BAD}", "bee", f"=cat(){BAD}")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def harmless(done: Done, lines: int | None = None) -> Done:
    """Checks that the output of a command has no control character but line breaks."""
    for text in (done.stdout, done.stderr):
        assert not CONTROL.search(text), repr(text)
        assert lines is None or text.count("\n") <= lines, text
    return done


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", errors="surrogateescape") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set whose class and member names are hostile; one image and one label of it are bad."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_image(tmp_path / "image.jpg", 0, (48, 40))
    image = (tmp_path / "image.jpg").read_bytes()
    name = "k\x1b[31m\r\x9b\u202e<b>"
    members = [
        (f"{name}{number}.{end}", data) for number in range(3) for end, data in (("jpg", image), ("cls", b"%d" % number))
    ]
    members += [(f"{name}3.jpg", b"no image"), (f"{name}3.cls", b"0"), (f"{name}4.jpg", image), (f"{name}4.cls", b"\x1b[2J")]
    (tmp_path / "x").mkdir()
    write_tar(tmp_path / "x" / "valid-0.tar", members)
    split = {"filenames": ["valid-0.tar"], "conversion": {"resize\x1b[1m": "\x1b[0m", "source": {"images": 1}}}
    (tmp_path / "x" / "_info.json").write_text(json.dumps({"classes": CLASSES, "splits": {"valid": split}}))
    return tmp_path / "x"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "best.pt", classes=tuple(name.replace("\ud800", "") for name in CLASSES))


def test_what_is_printable() -> None:
    assert printable("añ日 🙂") == "añ日 🙂"
    assert printable("\x1b[0m\n\u202e\x9b\ud800") == r"\x1b[0m\n\u202e\x9b\ud800"
    assert printable_text("a\nb\r") == "a\nb\\r"
    assert [counted(number, "tar") for number in (0, 1, 2_000)] == ["0 tars", "1 tar", "2,000 tars"]
    assert counted(2, "class", "classes") == "2 classes"


def test_info_verify_and_index(folder: Path) -> None:
    done = harmless(run_main(shards_main, "verify", folder, "--workers", 1))
    assert done.status == 3
    assert {"bad-image", "bad-label"} <= set(done.stdout.split())
    exact = json.loads(run_main(shards_main, "verify", folder, "--workers", 1, "--json").stdout)
    assert any("\x1b" in finding["member"] for finding in exact["findings"])
    done = harmless(run_main(shards_main, "info", folder), lines=1)
    assert done.status == 2
    assert harmless(run_main(shards_main, "verify", folder, "--quarantine", "--workers", 1)).status == 3
    done = harmless(run_main(shards_main, "info", folder))
    assert (done.status, r"ant\x1b]0;title\x07" in done.stdout) == (0, True)
    assert r"resize\x1b[1m \x1b[0m, 1 image in the source" in done.stdout
    assert json.loads(run_main(shards_main, "info", folder, "--json").stdout)["splits"]["valid"]["class_names"] == [*CLASSES]


def test_predict(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "\x1b[31m.jpg").write_bytes(b"no image")
    device = ("--device", "cpu", "--threads", 1)
    done = harmless(run_main(predict, checkpoint, folder, tmp_path / "\x1b[31m.jpg", *device))
    assert done.status == 0
    assert r"\x1b[31m.jpg: " in done.stderr
    assert r"k\x1b[31m" in done.stdout
    exact = [json.loads(line) for line in run_main(predict, checkpoint, folder, *device, "--json").stdout.splitlines()]
    assert exact[0]["key"].startswith("k\x1b[31m_")  # an index file holds no blanks
    assert exact[0]["label"]["name"] == CLASSES[0]
    # Each name stays on its line.
    assert len(done.stdout.splitlines()) == len(exact) * 4


def test_evaluate(folder: Path, checkpoint: Path) -> None:
    names = list(checkpoints.state(classes=CLASSES)["classes"])
    info = json.loads((folder / "_info.json").read_text())
    info["classes"] = [name.replace("\ud800", "") for name in names]
    (folder / "_info.json").write_text(json.dumps(info))
    device = ("--device", "cpu", "--threads", 1, "--torch-threads", 1, "--max-bad-fraction", 1)
    done = harmless(run_main(evaluate, checkpoint, folder, *device))
    assert done.status == 0, done.stderr
    table = done.stdout.splitlines()
    assert len(table) == 1 + 3 + 2
    assert len({len(line) for line in table[1:]}) == 1
    assert "left out a bad sample" in done.stderr
    info["classes"][0] = "\x1b[31mant"
    (folder / "_info.json").write_text(json.dumps(info))
    done = harmless(run_main(evaluate, checkpoint, folder, *device), lines=1)
    assert (done.status, r"only in the shards: \x1b[31mant" in done.stderr) == (2, True)


def test_convert(tmp_path: Path) -> None:
    for name in ("a\x1b[31m", "b\u202e"):
        write_image(tmp_path / "images" / name / "1.jpg", 0, (48, 40))
        (tmp_path / "images" / name / "2\x1b[0m.jpg").write_bytes(b"no image")
    done = harmless(run_main(shards_main, "convert", tmp_path / "images", tmp_path / "out", "--workers", 1))
    assert done.status in (0, 2)  # a class of which the name is refused is refused in one line
    done = harmless(run_main(shards_main, "convert", tmp_path / "images" / "a\x1b[31m", tmp_path / "out2", "--workers", 1))
    assert done.status == 2


def test_errors_and_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ValueError(f"x{BAD}")

    done = harmless(run_main(lambda _: run_command(fail)))
    assert done.status == 2
    stream = io.StringIO()
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        log_to(stream)
        logging.getLogger("x").warning("%s", BAD)
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
    assert not CONTROL.search(stream.getvalue())


def test_report(tmp_path: Path) -> None:
    markup = "<script>alert('\"&')</script>"
    run = write_run(
        tmp_path / "<b>run\x1b[31m",
        [train_line(1, 20), valid_line(1, 20, 50, 1) | {"ema_recall": [10, 20, 30]}],
        name=BAD.replace("\ud800", ""),
        classes=CLASSES,
        **{markup: "</td>"},
    )
    done = harmless(run_main(report, run), lines=1)
    assert done.status == 0, done.stderr
    text = (run / "report.html").read_bytes()
    assert b"<script" not in text
    assert b"<b>" not in text
    assert not CONTROL.search(text.decode())
    page = Page(run / "report.html")  # parses strictly
    assert markup in page.column("settings", "setting")
    assert [row[0][:4] for row in page.tables["recall"]["tbody"]] == ["ant\\", "bee", "=cat"]


def test_tensorboard_tags(tmp_path: Path) -> None:
    counts = torch.tensor([[4, 2, 4, 1, 4], [4, 4, 4, 4, 4], [4, 0, 4, 0, 4]], dtype=torch.float64)
    with RunFolder(tmp_path, {}, alone(torch.device("cpu")), resumed=None) as folder:
        folder.write_evaluation(Evaluation(counts, 0.0, None, None), CLASSES, 1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert sorted(events.Scalars(tag)[0].value for tag in tags if tag.startswith("recall/")) == [0, 50, 100]
    assert not CONTROL.search("".join(tags))


def test_tensorboard_pictures() -> None:
    """Pictures have no markup; names with any character are drawn, on their lines."""
    images = torch.zeros(3, 3, 32, 32)
    plain = batch_picture(images, captions(torch.arange(3), ("ant", "bee", "cat")))
    drawn = batch_picture(images, captions(torch.arange(3), CLASSES))
    assert plain.shape == drawn.shape
    said = mistake_captions(torch.arange(3), torch.tensor([1, 2, 0]), torch.rand(3), CLASSES)
    assert batch_picture(images, said).shape == plain.shape
    assert confusion_picture(torch.eye(3), CLASSES).dtype == np.uint8
