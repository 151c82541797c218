"""Disks that are full, read-only or slow, and shards that vanish or change under the reader."""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.loader import Batch
from tests.conftest import write_tree
from tests.faults import subjects
from tests.faults.campaign import LONG, Outcomes, seeds, size
from tests.faults.children import Child, Ended, run
from tests.faults.disks import read_only, require_mounts, small_disk
from tests.faults.input_work import load
from tests.faults.whole import NAMES, Whole, make_subject
from tests.helpers.loader_contract import take
from tests.pipelines.test_bad_samples import encoded_images, make, write_shards

SECONDS = 60  # after which something has hung
EACH = NAMES if LONG else ("convert", "index", "cache", "checkpoints")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images") / "images", 14)


def complaint(ended: Ended, folder: Path) -> str:
    """Says what is wrong with the way in which work failed: it should end with one line that names the folder."""
    last = ended.error
    if ended.status is None:
        return f"hung: {ended.output[-500:]}"
    is_command = ended.status in (1, 2) and last.startswith("error: ") and "Traceback" not in ended.output
    is_function = ended.status == 70 and last.startswith(("OSError: ", "ValueError: ", "PermissionError: "))
    if not (is_command or is_function):
        return f"exit status {ended.status}: {ended.output[-700:]}"
    return "" if str(folder) in last else f"the error does not name {folder}: {last}"


