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


def test_the_pipelines_import_neither_the_model_nor_the_tools() -> None:
    assert importers("model", "pipelines/**/*.py") == set()
    assert importers("tools", "pipelines/**/*.py") == set()


def test_dali_and_pillow_are_where_they_belong() -> None:
    as_a_peer = "tools/throughput/loaders.py"
    assert importers("nvidia.dali", *CODE) == {
        "pipelines/augment.py",
        *(f"pipelines/dali/{name}.py" for name in ("graph", "draws")),
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


SHARDS_VERBS = ("convert", "info", "preview", "verify", "index", "demo")


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("shards", ["--help"]),
        *(("shards", [verb, "--help"]) for verb in SHARDS_VERBS),
        ("throughput", ["--help"]),
        ("throughput", ["convert", "--help"]),
        ("throughput", ["remote", "--help"]),
        ("throughput", ["scale", "--help"]),
        ("report", ["--help"]),
        ("predict", ["--help"]),
        ("export", ["--help"]),
        ("throughput", ["step", "--help"]),
        ("throughput", ["compare", "--help"]),
        ("throughput", ["model", "--help"]),
        ("throughput", ["loader", "--help"]),
        ("throughput", ["train", "--help"]),
        ("throughput", ["tune", "--help"]),
    ],
)
def test_help_of_the_tools_needs_neither_torch_nor_dali(tool: str, arguments: list[str]) -> None:
    script = (
        "import sys\n"
        f"from tools.{tool}.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "assert not {'torch', 'nvidia', 'PIL', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(rf"usage: .*\b{tool}\b", done.stdout)
