"""`throughput compare`, run as a user runs it. No test judges what it measures."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipelines.loader import MEAN, STD
from tools.throughput import peer_loaders
from tools.throughput.turn import Task, check


def compare(shards: Path, *options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.throughput", "compare", shards, *options]
    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_table_and_figures(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> None:
    folder, temporary = tmp_path_factory.mktemp("compared"), tmp_path_factory.mktemp("t")
    scratch = folder / "made" / "if need be"
    done = compare(
        *(shards, "--rounds", 1, "--images", 20, "--batch-size", 8, "--image-size", 32, "--threads", 1),
        *("--json", folder / "report.json", "--scratch", scratch),
        *("--only", "ours", "webdataset", "pillow", "spdl", "decode"),
        TMPDIR=str(temporary),
    )
    assert done.returncode == 0, done.stderr
    assert [*scratch.iterdir(), *temporary.iterdir()] == []
    assert "median (0 % interval)" in done.stdout  # nothing follows from one round
    report = json.loads((folder / "report.json").read_text())
    samples = 32  # of the first two shards
    assert (report["samples"], report["batch_size"], report["threads"], report["rounds"]) == (samples, 8, 1, 1)
    results = {(result["split"], result["name"]): result for result in report["results"]}
    names = ("ours", "dali", "pillow", "webdataset", "spdl", "decode")
    assert [*results] == [(split, name) for split in ("train", "valid") for name in names]
    for (split, name), result in results.items():
        assert result["what"] in done.stdout
        if name == "spdl" and not result["is_installed"]:
            continue
        assert result["error"] is None
        [turn] = result["turns"]
        [reference] = results[split, "dali"]["turns"]
        assert result["ratio"]["rounds"] == [turn["images_per_second"] / reference["images_per_second"]]
        if name == "decode":
            assert (turn["first_seconds"], turn["cpu_milliseconds"], turn["peak_memory_bytes"]) == (None, None, None)
        else:
            assert turn["first_seconds"] > 0.1  # Python's start alone
            assert turn["cpu_milliseconds"] >= 0  # Linux counts in hundredths of a second
            assert turn["peak_memory_bytes"] > 50e6


def test_a_loader_that_gives_something_else_is_said_so(tmp_path: Path, shards: Path) -> None:
    """An interpreter in which each loader gives what nobody asked for."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "if '-c' in sys.argv:\n"
        '    print(\'[["spdl"], {"spdl-core": "9.9"}]\')\n'
        "else:\n"
        "    sys.exit('ValueError: gives torch.uint8 (8, 32, 32, 3)')\n"
    )
    fake.chmod(0o755)
    done = compare(
        *(shards, "--rounds", 1, "--images", 8, "--batch-size", 8, "--image-size", 32, "--threads", 1),
        *("--splits", "train", "--only", "spdl", "--peers-python", fake),
    )
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("SPDL")]
    assert line.split("  ")[-1].strip() == "failed: ValueError: gives torch.uint8 (8, 32, 32, 3)"


def add_sample(tar: tarfile.TarFile, key: str, image_format: str, label: bytes) -> None:
    image = io.BytesIO()
    Image.new("RGB", (40, 50), (200, 10, 10)).save(image, image_format)
    for extension, content in ((image_format.lower(), image.getvalue()), ("cls", label)):
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def test_images_of_several_kinds_from_the_tars_alone(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number, image_format in enumerate(["JPEG", "PNG", "WEBP", "PNG", "JPEG"]):
            add_sample(tar, str(number), image_format, b"%d\n" % (number % 2))
    done = compare(
        *(tmp_path / "train-0.tar", "--rounds", 1, "--images", 8, "--batch-size", 4, "--image-size", 32, "--threads", 2),
        *("--splits", "valid", "--only", "ours", "webdataset", "--json", tmp_path / "report.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] == 5
    assert [result["error"] for result in report["results"]] == [None, None, None]


TASK = Task(
    split="train",
    tars=(),
    indices=(),
    list="",
    folder="",
    batch_size=4,
    image_size=32,
    resize_shorter=37,
    scale=(0.08, 1.0),
    ratio=(0.75, 1.33),
    mean=MEAN,
    std=STD,
    threads=1,
    device="cpu",
    images=8,
)
PIXELS = torch.linspace(0, 1, 32 * 32).reshape(1, 1, 32, 32).expand(4, 3, 32, 32)
NORMALIZED = (PIXELS - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
DOCUMENTS = torch.where(PIXELS < 0.02, NORMALIZED.min(), NORMALIZED.amax((0, 2, 3)).view(3, 1, 1))


@pytest.mark.parametrize("images", [NORMALIZED, NORMALIZED[:3], DOCUMENTS], ids=["whole", "short", "nearly white"])
def test_a_batch_as_it_was_asked_for(images: torch.Tensor) -> None:
    check(TASK, images, torch.zeros(len(images)))


@pytest.mark.parametrize(
    ("images", "num_labels", "message"),
    [
        (PIXELS, 4, "gives values from 0.00 to 1.00; normalized values are from -2.12 to 2.64"),
        (PIXELS * 255, 4, "gives values from 0.00 to 255.00"),
        (PIXELS * 255 - 128, 4, "gives values from -128.00 to 127.00"),
        (NORMALIZED * torch.nan, 4, "gives values from nan to nan"),
        (
            NORMALIZED.half(),
            4,
            r"gives torch.float16 \(4, 3, 32, 32\) and 4 labels; torch.float32 \(N, 3, 32, 32\) and N labels",
        ),
        (NORMALIZED.permute(0, 2, 3, 1), 4, r"gives torch.float32 \(4, 32, 32, 3\)"),
        (NORMALIZED, 3, r"gives torch.float32 \(4, 3, 32, 32\) and 3 labels"),
        (NORMALIZED.repeat(2, 1, 1, 1), 8, "N up to 4"),
        (NORMALIZED[:0], 0, "and 0 labels"),
        (NORMALIZED.to("meta"), 4, "gives images on meta; cpu was asked for"),
    ],
)
def test_a_batch_of_something_else(images: torch.Tensor, num_labels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(TASK, images, torch.zeros(num_labels))


def test_what_a_peer_prepares_appears_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = dataclasses.replace(TASK, folder=str(tmp_path / "mds"))

    def write(task: Task) -> None:
        folder = Path(task.folder)
        folder.mkdir()  # as MDSWriter does, which refuses a folder with something in it
        (folder / "shard").touch()
        if not (tmp_path / "space").exists():
            raise OSError("no space left")

    monkeypatch.setitem(peer_loaders.PREPARE, "mds", write)
    with pytest.raises(OSError, match="no space left"):
        peer_loaders.prepare("mds", task)
    assert not Path(task.folder).exists()
    (tmp_path / "space").touch()
    peer_loaders.prepare("mds", task)
    assert {path.name for path in tmp_path.rglob("*")} == {"space", "mds", "shard"}
