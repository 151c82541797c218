"""The commands work in a folder that has modules with the names of the project's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ONE_THREAD, ROOT, arguments

FILES = ("model.py", "train.py", "pipelines/__init__.py", "pipelines/config.py", "tools/__init__.py", "tools/cli.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of somebody's project."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise ImportError('this is another project')\n")
    return tmp_path


def scripts() -> dict[str, str]:
    """The installed commands, and the functions that they call."""
    lines = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].split("\n\n")[0].splitlines()
    return {line.split(" = ")[0]: line.split('"')[1] for line in lines}


def run(folder: Path, python_path: str, script: Path, *words: object) -> None:
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": python_path}
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def installed(folder: Path, command: str) -> Path:
    """Writes the script of an installed command as pip does."""
    module, function = scripts()[command].split(":")
    script = folder / "bin" / command
    script.parent.mkdir()
    start = f"if __name__ == '__main__':\n    sys.exit({function}())\n"
    script.write_text(f"import sys\nfrom {module} import {function}\n{start}")
    return script


@pytest.mark.parametrize("command", scripts())
def test_installed_commands(folder: Path, command: str) -> None:
    run(folder, f".:{ROOT}", installed(folder, command), "--help")


def test_worker_processes(folder: Path, shards: Path) -> None:
    run(
        folder, f":{ROOT}", installed(folder, "shards"), "verify", shards, "--workers", 2
    )  # an empty entry is the current folder


def test_training(folder: Path, shards: Path) -> None:
    words = arguments(shards, folder / "run", "--data.backend", "pillow", "--data.threads", 1, "--epochs", 1)
    run(folder, ".", ROOT / "train.py", *words)
