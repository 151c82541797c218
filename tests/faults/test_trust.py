"""Files from strangers run no code, reach nothing outside of their folder, and steer no terminal and no page."""

import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import load_checkpoint, load_weights_file
from model.init_from import read_initial_weights
from model.load_model import load_model
from pipelines.shards.find_tars import INFO_FILE
from tests.conftest import write_image
from tests.faults.campaign import Outcomes, keep
from tests.faults.children import command, run
from tests.faults.hostile import hostile_checkpoints, hostile_tar
from tests.faults.subjects import armed
from tests.helpers import checkpoints
from tests.helpers.command import Done, run_main
from tools.evaluate import cli as evaluate
from tools.predict import cli as predict
from tools.report import cli as report
from tools.run.checkpoints import newest_checkpoint
from tools.shards import cli as shards_cli

ROOT = Path(__file__).parents[2]
# What may be in a terminal, besides text: nothing that steers it.
STEERS = {chr(code) for code in (*range(32), *range(127, 160)) if chr(code) != "\n"} | {"\u2028", "\u2029", "\u202e"}
NAMES = (
    "<script>alert(1)</script>",
    "a\x1b[31mred\x1b[0m",
    "b\x1b]0;title\x07",
    "c\nerror: a forged line",
    "d\r\x9b2J",
    'e"onload="x',
    "f\u202etxt",
    "g&amp;<b>",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


LOADERS: dict[str, Callable[[Path], Any]] = {
    "load_checkpoint": load_checkpoint,
    "load_weights_file": load_weights_file,
    "load_model": load_model,
    "--init-from": read_initial_weights,
    "--resume": lambda path: newest_checkpoint(path.parent.parent),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("loader", LOADERS)
def test_no_checkpoint_runs_code(loader: str, tmp_path: Path) -> None:
    marker, outcomes = tmp_path / "it-ran", Outcomes()
    path = tmp_path / "run" / "checkpoints" / "step-000000001.pt"
    path.parent.mkdir(parents=True)
    for name, content in hostile_checkpoints(marker).items():
        path.write_bytes(content)
        try:
            LOADERS[loader](path)
        except ValueError as error:
            text = str(error)
            advice = (
                "weights_only=False" in text and loader != "--init-from"
            )  # which says how to extract weights that are trusted
            wrong = "\n" in text or advice or str(tmp_path) not in text
            outcomes.fail("a bad message", f"{name}: {text}") if wrong else outcomes.update(["refused"])
        except Exception as error:
            outcomes.fail(f"a {type(error).__name__}", f"{name}: {error}")
        else:
            outcomes["loaded, and nothing ran"] += 1
        if marker.exists():
            outcomes.fail("code ran", f"{name}: {keep(f'hostile-{name}.pt', content)}")
            marker.unlink()
    outcomes.finish("trust", f"hostile checkpoints: {loader}")


@pytest.mark.parametrize("prefix", ["", "cat/"])
@pytest.mark.parametrize("verb", ["index", "verify", "convert", "info", "preview"])
def test_members_reach_nothing_outside(verb: str, prefix: str, tmp_path: Path) -> None:
    """The audit hook tells every file that a command opens for writing, links, makes or deletes, wherever it lies."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    write_image(tmp_path / "x.jpg", 1)
    tar = inside / "t-000000.tar"
    tar.write_bytes(hostile_tar((tmp_path / "x.jpg").read_bytes(), prefix))
    words = {
        "convert": ("convert", tar, inside / "out", "--workers", 1),
        "preview": ("preview", tar, "-o", inside / "sheet.png"),
    }.get(verb, (verb, tar))
    changes = tmp_path / "changes"
    (tmp_path / "temporary").mkdir()
    env = {"TMPDIR": str(tmp_path / "temporary")}
    ended = run(armed, "/", 0, str(changes), *command("tools.shards.cli:main", *words), log=tmp_path / "log", env=env)
    outcomes = Outcomes()
    allowed = (*(str(tmp_path / name) for name in ("a/b", "cache", "temporary", "log")), "/dev/", "/proc/")
    for line in changes.read_text().splitlines() if changes.exists() else ():
        what, _, path = line.partition(" ")
        if path.startswith("/") and not path.startswith(allowed) and "__pycache__" not in path and ".triton" not in path:
            outcomes.fail("a file outside", f"{what} {path}")
    if "Traceback" in ended.output or ended.status is None or ended.status < 0:
        outcomes.fail("a crash", f"exit status {ended.status}: {ended.output[-500:]}")
    secret = Path("/etc/passwd").read_bytes()[:40]
    if any(secret in path.read_bytes() for path in inside.rglob("*") if path.is_file()):
        outcomes.fail("a file was read", "/etc/passwd")
    outcomes[f"exit status {ended.status}, nothing outside"] += 1
    outcomes.finish("trust", f"members that point outside: shards {verb}{' in class folders' if prefix else ''}")


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders and images with strange names, shards of them, and a checkpoint of their classes."""
    folder = tmp_path_factory.mktemp("strange")
    for i, name in enumerate(NAMES):
        for k in range(3):
            write_image(folder / "images" / name.replace("/", "_") / f"{k}{name.replace('/', '_')}.jpg", 3 * i + k)
    (folder / "images" / NAMES[0].replace("/", "_") / f"bad{NAMES[1]}.jpg").write_bytes(b"no image")
    return folder


def steering(done: Done) -> str:
    return "".join(sorted({*done.stdout, *done.stderr} & STEERS - {"\t"}))


def test_names_in_terminals_and_json(strange: Path, tmp_path: Path) -> None:
    """Every command that prints names of classes, members or files."""
    outcomes = Outcomes()
    checkpoint = checkpoints.write(tmp_path / "best.pt", classes=("ant", NAMES[1], NAMES[3]))
    (tmp_path / "shards").mkdir()
    commands: list[tuple[Callable[..., None], tuple[object, ...]]] = [
        (shards_cli.main, ("convert", strange / "images", tmp_path / "shards", "--workers", 1)),
        (shards_cli.main, ("convert", strange / "images", tmp_path / "shards", "--workers", 1, "--name", "valid")),
        (shards_cli.main, ("info", tmp_path / "shards")),
        (shards_cli.main, ("verify", tmp_path / "shards", "--workers", 1)),
        (shards_cli.main, ("verify", strange / "images" / NAMES[1], "--workers", 1)),
        (predict.main, (checkpoint, strange / "images", "--device", "cpu")),
        (predict.main, (checkpoint, strange / "images", "--device", "cpu", "--json")),
        (evaluate.main, (checkpoint, tmp_path / "shards", "--device", "cpu")),
    ]
    for main, words in commands:
        done = run_main(main, *words)
        name = f"{main.__module__} {' '.join(map(str, words[:1]))}"
        if found := steering(done):
            outcomes.fail("steers the terminal", f"{name}: {found!r}")
        elif "error: a forged line" in (done.stdout + done.stderr).splitlines():
            outcomes.fail("a forged line", name)
        elif "--json" in words and not all(isinstance(json.loads(line), dict) for line in done.stdout.splitlines()):
            outcomes.fail("no JSON", name)
        else:
            outcomes["harmless"] += 1
    for file in (INFO_FILE, "rejected.jsonl"):
        content = (tmp_path / "shards" / file).read_bytes()
        for line in content.splitlines() if file.endswith("l") else [content]:
            json.loads(line)
    outcomes.finish("trust", "strange names in terminals and JSON")


class Tags(html.parser.HTMLParser):
    """Collects the tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag, *(f"{tag} {name}" for name, _ in attrs if name.startswith("on"))]


def test_names_in_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcomes = Outcomes()
    for name in NAMES:
        run_folder = tmp_path / name.replace("/", "_")
        run_folder.mkdir()
        line = {
            "split": "valid",
            "epoch": 1,
            "step": 1,
            "top1": 1.0,
            "top5": 1.0,
            "ema_top1": 1.0,
            "ema_top5": 1.0,
            "loss": 1.0,
        }
        (run_folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        settings = {"data": {"train": name, "valid": name}, "epochs": 1, "run_dir": name, name: name, "recipe": name}
        (run_folder / "config.json").write_text(json.dumps(settings))
        done = run_main(report.main, run_folder, "-o", tmp_path / "page.html")
        tags = Tags()
        page = (tmp_path / "page.html").read_text() if (tmp_path / "page.html").exists() else ""
        tags.feed(page)
        if (
            {"script", "b"} & {*tags.found}
            or any(" on" in tag for tag in tags.found)
            or steering(done)
            or {*page} & STEERS - {"\t"}
        ):
            outcomes.fail("not escaped", f"{name!r}: {sorted({*tags.found})} {steering(done)!r} {sorted({*page} & STEERS)}")
        elif done.status:
            outcomes.fail("no report", f"{name!r}: {done.stderr}")
        else:
            outcomes["escaped"] += 1
    outcomes.finish("trust", "strange names in the report")


def versions(path: Path) -> dict[str, set[str]]:
    """Returns the versions of each package in a file of requirements."""
    found: dict[str, set[str]] = {}
    for line in path.read_text().splitlines():
        if pinned := re.match(r"([\w.-]+)==([^\s;]+)", line):
            found.setdefault(re.sub(r"[-_.]+", "-", pinned[1]).lower(), set()).add(pinned[2])
    return found


def test_dependencies_are_pinned_with_hashes() -> None:
    """`make lock` ran after the last change of constraints.txt or of the dependencies."""
    lock = ROOT / "requirements.lock"
    assert [line for line in lock.read_text().splitlines() if not re.search(r"^#| --hash=sha256:[0-9a-f]{64}$", line)] == []
    locked, constrained = versions(lock), versions(ROOT / "constraints.txt")
    assert {name: found for name, found in locked.items() if not found <= constrained.get(name, found)} == {}
    project = (ROOT / "pyproject.toml").read_text()
    dependencies = project[project.index("dependencies") : project.index("[project.scripts]")]
    listed = re.findall(r'"([A-Za-z][\w-]*)(?:>=[\d.]+)?"', dependencies)
    assert {name.lower() for name in listed} - locked.keys() == {"nvidia-dali-cuda130"}  # instead of nvidia-dali-cuda120
