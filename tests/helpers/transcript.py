"""Runs the examples of a page of documentation: blocks of commands, and what the last one prints.

A block is fenced by ```console. A line after `$ ` is a command: one of the project runs within the process of the test, any
other one in bash. A line after `>>> ` is Python, which knows the names of `_names`; `... ` continues it. All other lines must
be in the output of the last command, in this order; `…` stands for any text, and a last line `[1]` for the exit status.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.conftest import write_image
from tests.helpers import checkpoints
from tests.helpers.command import Done, run_main

MAINS = {
    **{name: f"tools.{name}.cli" for name in ("shards", "evaluate", "predict", "report", "throughput")},
    "export-model": "tools.export.cli",
    "python train.py": "train",
    "python -m tools.bench.gpu_proof": "tools.bench.gpu_proof.__main__",
}


@dataclass(frozen=True)
class Example:
    """A block: where it begins, its commands, the lines that the last one prints, and the exit status, None for any."""

    line: int
    commands: tuple[str, ...]
    printed: tuple[str, ...]
    status: int | None


def read_examples(page: Path) -> list[Example]:
    """Returns the blocks of a page.

    Raises:
        ValueError: A block prints nothing, or prints something before its last command.
    """
    text = page.read_text()
    examples = []
    for block in re.finditer(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: block.start()].count("\n") + 1
        lines = block[1].splitlines()
        is_command = [one.startswith(("$ ", ">>> ", "... ")) for one in lines]
        number = sum(is_command)
        if not 0 < number < len(lines) or not all(is_command[:number]):
            raise ValueError(f"{page}:{line}: commands must come first, and then what the last one prints")
        printed = lines[number:]
        status = re.fullmatch(r"\[(\d+)\]", printed[-1])
        joined = "\n".join(lines[:number]).replace("\n... ", "\n")
        commands = re.split(r"\n(?=\$ |>>> )", joined)
        examples.append(
            Example(line, (*commands,), (*(printed[:-1] if status else printed),), int(status[1]) if status else None)
        )
    return examples


def run_example(example: Example, folder: Path, world: Mapping[str, Callable[[Path], object]]) -> None:
    """Runs a block in an empty folder, and asserts that it prints what it says.

    Args:
        example: The block.
        folder: The folder.
        world: Files and folders by name, as functions that create them at a path, if the block mentions the name.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        text = "\n".join(example.commands)
        for name, create in world.items():
            if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text):
                create(folder / name)
        names = _names()
        *before, last = example.commands
        for command in before:
            done = _run(command, names)
            assert done.status == 0, f"{command}\n{done.stdout}{done.stderr}"
        done = _run(last, names)
    _compare(example, done)


def _run(command: str, names: dict[str, Any]) -> Done:
    if command.startswith(">>> "):
        return _run_python(command.removeprefix(">>> "), names)
    words = shlex.split(command.removeprefix("$ "), comments=True)
    environment = {}
    while words and (setting := re.fullmatch(r"(\w+)=(.*)", words[0], re.DOTALL)):
        environment[setting[1]] = setting[2]
        del words[0]
    main, rest = _main(words)
    if main is None:
        bash = ["bash", "-e", "-c", command.removeprefix("$ ")]
        done = subprocess.run(bash, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return run_main(main, *rest)


def _main(words: list[str]) -> tuple[Callable[[Sequence[str]], None] | None, list[str]]:
    """Returns the function that runs a command of the project, and the words for it."""
    for name, module in MAINS.items():
        if words[: len(name.split())] == name.split():
            return _exits(module), words[len(name.split()) :]
    if words[:2] == ["python", "-m"] and words[2].startswith("tools."):
        return _exits(words[2]), words[3:]
    return None, words


def _exits(module: str) -> Callable[[Sequence[str]], NoReturn]:
    def main(words: Sequence[str]) -> NoReturn:
        importlib.import_module(module).main(words)
        sys.exit(0)  # train.py returns

    return main


def _run_python(code: str, names: dict[str, Any]) -> Done:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(code, names)
    except (ValueError, OSError) as error:
        return Done(1, out.getvalue(), f"{type(error).__name__}: {error}\n")
    return Done(0, out.getvalue(), "")


def _names() -> dict[str, Any]:
    """Returns the names that Python lines know."""

    def tar(path: str, *members: tuple[str, bytes]) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as file:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))

    def jpeg(seed: int = 0) -> bytes:
        path = Path("..", "one.jpg")
        write_image(path, seed)
        return path.read_bytes()

    def parquet(path: str, **columns: list[object]) -> None:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table(columns), path)

    def checkpoint(path: str, **changes: object) -> None:
        Path(path).unlink(missing_ok=True)  # it may be a link to another test's
        checkpoints.write(Path(path), **changes)

    def image(path: str, seed: int = 0, **options: Any) -> None:
        write_image(Path(path), seed, **options)

    return {"Path": Path, "checkpoint": checkpoint, "image": image, "jpeg": jpeg, "parquet": parquet, "tar": tar}


def _compare(example: Example, done: Done) -> None:
    output = f"{done.stdout}{done.stderr}"
    lines = output.splitlines()
    at = 0
    for expected in example.printed:
        pattern = re.compile(".*".join(map(re.escape, expected.split("…"))))
        at = next((i + 1 for i, line in enumerate(lines[at:], at) if pattern.fullmatch(line)), -1)
        assert at > 0, f"not printed: {expected}\nprinted:\n{output}"
    status = example.status
    if any(line.startswith("error: ") for line in example.printed):
        assert at == len(lines), f"more lines after the error:\n{output}"
        status = 2 if status is None else status
    assert status in (None, done.status), f"exit status {done.status}\n{output}"
