"""`throughput convert`: conversion to shards against its peers and against what it cannot be faster than."""

import dataclasses
import os
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench.converters import (
    DISTRIBUTIONS,
    PEER_MODULES,
    ROOT,
    Competitor,
    choose,
    competitors,
    probe,
)
from tools.throughput.process import run_measured
from tools.throughput.report import Bar, Report
from tools.throughput.rounds import Outcome, Statistic, summarize, take_turns
from tools.throughput.scratch import open_scratch

SPACE_FACTOR = 2.2  # LitData has its chunks twice for a while; tars of small images are larger than the images


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    source: str
    rounds: int
    images: int
    resize: int
    quality: int
    only: tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    """A competitor's run in a round; `output_bytes` is what lay in its folder afterwards."""

    seconds: float
    seconds_without_start_up: float | None
    peak_memory_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Result:
    """A competitor's turns, and what follows from them.

    Attributes:
        name: Of the competitor.
        group: Whose first competitor is the reference of the ratios.
        what: What was run, for people.
        command: The same for machines.
        error: Why there are no figures: not installed, or what it printed last.
        turns: One a round.
        images_per_second: Of the whole process; None for a floor.
        ratio: The same as a part of the reference's in the same round.
        images_per_second_without_start_up: By the seconds that a program measures itself; None where it does not.
        ratio_without_start_up: The same as a part of the reference's, whose whole process counts if it has no own measure.
        peak_memory_bytes: The largest of the rounds; None for a floor, which holds all images.
        output_bytes: The median of the rounds; None for a floor.
    """

    name: str
    group: str
    what: str
    command: tuple[str, ...]
    installed: bool = True
    error: str | None = None
    turns: tuple[Turn, ...] = ()
    images_per_second: Statistic | None = None
    ratio: Statistic | None = None
    images_per_second_without_start_up: Statistic | None = None
    ratio_without_start_up: Statistic | None = None
    peak_memory_bytes: int | None = None
    output_bytes: int | None = None


@dataclass(frozen=True)
class ConvertReport(Report):
    """Everything that a run found out.

    Attributes:
        image_bytes: Of all images.
        interval: How the `low` and `high` of the figures are to be read.
        peers_versions: Of the packages of the interpreter that runs the peers.
    """

    settings: Settings
    peers_versions: dict[str, str]
    image_bytes: int
    interval: str
    results: tuple[Result, ...]

    def bars(self) -> Iterable[Bar]:
        return [Bar(r.group, r.what, r.images_per_second) for r in self.results if r.images_per_second]

    def __str__(self) -> str:
        settings, hardware = self.settings, self.hardware
        lines = [
            f"{settings.images:,} images, {self.image_bytes / 1e6:,.1f} MB, {settings.rounds} rounds; {hardware.cpu}, "
            f"{hardware.cores} cores, {hardware.memory_bytes / 2**30:.0f} GiB; median (smallest-largest)"
        ]
        for group in dict.fromkeys(result.group for result in self.results):
            rows = [_row(result) for result in self.results if result.group == group]
            lines += ["", *_align([(group, *HEADER), *rows])]
        return "\n".join(lines)


HEADER = ("images/s", "ratio", "without start-up", "ratio", "memory MB", "written MB")