@pytest.mark.parametrize("name", EACH)
def test_a_full_disk(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The disk is full somewhere in the middle. With more room, the same command goes on to the same end."""
    require_mounts()
    subject = make_subject(name, request)
    whole = Whole(subject, tmp_path / "tries")
    written = [path for path in whole.whole.rglob("*") if path.is_file() and not path.is_symlink()]
    total = sum(-(-path.stat().st_size // 4096) * 4096 for path in written)
    outcomes = Outcomes()
    for seed in seeds(size(3, 20)):
        room = int(total * random.Random(seed).uniform(0.1, 0.9))
        folder = tmp_path / f"disk-{seed}"
        folder.mkdir()
        with small_disk(folder, room) as resize:
            subject.folder(folder)
            _fill_and_go_on(whole, folder, resize, outcomes, f"seed {seed}, {room} of {total} bytes")
    outcomes.finish("disk", f"{name}: full disk")


def _fill_and_go_on(whole: Whole, folder: Path, resize: Callable[[int], None], outcomes: Outcomes, where: str) -> None:
    ended = Child(*whole.subject.work(folder), log=whole.log).wait(SECONDS)
    if ended.status == 0 and whole.subject.name != "training":  # metrics that find no space are only a warning
        outcomes["it fitted"] += 1
        return
    if ended.status != 0 and (wrong := complaint(ended, folder)):
        outcomes.fail("a bad message", f"{where}: {wrong}")
        return
    if left := [str(path) for path in folder.rglob("*.tmp")]:
        outcomes.fail("left over", f"{where}: {left}")
        return
    resize(10**9)
    again = run(*whole.subject.work(folder), log=whole.log)
    try:
        assert again.status == 0, again.error
        if whole.subject.name != "training":
            whole.compare(folder)
    except (AssertionError, ValueError, OSError) as error:
        outcomes.fail("wrong with more room", f"{where}: {str(error)[:500]}")
    else:
        outcomes["one line, and the same end with more room"] += 1


@pytest.mark.parametrize("name", EACH)
def test_a_read_only_folder(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    require_mounts()
    subject = make_subject(name, request)
    folder = tmp_path / "folder"
    folder.mkdir()
    subject.folder(folder)
    before = subjects.files(folder)
    outcomes = Outcomes()
    with read_only(folder):
        ended = Child(*subject.work(folder), log=tmp_path / "log").wait(SECONDS)
    if ended.status == 0:
        outcomes.fail("exit status 0", ended.output)
    elif wrong := complaint(ended, folder):
        outcomes.fail("a bad message", wrong)
    elif subjects.files(folder) != before:
        outcomes.fail("changed", str(folder))
    else:
        outcomes["one line"] += 1
    outcomes.finish("disk", f"{name}: read-only folder")


def load_slowly(folder: str, seconds: float, output: str) -> None:
    """Loads a folder of tars; each read waits. Saves the images by target."""
    real = os.preadv

    def preadv(*arguments: object) -> int:
        time.sleep(seconds)
        return real(*arguments)  # type: ignore[arg-type]

    os.preadv = preadv  # type: ignore[assignment]
    torch.save(load(Path(folder)).images, output)


def test_a_slow_disk(shards: Path, tmp_path: Path) -> None:
    outcomes, loaded = Outcomes(), []
    for delay in (0.0, 0.02 if not LONG else 0.5):
        folder = tmp_path / f"after-{delay}"
        folder.mkdir()
        for path in shards.glob("valid-*"):
            shutil.copy2(path, folder)
        ended = run(load_slowly, str(folder), delay, str(tmp_path / "images.pt"), log=tmp_path / "log")
        assert ended.status == 0, ended.output
        loaded.append(torch.load(tmp_path / "images.pt", weights_only=True))
    assert all(torch.equal(loaded[0][target], image) for target, image in loaded[1].items())
    outcomes["the same batches"] += 1
    outcomes.finish("disk", "the loader on a slow disk")


CHANGES = ("vanishes", "is cut short", "is replaced", "has a wrong bit", "has zeros", "is overwritten by another")


def change(tar: Path, how: str, other: Path, draw: random.Random) -> None:
    content = bytearray(tar.read_bytes())
    at = draw.randrange(len(content))
    if how == "vanishes":
        tar.unlink()
    elif how == "is cut short":
        os.truncate(tar, at)
    elif how == "is replaced":
        shutil.copyfile(other, tar.with_suffix(".new"))
        tar.with_suffix(".new").replace(tar)
    elif how == "is overwritten by another":
        shutil.copyfile(other, tar)
    else:
        content[at : at + 1000] = bytes(1000) if how == "has zeros" else bytes([content[at] ^ 8]) + content[at + 1 : at + 1000]
        with open(tar, "r+b") as file:
            file.seek(at)
            file.write(content[at : at + 1000])


@pytest.mark.parametrize("how", CHANGES)
def test_a_tar_that_changes_under_the_reader(tmp_path: Path, how: str) -> None:
    """It is refused by name, or no sample gets a label or an image of another one."""
    images = encoded_images(tmp_path / "images", 60)
    good = write_shards(tmp_path / "good", images)
    with make(good, "valid") as loader:
        known = pictures(list(loader))
    assert len(known) == 60
    outcomes = Outcomes()
    for seed in seeds(size(4, 100)):
        draw = random.Random(seed)
        shards = tmp_path / "changing"
        shutil.copytree(good, shards)
        tars = sorted(shards.glob("*.tar"))
        victim, other = draw.sample(tars[:-1], 2)
        try:
            with make(shards, "valid") as loader:
                batches = take(loader, draw.randrange(1, 5))
                change(victim, how, other, draw)
                batches += take(loader, 20)
            outcomes["every sample was loaded, or left out as bad"] += 1
        except (ValueError, OSError) as error:
            if victim.name in str(error) and "\n" not in str(error):
                outcomes["refused by name"] += 1
            else:
                outcomes.fail("a bad message", f"seed {seed}: {error}")
        shutil.rmtree(shards)
        strange = [target for target, image in pictures(batches).items() if not torch.equal(image, known[target])]
        if strange and how not in ("has a wrong bit", "has zeros"):  # no checksum covers the bytes of an image
            outcomes.fail("another image", f"seed {seed}: {strange}")
    outcomes.finish("disk", f"a tar {how} under the reader")


def pictures(batches: list[Batch]) -> dict[int, torch.Tensor]:
    """Returns the images by target: each sample has a class of its own."""
    return {
        target: image.clone()
        for batch in batches
        for image, target in zip(batch["image"], batch["target"].tolist(), strict=True)
    }
