"""`throughput compare`: this project's loader against others, and beside the decoder alone."""

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipelines.augment import RandomResizedCrop
from pipelines.loader import MEAN, STD, resize_shorter_for
from pipelines.shards.index import Component, read_index
from pipelines.shards.shard_set import IMAGE_EXTENSIONS, ShardSet, find_component, open_shards
from tools.bench.converters import ROOT, probe
from tools.throughput.process import Run, run_measured
from tools.throughput.report import Bar, Report
from tools.throughput.rounds import Outcome, Statistic, summarize, take_turns
from tools.throughput.scratch import open_scratch
from tools.throughput.turn import Task

MODULES = ("torchvision", "litdata", "streaming", "spdl", "ffcv")
DISTRIBUTIONS = (
    *("nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "torch", "pillow", "webdataset"),
    *("torchvision", "litdata", "mosaicml-streaming", "spdl-core", "spdl-io", "ffcv"),
)
REFERENCE = "dali"
PREPARED_FACTOR = 2.2  # what a loader prepares, to the images' bytes; LitData has its chunks twice for a while


@dataclass(frozen=True)
class Rival:
    """A loader, or the decoder alone.

    Attributes:
        name: For --only.
        what: For the reader of the table.
        needs: Module that the peers' interpreter has to have; None for those that this project's interpreter runs. Those of the
            peers read the images as files, or prepare from these what they read.
        has_to_prepare: It reads files of a kind of its own, which are written before the measurement.
        only_on: The one kind of device on which it is measured; None where it is on both.
    """

    name: str
    what: str
    needs: str | None = None
    has_to_prepare: bool = False
    only_on: str | None = None


# Not a bound: a loader may decode no more than the crop of an image.
DECODER = Rival("decode", "the decoder alone: whole images, all cores", only_on="cpu")
RIVALS = (
    Rival("ours", "this project's loader"),
    Rival(REFERENCE, "DALI as documented (its PyTorch iterator)"),
    Rival("pillow", "DataLoader and Pillow, this project's pair"),
    Rival("webdataset", "webdataset WebLoader, Pillow"),
    Rival("torchvision", "DataLoader, Pillow, torchvision", "torchvision"),
    Rival("torchvision-gpu", "torchvision's decode_jpeg and transforms, on the GPU", "torchvision", only_on="cuda"),
    Rival("litdata", "LitData, Pillow, torchvision", "litdata", has_to_prepare=True),
    Rival("mds", "MosaicML Streaming, Pillow, torchvision", "streaming", has_to_prepare=True),
    Rival("spdl", "SPDL (FFmpeg)", "spdl"),
    Rival("ffcv", "FFCV, the same JPEGs", "ffcv", has_to_prepare=True, only_on="cpu"),
    Rival("ffcv-encoded", "FFCV, encoded anew at quality 90", "ffcv", has_to_prepare=True, only_on="cpu"),
    DECODER,
)


@dataclass(frozen=True)
class Turn:
    """What a loader did in a round; the last three are None for the decoder alone."""

    images_per_second: float
    first_seconds: float | None = None
    cpu_milliseconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """A loader's turns, and what follows from them.

    Attributes:
        split: What was done to the images: "train" or "valid".
        name: Of the loader.
        what: The same for people.
        is_installed: Whether it is there.
        error: What it printed last, where it failed.
        turns: One a round.
        images_per_second: Once it is warm.
        ratio: The same as a part of DALI's in the same round.
        first_seconds: From the start of the process to the first batch, importing torch included.
        cpu_milliseconds: Of all its processes and threads, for an image.
        peak_memory_bytes: The largest of the rounds.
    """

    split: str
    name: str
    what: str
    is_installed: bool = True
    error: str | None = None
    turns: tuple[Turn, ...] = ()
    images_per_second: Statistic | None = None
    ratio: Statistic | None = None
    first_seconds: Statistic | None = None
    cpu_milliseconds: Statistic | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class CompareReport(Report):
    """All that was measured; samples and their image bytes are those of the shards that were read, see `first_shards`."""

    shards: str
    samples: int
    image_bytes: int
    images: int
    batch_size: int
    image_size: int
    device: str
    threads: int
    rounds: int
    results: tuple[Result, ...]
    peers_versions: dict[str, str]

    def bars(self) -> Iterable[Bar]:
        return [Bar(r.split, r.what, r.images_per_second) for r in self.results if r.images_per_second]

    def __str__(self) -> str:
        coverage = max((result.images_per_second.coverage for result in self.results if result.images_per_second), default=0.0)
        lines = [
            f"{self.shards}: {self.samples:,} images of {self.image_bytes / self.samples / 1e3:.0f} KB; {self.rounds} rounds, "
            f"{self.images:,} images a turn, {self.batch_size} x {self.image_size} pixels a batch, {self.threads} threads or "
            f"processes, {self.device}; {self.hardware}; median ({100 * coverage:.0f} % interval)"
        ]
        for split in dict.fromkeys(result.split for result in self.results):
            lines += ["", f"{split:<52}{'images/s':>10}{'ratio':>22}{'CPU ms':>9}{'first batch':>13}{'memory MB':>11}"]
            lines += [_line(result) for result in self.results if result.split == split]
        return "\n".join(lines)


def benchmark(
    location: str,
    *,
    splits: Sequence[str],
    rounds: int,
    images: int,
    batch_size: int,
    image_size: int,
    device: str,
    threads: int,
    only: Sequence[str],
    peers_python: str,
    scratch: Path,
) -> CompareReport:
    """Lets all loaders give the same images, in turns, each a process of its own.

    Args:
        location: Shards, as --data.train takes them.
        splits: What to do to them: "train", "valid".
        rounds: Turns of each loader.
        images: That a loader gives in a turn, once it is warm, epoch after epoch. Of the shards the first are read that hold so
            many.
        batch_size: Images a batch.
        image_size: Side of the images, pixels.
        device: Where the batches are wanted, as torch calls it: "cpu", "cuda:0".
        threads: Threads or processes that decode.
        only: Names of loaders; all where empty.
        peers_python: The interpreter that has the peers installed.
        scratch: Folder to write in, made if need be; left as it was.

    Raises:
        ValueError: The arguments or the shards cannot be used as they are; says what to change.
        OSError: The disk is full.
    """
    numbers = {"rounds": rounds, "images": images, "batch-size": batch_size, "image-size": image_size, "threads": threads}
    for option, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{option} {number}: at least 1 is needed")
    rivals = choose(only, device)
    shards = first_shards(open_shards(location, "train"), max(images, batch_size), threads)
    if shards.is_remote or shards.num_samples < batch_size:
        raise ValueError(f"{location}: at least {batch_size} samples in local shards are needed")
    modules, peers_versions = probe(peers_python, MODULES, DISTRIBUTIONS)
    present = [rival for rival in rivals if rival.needs is None or rival.needs in modules]
    reads_files = any(rival.needs or rival is DECODER for rival in present)
    samples = read_samples(shards)
    image_bytes = sum(sample.image.size for sample in samples)
    needed_bytes = image_bytes * (reads_files + PREPARED_FACTOR * sum(rival.has_to_prepare for rival in present))
    with open_scratch(scratch, int(needed_bytes)) as (folder, environment):
        if reads_files:
            extract(samples, folder)
        ground = Ground(shards, folder, environment, peers_python, batch_size, image_size, device, threads, images)
        turns = {(split, rival.name): ground.turn(rival, split) for split in splits for rival in present}
        outcomes = take_turns({f"{split} {name}": turn for (split, name), turn in turns.items()}, rounds)
    return CompareReport(
        *(location, shards.num_samples, image_bytes, images, batch_size, image_size, device, threads, rounds),
        tuple(_result(rival, split, outcomes) for split in splits for rival in rivals),
        peers_versions,
        versions=probe(sys.executable, MODULES, DISTRIBUTIONS)[1],
    )


def choose(only: Sequence[str], device: str) -> list[Rival]:
    """Those named, and the reference; where none is named, all that run on such a device.

    Raises:
        ValueError: There is no such loader.
    """
    rivals = [rival for rival in RIVALS if rival.only_on in (None, device.partition(":")[0])]
    names = [rival.name for rival in rivals]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"--only {unknown[0]}: no such loader; there are {', '.join(names)}")
    return [rival for rival in rivals if not only or rival.name in (*only, REFERENCE)]


