"""Who may import whom, and what stays quick."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imported(path: Path) -> set[str]:
    """The modules that a file imports, at its top or anywhere else."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def importers(module: str, *folders: str) -> set[str]:
    files = [path for folder in folders for path in ROOT.glob(folder)]
    assert files
    return {
        str(path.relative_to(ROOT))
        for path in files
        if any(name == module or name.startswith(f"{module}.") for name in imported(path))
    }


CODE = ("*.py", "model/**/*.py", "pipelines/**/*.py", "tools/**/*.py")


def test_who_imports_whom() -> None:
    """`pipelines` and `model` know nothing of each other and of the tools. Measuring knows training, and not the reverse."""
    for wing, others in (("pipelines", ("model", "tools", "train")), ("model", ("pipelines", "tools", "train"))):
        for other in others:
            assert importers(other, f"{wing}/**/*.py") == set()
        assert importers("tyro", f"{wing}/**/*.py") == set()  # it takes time to import
    assert importers("train", "tools/run/**/*.py", "tools/evaluate/**/*.py", "tools/shards/**/*.py") == set()
    users = ("tools/run/", "tools/evaluate/", "tools/throughput/", "tools/bench/", "train.py")
    assert {path for path in importers("tools.run", "*.py", "tools/**/*.py") if not path.startswith(users)} == set()
    assert importers("tools.bench", "*.py", "tools/[!b]*/**/*.py") == set()


@pytest.mark.parametrize("package", [path.parent for path in sorted(ROOT.glob("[mpt]*/**/__init__.py"))], ids=str)
def test_modules_do_not_import_their_package(package: Path) -> None:
    """A package's `__init__` holds a docstring alone (but for the kinds of sources), so nothing imports in a circle."""
    name = ".".join(package.relative_to(ROOT).parts)
    text = (package / "__init__.py").read_text()
    assert name == "tools.shards.sources" or len(ast.parse(text).body) <= 1


def test_files_and_functions_are_short() -> None:
    for path in [path for pattern in CODE for path in ROOT.glob(pattern)]:
        text = path.read_text()
        assert text.count("\n") <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_dali_and_pillow_are_where_they_belong() -> None:
    as_a_peer = "tools/throughput/loaders.py"
    assert importers("nvidia.dali", *CODE) == {
        "pipelines/augment.py",
        *(f"pipelines/dali/{name}.py" for name in ("graph", "draws", "part", "operators")),
        as_a_peer,
        "tools/bench/remote.py",
    }
    in_tools = {f"tools/shards/{name}.py" for name in ("check", "drawing", "encode", "preview")}
    in_tools |= {as_a_peer, *(f"tools/throughput/{name}.py" for name in ("peer_loaders", "peer_ffcv"))}
    assert importers("PIL", *CODE) == {
        "pipelines/pillow.py",
        "tools/bench/peer_writers.py",
        "tools/run/tensorboard_images.py",
        *in_tools,
    }


COMMANDS = {
    "shards": ("", "convert", "info", "preview", "verify", "index", "demo"),
    "throughput": ("", "loader", "model", "train", "compare"),
    **dict.fromkeys(("evaluate", "predict", "export", "report"), ("",)),
}


@pytest.mark.parametrize(("tool", "verb"), [(tool, verb) for tool, verbs in COMMANDS.items() for verb in verbs])
def test_help_of_the_tools_needs_neither_torch_nor_dali(tool: str, verb: str) -> None:
    usage = run_without_torch(f"from tools.{tool}.cli import main", "main(sys.argv[1:])", *verb.split(), "--help")
    assert re.match(rf"usage: .*\b{tool}\b", usage)


def test_help_of_train_needs_neither_torch_nor_dali() -> None:
    usage = run_without_torch("from tools.run.cli import parse", "parse(sys.argv[1:])", "--help")
    assert usage.startswith("usage: train.py ")


def run_without_torch(imports: str, call: str, *arguments: str) -> str:
    """Runs a command that ends well, in a process of its own, and asserts that it imported no large package."""
    script = (
        f"import sys\n{imports}\ntry:\n    {call}\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "assert not {'torch', 'nvidia', 'PIL', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout
