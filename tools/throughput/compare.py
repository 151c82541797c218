"""`throughput compare`: this project's loader, other loaders, and the decoder alone."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from model.distributed import choose_device
from pipelines.augment import RandomResizedCrop
from pipelines.loader import MEAN, STD, resize_shorter_for
from pipelines.machine import num_cpus
from pipelines.printable import counted
from pipelines.shards.index import Component, read_index
from pipelines.shards.members import IMAGE_EXTENSIONS, require_members
from pipelines.shards.shard_set import ShardSet, open_shards
from tools.throughput.hardware import DALI_PACKAGES, DECODER_PACKAGES
from tools.throughput.options import Compare
from tools.throughput.process import open_scratch, probe, run_loader, run_measured
from tools.throughput.report import LOADER_COSTS, RATE, RATIO, Report, Row, Table
from tools.throughput.rounds import Outcome, Turn, take_turns
from tools.throughput.turn import Task

MODULES = ("torchvision", "litdata", "streaming", "spdl", "ffcv")
DISTRIBUTIONS = (
    *(*DALI_PACKAGES, *DECODER_PACKAGES, "torch", "pillow", "webdataset"),
    *("torchvision", "litdata", "mosaicml-streaming", "spdl-core", "spdl-io", "ffcv"),
)
COLUMNS = (RATE, RATIO, *LOADER_COSTS)
BASELINE = "dali"
PREPARED_FACTOR = 2.2  # bytes that a loader prepares, relative to the images; LitData keeps its chunks twice for a while


@dataclass(frozen=True)
class Competitor:
    """A loader, or the decoder alone. Peers read image files, or prepare their own data from them."""

    name: str  # for --only
    what: str  # its name in the table
    needs: str | None = None  # module that the peers' interpreter must have; `None`: this project's interpreter runs it
    has_to_prepare: bool = False  # it reads a file format of its own, which is written before the measurement
    only_on: str | None = None  # the only device type on which it is measured; `None` for both


DECODER = Competitor("decode", "the decoder alone: whole images, all cores", only_on="cpu")
COMPETITORS = (
    Competitor("ours", "this project's loader"),
    Competitor(BASELINE, "DALI as documented (its PyTorch iterator)"),
    Competitor("pillow", "DataLoader and Pillow, this project's pair"),
    Competitor("webdataset", "webdataset WebLoader, Pillow"),
    Competitor("torchvision", "DataLoader, Pillow, torchvision", "torchvision"),
    Competitor("torchvision-gpu", "torchvision's decode_jpeg and transforms, on the GPU", "torchvision", only_on="cuda"),
    Competitor("litdata", "LitData, Pillow, torchvision", "litdata", has_to_prepare=True),
    Competitor("mds", "MosaicML Streaming, Pillow, torchvision", "streaming", has_to_prepare=True),
    Competitor("spdl", "SPDL (FFmpeg)", "spdl"),
    Competitor("ffcv", "FFCV, the same JPEGs", "ffcv", has_to_prepare=True, only_on="cpu"),
    Competitor("ffcv-encoded", "FFCV, encoded anew at quality 90", "ffcv", has_to_prepare=True, only_on="cpu"),
    DECODER,
)


class Sample(NamedTuple):
    """An image in a tar, and its class number."""

    tar: str
    image: Component
    label: int


def benchmark(options: Compare) -> Report:
    """Runs all loaders on the same images, in turns, each turn in a process of its own."""
    device, threads, peers_python = str(choose_device(options.device)), options.threads or num_cpus(), options.peers_python
    chosen = choose(options.only, [each for each in COMPETITORS if each.only_on in (None, device.partition(":")[0])])
    shards = first_shards(open_shards(options.shards, "train"), max(options.images, options.batch_size), threads)
    if shards.num_samples < options.batch_size:
        raise ValueError(
            f"{options.shards} has {counted(shards.num_samples, 'sample')}, fewer than a batch of {options.batch_size}; choose "
            "a smaller --batch-size"
        )
    modules, peers_versions = probe(peers_python, MODULES, DISTRIBUTIONS)
    present = [each for each in chosen if each.needs is None or each.needs in modules]
    reads_files = any(each.needs or each is DECODER for each in present)
    samples = read_samples(shards)
    image_bytes = sum(sample.image.size for sample in samples)
    needed_bytes = image_bytes * (reads_files + PREPARED_FACTOR * sum(each.has_to_prepare for each in present))
    with open_scratch(options.scratch, int(needed_bytes)) as (folder, environment):
        if reads_files:
            extract(samples, folder)
        turns = dict[str, Callable[[], Turn]]()
        for split in options.splits:
            task = make_task(options, split, shards, folder, device, threads)
            for each in present:
                turns[f"{split} {each.name}"] = make_turn(each, task, folder, environment, peers_python)
        outcomes = take_turns(turns, options.rounds)
    rates = [outcome.summary("images_per_second") for outcome in outcomes.values()]
    coverage = max((rate.coverage for rate in rates if rate), default=0.0)
    found = {"samples": shards.num_samples, "image_bytes": image_bytes, "device": device, "threads": threads}
    return Report(
        heading=f"{options.shards}: {counted(len(samples), 'image')} of {image_bytes / len(samples) / 1e3:.0f} KB; "
        f"{counted(options.rounds, 'round')}, {counted(options.images, 'image')} per turn, batches of {options.batch_size} x "
        f"{options.image_size} pixels, {counted(threads, 'thread or process', 'threads or processes')}, {device}; "
        f"median ({100 * coverage:.0f} % interval)",
        tables=[Table(split, COLUMNS, [_row(each, split, outcomes) for each in chosen]) for split in options.splits],
        settings={**vars(options), **found, "peers_versions": peers_versions},
        versions=probe(sys.executable, MODULES, DISTRIBUTIONS)[1],
    )


def choose(only: Sequence[str], possible: Sequence[Competitor]) -> list[Competitor]:
    """Returns the named competitors and the baseline; without names, all that are possible."""
    names = [each.name for each in possible]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"--only {unknown[0]}: no such loader; there are {', '.join(names)}")
    return [each for each in possible if not only or each.name in (*only, BASELINE)]


def first_shards(shards: ShardSet, num_samples: int, num_shards: int) -> ShardSet:
    """Returns the first shards with that many samples, and at least that many shards, so that each process has one."""
    count = 0
    while count < len(shards.tars) and (count < num_shards or sum(shards.lengths[:count]) < num_samples):
        count += 1
    parts = {name: getattr(shards, name)[:count] for name in ("tars", "indices", "lengths", "sizes")}
    return dataclasses.replace(shards, **parts)


def read_samples(shards: ShardSet) -> list[Sample]:
    """Returns all samples, in order. A ValueError names a sample without an image, or without a number as its label."""
    samples = []
    for tar, index in zip(shards.tars, shards.indices, strict=True):
        with open(tar, "rb") as file:
            for sample in read_index(index):
                image, label = require_members(tar, sample, IMAGE_EXTENSIONS, "cls")
                file.seek(label.offset)
                number = file.read(label.size).strip()
                if not number.isdigit():
                    text = number[:40].decode(errors="replace")
                    raise ValueError(
                        f"{tar}:{label.offset}:{label.name}: the label is {text!r}; other loaders need the numbers that "
                        "`shards convert` writes"
                    )
                samples.append(Sample(tar, image, int(number)))
    return samples


def extract(samples: Sequence[Sample], folder: Path) -> None:
    """Writes the images as files, and `folder`/list with a line `LABEL PATH` for each."""
    lines = list[str]()
    (folder / "images").mkdir()
    for tar, group in itertools.groupby(samples, key=lambda sample: sample.tar):
        with open(tar, "rb") as file:
            for _, image, label in group:
                path = folder / "images" / f"{len(lines):08d}.{image.extension}"
                file.seek(image.offset)
                path.write_bytes(file.read(image.size))
                lines.append(f"{label} {path}\n")
    (folder / "list").write_text("".join(lines))


def make_task(options: Compare, split: str, shards: ShardSet, folder: Path, device: str, threads: int) -> Task:
    """Returns the task of all loaders, but for their own folders."""
    crop = RandomResizedCrop()
    return Task(
        split=split,
        tars=tuple(map(str, shards.tars)),
        indices=tuple(map(str, shards.indices)),
        list=str(folder / "list"),
        folder="",
        batch_size=options.batch_size,
        image_size=options.image_size,
        resize_shorter=resize_shorter_for(options.image_size),
        scale=crop.scale,
        ratio=crop.ratio,
        mean=MEAN,
        std=STD,
        threads=threads,
        device=device,
        images=options.images,
    )


def make_turn(
    competitor: Competitor, task: Task, folder: Path, environment: Mapping[str, str], peers_python: str
) -> Callable[[], Turn]:
    """Returns a function that runs a turn of the competitor."""
    command: tuple[str, ...] = (sys.executable, "-m", "tools.throughput.loaders")
    if competitor.needs:
        command = (peers_python, "-m", "tools.throughput.peer_loaders")
    data, path = folder / competitor.name, folder / f"{competitor.name}-{task.split}.json"
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(task, folder=str(data)))))

    def decode() -> Turn:
        in_memory = (sys.executable, "-m", "tools.throughput.in_memory", "decode", task.list)
        said = run_measured(in_memory, folder / "logs", environment).said
        return {"images_per_second": said["images"] / said["seconds"], **dict.fromkeys(each.key for each in LOADER_COSTS)}

    def run() -> Turn:
        if competitor.has_to_prepare and not data.exists():
            run_measured((*command, f"prepare-{competitor.name}", path), folder / "logs", environment)
        return run_loader((*command, competitor.name, path), folder / "logs", environment)

    return decode if competitor is DECODER else run


def _row(competitor: Competitor, split: str, outcomes: Mapping[str, Outcome]) -> Row:
    outcome, baseline = outcomes.get(f"{split} {competitor.name}"), outcomes[f"{split} {BASELINE}"]
    labels = {"split": split, "name": competitor.name, "turns": outcome.turns if outcome else ()}
    return Row.of(competitor.what, outcome, COLUMNS, baseline, **labels)
