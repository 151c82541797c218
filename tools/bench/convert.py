"""`python -m tools.bench.convert SRC` measures conversion to shards, its peers, and what no conversion can be faster than."""

import dataclasses
import itertools
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from pipelines.printable import counted
from tools.bench.command import check_json, run_measurement
from tools.bench.converters import DISTRIBUTIONS, PEER_MODULES, Competitor, choose, competitors
from tools.shards.parallel import require_positive
from tools.shards.sources.folders import require_folder
from tools.throughput.process import open_scratch, probe, run_measured
from tools.throughput.report import MEMORY, Column, Report, Row, Table
from tools.throughput.rounds import Outcome, Turn, summarize, take_turns

SPACE_FACTOR = 2.2  # LitData keeps its chunks twice for a while; tars of small images are larger than the images
SIZES = (MEMORY, Column("output_bytes", "written MB", ",.1f", scale=1e-6, largest=True))
COLUMNS = (
    Column("images_per_second", "images/s", interval=True),
    Column("ratio", "ratio", ".2f", interval=True),
    Column("images_per_second_without_start_up", "without start-up", interval=True),
    Column("ratio_without_start_up", "ratio", ".2f", interval=True),
    *SIZES,
)


def convert(
    src: tyro.conf.Positional[Path],
    /,
    *,
    rounds: int = 5,
    images: int | None = None,
    scratch: Path | None = None,
    resize: int = 256,
    quality: int = 90,
    only: tuple[str, ...] = (),
    peers_python: str = sys.executable,
    json: Path | None = None,
) -> int:
    """Measure the conversion of images to shards.

    Three groups: `copied` writes the images as they are, relative to tar; `checked` decodes them first, relative to the decoder
    alone; `resized` writes smaller JPEGs, relative to decoding, resizing and encoding alone. Each competitor is a process that
    reads from the page cache and writes to a new folder. Peers that are not installed are listed and left out.

    Args:
        src: Folder with a folder per class.
        rounds: Turns of each competitor.
        images: Number of images, repeated if SRC has fewer; by default all of SRC.
        scratch: Folder for the output, left empty; by default the system's folder for temporary files.
        resize: Shorter side of the group `resized`, in pixels.
        quality: JPEG quality of the group `resized`, 1 to 100.
        only: Names of competitors or groups. An unknown name prints the list.
        peers_python: Interpreter of an environment with the peers (litdata, mosaicml-streaming, img2dataset, opencv).
        json: File for all figures.
    """
    settings = {**locals(), "source": src}
    _check(settings)
    everybody = competitors(peers_python, resize, quality)
    chosen = choose(everybody, only)
    modules, peers_versions = probe(peers_python, tuple(PEER_MODULES), DISTRIBUTIONS)
    files = _class_folder_files(src)
    wanted = images or len(files)
    names = [files[i * len(files) // wanted] for i in range(wanted)] if wanted < len(files) else files
    sizes = [(src / name).stat().st_size for name in names]
    image_bytes = sum(sizes) * (wanted // len(sizes)) + sum(sizes[: wanted % len(sizes)])
    is_copied = wanted != len(files)
    with open_scratch(scratch, int(image_bytes * (SPACE_FACTOR + is_copied))) as (folder, environment):
        source = folder / "source" if is_copied else src.absolute()
        names = _copy(src, names, wanted, source) if is_copied else names
        places = _write_lists(source, names, folder)
        installed = [each for each in chosen if each.needs is None or each.needs in modules]
        turns = {each.name: _turn(each, places, names, folder / "logs", environment) for each in installed}
        outcomes = take_turns(turns, rounds)
    baselines = {each.group: outcomes.get(each.name) for each in reversed(everybody)}
    tables = {each.group: Table(each.group, COLUMNS, []) for each in chosen}
    for each in chosen:
        tables[each.group].rows.append(_row(each, outcomes.get(each.name), baselines[each.group], wanted))
    Report(
        heading=f"{counted(wanted, 'image')}, {image_bytes / 1e6:,.1f} MB, {counted(rounds, 'round')}; median (interval)",
        tables=[*tables.values()],
        settings={**settings, "images": wanted, "image_bytes": image_bytes, "peers_versions": peers_versions},
        versions=probe(sys.executable, (), DISTRIBUTIONS)[1],
    ).publish(json)
    return int(any(outcome.error for outcome in outcomes.values()))


def _check(settings: Mapping[str, Any]) -> None:
    for option in ("rounds", "images", "resize", "quality"):
        require_positive(option, settings[option])
    if settings["quality"] > 100:
        raise ValueError(f"--quality {settings['quality']}: 1 to 100 is the range")
    check_json(settings["json"])
    require_folder(settings["src"])


def _class_folder_files(source: Path) -> list[str]:
    """Returns the paths of the images below the source, sorted; without names that begin with a dot, as `shards convert`."""
    found = (path.relative_to(source) for path in source.glob("*/**/*") if path.is_file())
    files = sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))
    if not files:
        raise ValueError(f"{source}: no images in class folders; SRC/CLASS/IMAGE is the layout needed")
    return files


def _copy(source: Path, names: Sequence[str], count: int, destination: Path) -> list[str]:
    """Copies files over and over, under other names, which it returns."""
    copies = []
    for number, name in zip(range(count), itertools.cycle(names), strict=False):
        copy = Path(name).with_stem(f"{Path(name).stem}_{number}")
        (destination / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, destination / copy)
        copies.append(str(copy))
    return sorted(copies)


def _write_lists(source: Path, files: Sequence[str], folder: Path) -> dict[str, Path]:
    """Writes the lists of the images, in the random order of shards; returns the values of the commands' placeholders."""
    labels = {name: number for number, name in enumerate(sorted({Path(file).parts[0] for file in files}))}
    shuffled = random.Random(0).sample(files, len(files))
    lists = {"files": shuffled, "paths": [f"{labels[Path(file).parts[0]]} {source / file}" for file in shuffled]}
    for name, lines in lists.items():
        text = "".join(f"{line}\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    return {"source": source, "files": folder / "files", "paths": folder / "paths", "destination": folder / "out"}


def _turn(
    competitor: Competitor, places: Mapping[str, Path], names: Sequence[str], logs: Path, environment: Mapping[str, str]
) -> Callable[[], Turn]:
    """Returns a function that runs the command. A bound writes nothing, and only the seconds that it measures itself count."""
    command = [argument.format(**places) for argument in competitor.command]

    def run() -> Turn:
        for name in names:
            (places["source"] / name).read_bytes()  # so that nobody waits for the disk
        places["destination"].mkdir()
        os.sync()
        try:
            seconds, said, peak_memory_bytes = run_measured(command, logs, environment)
            written = sum(file.stat().st_size for file in places["destination"].rglob("*") if file.is_file())
        finally:
            shutil.rmtree(places["destination"])
        own: Turn = {"seconds_without_start_up": said.get("seconds")}
        if competitor.is_bound:
            return own
        return {**own, "seconds": seconds, "peak_memory_bytes": peak_memory_bytes, "output_bytes": written}

    return run


def _row(competitor: Competitor, outcome: Outcome | None, baseline: Outcome | None, images: int) -> Row:
    labels: dict[str, Any] = {name: getattr(competitor, name) for name in ("name", "group", "command")}
    row = Row.of(competitor.what, outcome, SIZES, **labels, turns=outcome.turns if outcome else ())
    if outcome is None or outcome.error:
        return row
    figures, against = dict(row.figures), list[float]()
    if baseline and not baseline.error:
        against = baseline.rounds("seconds_without_start_up") or baseline.rounds("seconds")
    for suffix in ("", "_without_start_up"):
        if seconds := outcome.rounds(f"seconds{suffix}"):
            figures[f"images_per_second{suffix}"] = summarize([images / each for each in seconds])
            if against:
                figures[f"ratio{suffix}"] = summarize([other / each for other, each in zip(against, seconds, strict=True)])
    return dataclasses.replace(row, figures=figures)


def main(arguments: Sequence[str] | None = None) -> None:
    run_measurement(convert, "convert", arguments)


if __name__ == "__main__":
    main()
