"""Who takes part in `throughput convert`, and with which command; and what an interpreter has, for `throughput compare` too."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.shards.parallel import num_cpus

# Modules of the peers that are no dependencies of this project, and the distributions that bring them.
PEER_MODULES = {
    "litdata": "litdata",
    "streaming": "mosaicml-streaming",
    "img2dataset": "img2dataset",
    "cv2": "opencv-python-headless",
}
DISTRIBUTIONS = ("webdataset", "pillow", "torch", "nvidia-nvimgcodec-cu12", *PEER_MODULES.values())

ROOT = Path(__file__).parents[2]  # where `python -m tools...` works, with any interpreter
ENVIRONMENT = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}  # img2dataset would ask the network on each start


@dataclass(frozen=True)
class Competitor:
    """A command that converts, or a floor for those that do.

    Attributes:
        name: Unique, for --only.
        group: Who does the same work; the first of a group is its reference.
        what: For the reader of the table.
        command: `{source}` is the folder of class folders, `{files}` a list of its files, `{paths}` one with labels and
            absolute paths, `{destination}` the folder to write to.
        floor: It writes nothing, and only the seconds that it measures itself count.
        needs: Module that has to be there.
    """

    name: str
    group: str
    what: str
    command: tuple[str, ...]
    floor: bool = False
    needs: str | None = None


def competitors(peers_python: str, resize: int, quality: int) -> list[Competitor]:
    """All of them, group by group."""
    cores = str(num_cpus())
    ours = (sys.executable, "-m", "tools.shards", "convert", "{source}", "{destination}", "--json")
    floors = (sys.executable, "-m", "tools.bench.floors")
    shape = ("--resize", str(resize), "--quality", str(quality))

    def peer(python: str, writer: str, *options: str) -> tuple[str, ...]:
        return (python, "-m", "tools.bench.peer_writers", writer, "{paths}", "{destination}", *options)

    copied, checked, resized = "copied", "checked", "resized"
    return [
        Competitor(
            "tar",
            copied,
            "tar cf, the same files",
            ("tar", "cf", "{destination}/train.tar", "-C", "{source}", "--verbatim-files-from", "-T", "{files}"),
        ),
        Competitor("cp", copied, "cp -r", ("cp", "-r", "{source}", "{destination}")),
        Competitor("shards", copied, "shards convert --check none", (*ours, "--check", "none")),
        Competitor("shards-1", copied, "shards convert --check none --workers 1", (*ours, "--check", "none", "--workers", "1")),
        Competitor("webdataset", copied, "webdataset ShardWriter, 1 process", peer(sys.executable, "webdataset")),
        Competitor("mds", copied, "mosaicml-streaming MDSWriter, 1 process", peer(peers_python, "mds"), needs="streaming"),
        Competitor(
            "litdata", copied, "litdata optimize, all cores", peer(peers_python, "litdata", "--workers", cores), needs="litdata"
        ),
        Competitor(
            "img2dataset",
            copied,
            "img2dataset, no decoding, all cores",
            peer(peers_python, "img2dataset", "--workers", cores),
            needs="img2dataset",
        ),
        Competitor("decode", checked, "the decoder alone, in memory, all cores", (*floors, "decode", "{paths}"), floor=True),
        Competitor("shards-checked", checked, "shards convert", ours),
        Competitor(
            "img2dataset-checked",
            checked,
            "img2dataset, decoding, all cores",
            peer(peers_python, "img2dataset", "--check", "--workers", cores),
            needs="img2dataset",
        ),
        Competitor(
            "resize",
            resized,
            "decode, resize, encode alone, in memory, all cores",
            (*floors, "resize", "{paths}", *shape),
            floor=True,
        ),
        Competitor("shards-resized", resized, f"shards convert --resize {resize}", (*ours, *shape)),
        Competitor(
            "pillow-1", resized, "Pillow, webdataset ShardWriter, 1 process", peer(sys.executable, "webdataset", *shape)
        ),
        Competitor(
            "pillow",
            resized,
            "Pillow, webdataset ShardWriter, all cores",
            peer(sys.executable, "webdataset", *shape, "--workers", cores),
        ),
        Competitor(
            "opencv",
            resized,
            "OpenCV, webdataset ShardWriter, all cores",
            peer(peers_python, "webdataset", *shape, "--codec", "opencv", "--workers", cores),
            needs="cv2",
        ),
        Competitor(
            "mds-resized",
            resized,
            "Pillow, MDSWriter, all cores",
            peer(peers_python, "mds", *shape, "--workers", cores),
            needs="streaming",
        ),
        Competitor(
            "litdata-resized",
            resized,
            "Pillow, litdata optimize, all cores",
            peer(peers_python, "litdata", *shape, "--workers", cores),
            needs="litdata",
        ),
        Competitor(
            "img2dataset-resized",
            resized,
            "img2dataset (OpenCV), all cores",
            peer(peers_python, "img2dataset", *shape, "--workers", cores),
            needs="img2dataset",
        ),
    ]


def choose(everybody: Sequence[Competitor], only: Sequence[str]) -> list[Competitor]:
    """Those named, by their own or their group's name; all where none is.

    Raises:
        ValueError: There is no such competitor.
    """
    known = {name for competitor in everybody for name in (competitor.name, competitor.group)}
    unknown = [name for name in only if name not in known]
    if unknown:
        groups = dict.fromkeys(competitor.group for competitor in everybody)
        names = ", ".join([*groups, *(competitor.name for competitor in everybody)])
        raise ValueError(f"--only {unknown[0]}: no such competitor; there are {names}")
    return [one for one in everybody if not only or one.name in only or one.group in only]


def probe(python: str, modules: Iterable[str], distributions: Iterable[str]) -> tuple[set[str], dict[str, str]]:
    """Which of the modules an interpreter has, and the versions of those of the distributions that it has.

    Raises:
        ValueError: It is no Python interpreter.
    """
    script = (
        "import importlib.util, json, sys\n"
        "from tools.throughput.hardware import versions\n"
        "modules, distributions = json.loads(sys.argv[1])\n"
        "print(json.dumps([[m for m in modules if importlib.util.find_spec(m)], versions(distributions)]))\n"
    )
    question = json.dumps([[*modules], [*distributions]])
    try:
        done = subprocess.run(
            [python, "-c", script, question], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
        present, found = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise ValueError(f"--peers-python {python}: not a Python interpreter ({error})") from error
    return set(present), found
