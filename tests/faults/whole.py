"""The subjects of the campaign with what they leave undisturbed, against which disturbed ones are compared."""

import itertools
import shutil
from pathlib import Path

import pytest

from tests.faults import subjects
from tests.faults.campaign import Outcomes, keep
from tests.faults.children import Ended, run
from tests.faults.subjects import Subject, armed
from tests.helpers import checkpoints
from tests.helpers.runs import assert_same

NAMES = ("convert", "index", "cache", "checkpoints", "export", "training")


def make_subject(name: str, request: pytest.FixtureRequest) -> Subject:
    if name == "checkpoints":
        return subjects.SAVING
    if name == "convert":
        return subjects.conversion(request.getfixturevalue("images"), "--workers", 1)
    if name == "export":
        folder = request.getfixturevalue("tmp_path_factory").mktemp("export")  # other tests use the subject, too
        return subjects.exporting(checkpoints.write(folder / "best.pt"))
    shards: Path = request.getfixturevalue("shards")
    tars = sorted(shards.glob("train-*.tar"))
    if name == "index":
        return subjects.indexing(tars)
    if name == "training":
        return subjects.training(shards)
    from tests.pipelines.test_remote import upload

    url = upload(shards, f"{request.getfixturevalue('s3_bucket')}/kills", "train-*.tar")
    return subjects.caching([(f"{url}/{tar.name}", tar.stat().st_size) for tar in tars])


class Whole:
    """A subject, what it leaves when nobody kills it, and the changes that it makes one after the other."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self._folder, self._numbers = subject, folder, itertools.count()
        folder.mkdir()
        self.whole = self.new_folder()
        self.log = folder / "log"
        done = run(armed, str(self.whole), 0, str(folder / "changes"), *subject.work(self.whole), log=self.log)
        assert done.status == 0, done.output
        self.state = subject.state(self.whole)
        self.changes = (folder / "changes").read_text().splitlines()
        self.largest = max(path.stat().st_size for path in self.whole.rglob("*") if path.is_file())

    def new_folder(self) -> Path:
        folder = self._folder / f"{next(self._numbers)}"
        folder.mkdir()
        self.subject.folder(folder)
        return folder

    def try_one(self, folder: Path, ended: Ended, where: str, outcomes: Outcomes) -> None:
        """Checks a folder after a kill, runs the same command again, and checks what is there then."""
        if ended.status is None or ended.status > 0:  # it had no reason to fail
            outcomes.fail("failed instead of dying", f"{where}: exit status {ended.status}: {ended.error}")
            return
        try:
            self.subject.check(folder, self.state)
            again = run(*self.subject.work(folder), log=self.log)
            assert again.status == 0, f"run again: exit status {again.status}: {again.error}"
            self.compare(folder)
        except (AssertionError, ValueError, OSError) as error:
            outcomes.fail("wrong", f"{where}: {str(error)[:1000]}")
            keep(f"kill-{self.subject.name}-{where}.txt".replace("/", "_")[:120], f"{ended.output}\n{error}".encode())
        else:
            outcomes["the same as without a kill" if ended.status else "it had ended before"] += 1
            shutil.rmtree(folder)

    def compare(self, folder: Path) -> None:
        """Asserts that a folder is as the undisturbed one."""
        found = self.subject.state(folder)
        if self.subject.name == "training":
            assert_same(folder, self.whole)
            assert found.keys() == self.state.keys(), found.keys() ^ self.state.keys()
        else:
            different = [name for name in {**found, **self.state} if found.get(name) != self.state.get(name)]
            assert not different, f"these files differ: {different}"