def first_shards(shards: ShardSet, num_samples: int, num_shards: int) -> ShardSet:
    """The first of the shards that together have so many samples, and are so many that each of a loader's processes has one.

    All, where there are not so many.
    """
    count = 0
    while count < len(shards.tars) and (count < num_shards or sum(shards.lengths[:count]) < num_samples):
        count += 1
    return dataclasses.replace(
        shards,
        tars=shards.tars[:count],
        indices=shards.indices[:count],
        lengths=shards.lengths[:count],
        sizes=shards.sizes[:count],
    )


class Sample(NamedTuple):
    """An image in a tar, and its class number."""

    tar: str
    image: Component
    label: int


def read_samples(shards: ShardSet) -> list[Sample]:
    """All of them, in order.

    Raises:
        ValueError: One has no image, or no label that all loaders can read; names it.
    """
    samples = []
    for tar, index in zip(shards.tars, shards.indices, strict=True):
        with open(tar, "rb") as file:
            for sample in read_index(index):
                label = find_component(sample, ("cls",), tar)
                file.seek(label.offset)
                number = file.read(label.size).strip()
                if not number.isdigit():
                    place = f"{tar}:{label.offset}:{label.name}"
                    raise ValueError(
                        f"{place}: the label is {number[:40]!r}; other loaders need the numbers that `shards convert` writes"
                    )
                samples.append(Sample(tar, find_component(sample, IMAGE_EXTENSIONS, tar), int(number)))
    return samples