def benchmark(
    source: Path,
    *,
    rounds: int,
    images: int | None,
    scratch: Path,
    resize: int,
    quality: int,
    only: Sequence[str],
    peers_python: str,
) -> ConvertReport:
    """Lets all competitors convert the same images, in turns.

    Each runs as a process of its own that reads files from the page cache and writes to a folder that is new; the folder is
    removed, and the disk brought up to date, outside of the time.

    Args:
        source: Folder of class folders.
        rounds: Turns of each competitor.
        images: So many of the source's images, repeated where there are fewer; None for those that there are.
        scratch: Folder to write in; left as it was.
        resize: Shorter side in pixels for the competitors that resize.
        quality: Of their JPEGs.
        only: Names of competitors or groups; all where empty.
        peers_python: The interpreter that has the peers installed.

    Raises:
        ValueError: The arguments cannot be used as they are; says what to change.
        OSError: The disk is full.
    """
    for option, number in (("--rounds", rounds), ("--images", images), ("--resize", resize), ("--quality", quality)):
        if number is not None and number < 1:
            raise ValueError(f"{option} {number}: at least 1 is needed")
    everybody = competitors(peers_python, resize, quality)
    chosen = choose(everybody, only)
    modules, peers_versions = probe(peers_python, PEER_MODULES, DISTRIBUTIONS)
    files = _class_folder_files(source)
    picked = [files[i * len(files) // images] for i in range(images)] if images and images < len(files) else files
    wanted = images or len(files)
    sizes = [(source / file).stat().st_size for file in picked]
    image_bytes = sum(sizes) * (wanted // len(sizes)) + sum(sizes[: wanted % len(sizes)])
    needed_bytes = int(image_bytes * (SPACE_FACTOR + (wanted != len(files))))
    installed = [one for one in chosen if one.needs is None or one.needs in modules]
    root = source
    with open_scratch(scratch, needed_bytes) as (folder, environment):
        if wanted != len(files):
            root, picked = _copy(source, picked, wanted, folder / "source")
        track = Track(root.resolve(), picked, folder, environment)
        outcomes = take_turns({one.name: track.turn(one) for one in installed}, rounds)
    return ConvertReport(
        settings=Settings(str(source), rounds, wanted, resize, quality, tuple(only)),
        versions=probe(sys.executable, PEER_MODULES, DISTRIBUTIONS)[1],
        peers_versions=peers_versions,
        image_bytes=image_bytes,
        interval="of the median, between order statistics; `coverage` is its probability",
        results=tuple(_results(chosen, outcomes, {one.group: one.name for one in reversed(everybody)}, wanted)),
    )


def _class_folder_files(source: Path) -> list[str]:
    """Paths of the images below the source, sorted; names that begin with a dot are passed over, as `shards convert` does."""
    found = (path.relative_to(source) for path in source.glob("*/**/*") if path.is_file())
    files = sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))
    if not files:
        raise ValueError(f"{source}: no images in class folders; SRC/CLASS/IMAGE is the layout needed")
    return files


def _copy(source: Path, files: Sequence[str], count: int, destination: Path) -> tuple[Path, list[str]]:
    """A folder of `count` images, those of the source again and again under other names."""
    copies = []
    for number in range(count):
        original = Path(files[number % len(files)])
        copy = original if number < len(files) else original.with_stem(f"{original.stem}_{number // len(files)}")
        (destination / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / original, destination / copy)
        copies.append(str(copy))
    return destination, sorted(copies)


class Track:
    """Where the competitors run: the images, lists of them, and a folder for what is written.

    Args:
        source: Absolute path of the folder of class folders.
        files: Paths in it.
        folder: For everything else.
        environment: Of the competitors.
    """

    def __init__(self, source: Path, files: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._files = [source / file for file in files]
        self._destination, self._logs = folder / "out", folder / "logs"
        self._logs.mkdir()
        self._environment = environment
        self._places = {"source": source, "files": folder / "files", "paths": folder / "paths", "destination": folder / "out"}
        labels = {name: number for number, name in enumerate(sorted({Path(file).parts[0] for file in files}))}
        shuffled = random.Random(0).sample(files, len(files))  # shards hold images in such an order, whoever writes them
        _write_lines(folder / "files", shuffled)
        _write_lines(folder / "paths", [f"{labels[Path(file).parts[0]]} {source / file}" for file in shuffled])

    def turn(self, competitor: Competitor) -> Callable[[], Turn]:
        """What to call for a run of the competitor."""
        command = [argument.format(**self._places) for argument in competitor.command]

        def run() -> Turn:
            for file in self._files:
                file.read_bytes()  # so that nobody waits for the disk
            self._destination.mkdir()
            os.sync()
            try:
                ran = run_measured(command, ROOT, self._logs, self._environment)
                written = sum(file.stat().st_size for file in self._destination.rglob("*") if file.is_file())
            finally:
                shutil.rmtree(self._destination)
            return Turn(ran.seconds, ran.said.get("seconds"), ran.peak_memory_bytes, written)

        return run


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")


def _results(
    chosen: Sequence[Competitor], outcomes: Mapping[str, Outcome[Turn]], references: Mapping[str, str], images: int
) -> Iterator[Result]:
    """A result for each competitor; `references` has the name of each group's reference."""
    for one in chosen:
        blank = Result(one.name, one.group, one.what, one.command)
        outcome = outcomes.get(one.name)
        if outcome is None:
            yield dataclasses.replace(blank, installed=False)
        elif outcome.error is not None:
            yield dataclasses.replace(blank, error=outcome.error, turns=outcome.turns)
        else:
            reference = outcomes.get(references[one.group])
            rivals = reference.turns if reference and not reference.error else None
            yield _with_figures(dataclasses.replace(blank, turns=outcome.turns), one.floor, rivals, images)


def _with_figures(result: Result, floor: bool, reference: Sequence[Turn] | None, images: int) -> Result:
    whole = None if floor else [turn.seconds for turn in result.turns]
    own = [turn.seconds_without_start_up for turn in result.turns if turn.seconds_without_start_up is not None]
    against = [turn.seconds_without_start_up or turn.seconds for turn in reference] if reference else None
    return dataclasses.replace(
        result,
        images_per_second=_rates([images] * len(result.turns), whole),
        ratio=_rates(against, whole),
        images_per_second_without_start_up=_rates([images] * len(result.turns), own),
        ratio_without_start_up=_rates(against, own),
        peak_memory_bytes=None if floor else max(turn.peak_memory_bytes for turn in result.turns),
        output_bytes=None if floor else int(statistics.median(turn.output_bytes for turn in result.turns)),
    )


def _rates(dividends: Sequence[float] | None, seconds: Sequence[float] | None) -> Statistic | None:
    if not dividends or not seconds:
        return None
    return summarize([dividend / second for dividend, second in zip(dividends, seconds, strict=True)])


def _row(result: Result) -> tuple[str, ...]:
    if not result.installed:
        return (result.what, "not installed")
    if result.error is not None:
        return (result.what, f"failed: {result.error}")
    return (
        result.what,
        _cell(result.images_per_second, ",.0f"),
        _cell(result.ratio, ".2f"),
        _cell(result.images_per_second_without_start_up, ",.0f"),
        _cell(result.ratio_without_start_up, ".2f"),
        *("-" if size is None else f"{size / 1e6:,.1f}" for size in (result.peak_memory_bytes, result.output_bytes)),
    )


def _cell(statistic: Statistic | None, form: str) -> str:
    if statistic is None:
        return "-"
    smallest, largest = min(statistic.rounds), max(statistic.rounds)
    return f"{statistic.median:{form}} ({smallest:{form}}-{largest:{form}})"


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns below each other, the first to the left; a row of two cells is a name and a remark of any length."""
    full = [row for row in rows if len(row) > 2]
    widths = [max(len(row[0]) for row in rows), *(max(map(len, column)) for column in list(zip(*full, strict=True))[1:])]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 or len(row) == 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]
