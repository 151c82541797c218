"""docs/messages.md: every error message of every command, with the input that raises it."""

import os
import re
import shutil
from pathlib import Path

import pytest

from pipelines.remote.object_store import filesystem
from tests.helpers import checkpoints
from tests.helpers.raised import raised_texts
from tests.helpers.transcript import Example, read_examples, run_example

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "messages.md"
CODE = [path for pattern in ("*.py", "model/**/*.py", "pipelines/**/*.py", "tools/**/*.py") for path in ROOT.glob(pattern)]


@pytest.fixture(scope="session")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("best") / "best.pt")


@pytest.mark.parametrize("example", read_examples(PAGE), ids=lambda example: f"line-{example.line}")
def test_example(example: Example, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    def copy(fixture: str, path: Path) -> None:
        source = request.getfixturevalue(fixture)
        shutil.copytree(source[0] if fixture == "finished" else source, path)

    linked: list[tuple[Path, tuple[int, int]]] = []

    def link(fixture: str, path: Path) -> None:  # a copy for each block would fill gigabytes
        source = request.getfixturevalue(fixture)
        linked.append((source, _state(source)))
        os.link(source, path)

    def upload(url: str) -> None:
        filesystem(url).put(f"{request.getfixturevalue('shards')}/", url, recursive=True)

    world = {
        "photos": lambda path: copy("image_folder", path),
        "shards": lambda path: copy("shards", path),
        "run": lambda path: copy("finished", path),
        "best.pt": lambda path: link("best", path),
        "s3://shards": lambda path: upload(f"{request.getfixturevalue('s3_bucket')}/data"),
    }
    folder = tmp_path / "here"
    folder.mkdir()
    run_example(example, folder, world)
    changed = [source.name for source, state in linked if _state(source) != state]
    assert changed == [], "the block changes a file that other blocks share; let it write a new one instead"


def _state(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def test_every_message_is_on_the_page() -> None:
    """Each whole message, with any values in it, is in a block or in a line of the rest of the page."""
    examples = ["\n".join(example.printed) for example in read_examples(PAGE)]
    rest = re.sub(r"^```console\n.*?^```$", "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL).splitlines()
    missing = [found for found in raised_texts(CODE, ROOT) if not any(map(found.is_in, [*examples, *rest]))]
    assert sorted({f"{found.place}: {'…'.join(found.parts)!r}" for found in missing}) == []