def extract(samples: Sequence[Sample], folder: Path) -> None:
    """Writes the images as files, and `folder`/list with a line `LABEL PATH` for each."""
    lines = list[str]()
    (folder / "images").mkdir()
    for tar, of_tar in itertools.groupby(samples, key=lambda sample: sample.tar):
        with open(tar, "rb") as file:
            for _, image, label in of_tar:
                path = folder / "images" / f"{len(lines):08d}.{image.extension}"
                file.seek(image.offset)
                path.write_bytes(file.read(image.size))
                lines.append(f"{label} {path}\n")
    (folder / "list").write_text("".join(lines))


class Ground:
    """Where the loaders run: what they read, and with which commands."""

    def __init__(
        self,
        shards: ShardSet,
        folder: Path,
        environment: Mapping[str, str],
        peers_python: str,
        batch_size: int,
        image_size: int,
        device: str,
        threads: int,
        images: int,
    ) -> None:
        self._folder, self._environment, self._peers_python = folder, environment, peers_python
        self._num_samples = shards.num_samples
        crop = RandomResizedCrop()
        self._task = Task(
            split="train",
            tars=tuple(os.path.abspath(tar) for tar in shards.tars),
            indices=tuple(os.path.abspath(index) for index in shards.indices),
            list=str(folder / "list"),
            folder="",
            batch_size=batch_size,
            image_size=image_size,
            resize_shorter=resize_shorter_for(image_size),
            scale=crop.scale,
            ratio=crop.ratio,
            mean=MEAN,
            std=STD,
            threads=threads,
            device=device,
            images=images,
        )
        (folder / "logs").mkdir()

    def turn(self, rival: Rival, split: str) -> Callable[[], Turn]:
        """What to call for a turn of the loader."""
        if rival is DECODER:
            return self._decode
        module = "tools.throughput.peer_loaders" if rival.needs else "tools.throughput.loaders"
        python = self._peers_python if rival.needs else sys.executable
        data, task = self._folder / rival.name, self._folder / f"{rival.name}-{split}.json"
        task.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(self._task, split=split, folder=str(data)))))

        def run() -> Turn:
            if rival.has_to_prepare and not data.exists():
                self._run(python, "-m", module, f"prepare-{rival.name}", str(task))
            ran = self._run(python, "-m", module, rival.name, str(task), str(time.monotonic()))
            said = ran.said
            return Turn(
                said["images"] / said["seconds"],
                said["first_seconds"],
                1000 * said["cpu_seconds"] / said["images"],
                ran.peak_memory_bytes,
            )

        return run

    def _decode(self) -> Turn:
        ran = self._run(sys.executable, "-m", "tools.bench.floors", "decode", str(self._folder / "list"))
        return Turn(self._num_samples / ran.said["seconds"])

    def _run(self, *command: str) -> Run:
        return run_measured(command, ROOT, self._folder / "logs", self._environment)


def _result(rival: Rival, split: str, outcomes: Mapping[str, Outcome[Turn]]) -> Result:
    outcome, reference = outcomes.get(f"{split} {rival.name}"), outcomes[f"{split} {REFERENCE}"]
    blank = Result(split, rival.name, rival.what, turns=outcome.turns if outcome else ())
    if outcome is None:
        return dataclasses.replace(blank, is_installed=False)
    if outcome.error is not None:
        return dataclasses.replace(blank, error=outcome.error)
    rates = [turn.images_per_second for turn in outcome.turns]
    firsts = [turn.first_seconds for turn in outcome.turns if turn.first_seconds is not None]
    costs = [turn.cpu_milliseconds for turn in outcome.turns if turn.cpu_milliseconds is not None]
    pairs = zip(rates, reference.turns, strict=False)  # the reference has fewer, where it failed
    return dataclasses.replace(
        blank,
        images_per_second=summarize(rates),
        ratio=None if reference.error else summarize([rate / other.images_per_second for rate, other in pairs]),
        first_seconds=summarize(firsts) if firsts else None,
        cpu_milliseconds=summarize(costs) if costs else None,
        peak_memory_bytes=max((turn.peak_memory_bytes or 0 for turn in outcome.turns), default=0) or None,
    )


def _line(result: Result) -> str:
    if result.images_per_second is None:
        return f"{result.what:<52}{f'failed: {result.error}' if result.is_installed else 'not installed'}"
    ratio, first, cost, memory = result.ratio, result.first_seconds, result.cpu_milliseconds, result.peak_memory_bytes
    cells = (
        f"{result.images_per_second.median:,.0f}",
        f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "-",
        f"{cost.median:.2f}" if cost else "-",
        f"{first.median:.1f} s" if first else "-",
        f"{memory / 1e6:,.0f}" if memory else "-",
    )
    widths = (10, 22, 9, 13, 11)
    return f"{result.what:<52}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
