"""The competitors of `tools.bench.convert`, with their commands."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.machine import num_cpus
from tools.throughput.hardware import DECODER_PACKAGES

# Modules of the peers that this project does not depend on, and the distributions that contain them.
PEER_MODULES = {
    "litdata": "litdata",
    "streaming": "mosaicml-streaming",
    "img2dataset": "img2dataset",
    "cv2": "opencv-python-headless",
}
DISTRIBUTIONS = ("webdataset", "pillow", "torch", *DECODER_PACKAGES, *PEER_MODULES.values())
COPIED, CHECKED, RESIZED = "copied", "checked", "resized"


@dataclass(frozen=True)
class Competitor:
    """A command that converts, or a bound for such commands.

    Placeholders of a command: `{source}` is the folder of class folders, `{files}` a list of its files, `{paths}` a list with
    labels and absolute paths, `{destination}` the folder for the output.
    """

    name: str  # for --only
    group: str  # competitors with the same work; the first one of a group is its baseline
    what: str  # its name in the table
    command: tuple[str, ...]
    needs: str | None = None  # module that the peers' interpreter must have
    is_bound: bool = False


def competitors(peers_python: str, resize: int, quality: int) -> list[Competitor]:
    """Returns all competitors, group by group."""
    shape = ("--resize", str(resize), "--quality", str(quality))
    all_cores = ("--workers", str(num_cpus()))

    def ours(name: str, group: str, *options: str) -> Competitor:
        command = (sys.executable, "-m", "tools.shards", "convert", "{source}", "{destination}", "--json", *options)
        return Competitor(name, group, " ".join(["shards convert", *options]), command)

    def bound(name: str, group: str, what: str, *options: str) -> Competitor:
        command = (sys.executable, "-m", "tools.throughput.in_memory", name, "{paths}", *options)
        return Competitor(name, group, f"{what}, in memory, all cores", command, is_bound=True)

    def peer(name: str, group: str, what: str, writer: str, needs: str | None, *options: str) -> Competitor:
        python = peers_python if needs else sys.executable
        command = (python, "-m", "tools.bench.peer_writers", writer, "{paths}", "{destination}", *options)
        return Competitor(name, group, what, command, needs)

    tar = ("tar", "cf", "{destination}/train.tar", "-C", "{source}", "--verbatim-files-from", "-T", "{files}")
    # Writers, and the modules that they need from the peers' interpreter.
    webdataset, opencv, mds = ("webdataset", None), ("webdataset", "cv2"), ("mds", "streaming")
    litdata, img2dataset = ("litdata", "litdata"), ("img2dataset", "img2dataset")
    resized = (*shape, *all_cores)
    return [
        Competitor("tar", COPIED, "tar cf, the same files", tar),
        Competitor("cp", COPIED, "cp -r", ("cp", "-r", "{source}", "{destination}")),
        ours("shards", COPIED, "--check", "none"),
        ours("shards-1", COPIED, "--check", "none", "--workers", "1"),
        peer("webdataset", COPIED, "webdataset ShardWriter, 1 process", *webdataset),
        peer("mds", COPIED, "mosaicml-streaming MDSWriter, 1 process", *mds),
        peer("litdata", COPIED, "litdata optimize, all cores", *litdata, *all_cores),
        peer("img2dataset", COPIED, "img2dataset, no decoding, all cores", *img2dataset, *all_cores),
        bound("decode", CHECKED, "the decoder alone"),
        ours("shards-checked", CHECKED),
        peer("img2dataset-checked", CHECKED, "img2dataset, decoding, all cores", *img2dataset, "--check", *all_cores),
        bound("resize", RESIZED, "decode, resize, encode alone", *shape),
        ours("shards-resized", RESIZED, *shape),
        peer("pillow-1", RESIZED, "Pillow, webdataset ShardWriter, 1 process", *webdataset, *shape),
        peer("pillow", RESIZED, "Pillow, webdataset ShardWriter, all cores", *webdataset, *resized),
        peer("opencv", RESIZED, "OpenCV, webdataset ShardWriter, all cores", *opencv, *resized, "--codec", "opencv"),
        peer("mds-resized", RESIZED, "Pillow, MDSWriter, all cores", *mds, *resized),
        peer("litdata-resized", RESIZED, "Pillow, litdata optimize, all cores", *litdata, *resized),
        peer("img2dataset-resized", RESIZED, "img2dataset (OpenCV), all cores", *img2dataset, *resized),
    ]


def choose(everybody: Sequence[Competitor], only: Sequence[str]) -> list[Competitor]:
    """Returns the competitors that are named, by their own or their group's name; all if none is named."""
    names = dict.fromkeys([*(each.group for each in everybody), *(each.name for each in everybody)])
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"--only {unknown[0]}: no such competitor; there are {', '.join(names)}")
    return [each for each in everybody if not only or each.name in only or each.group in only]
