"""`shards info`: shows the contents of a data set, its balance, and the bytes that training reads."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.printable import counted, printable
from pipelines.shards.find_tars import find_splits, read_info
from pipelines.shards.index import count_samples, ensure_index, read_index
from pipelines.shards.labels import LabelReader, no_class_zero, open_labels
from pipelines.shards.members import image_extensions, read_member, require_members
from pipelines.shards.shard_set import read_label
from tools.shards.check import ImageCheck
from tools.shards.parallel import Result, Task, choose_workers, require_positive, run

SAMPLE_SIZE = 20_000
# For data sets below this size, one process finishes before others have started.
BYTES_FOR_ONE_PROCESS = 1e9
SIDES = (64, 128, 256, 512, 1024)
SIDE_NAMES = ("<64", *(f"{low}-{high - 1}" for low, high in itertools.pairwise(SIDES)), f">={SIDES[-1]}")
BAR_LENGTH = 40
NAMED_CLASSES = 20  # with more classes, the counts per class are not listed
TEXT_INDENT = 16
RATES = (1_000, 10_000)  # images/s


@dataclass(frozen=True)
class SplitInfo:
    """A split. The fields are the JSON keys of `shards info`, which docs/shards.md describes."""

    num_shards: int
    num_samples: int
    shard_samples: tuple[int, int]
    shard_bytes: int
    image_bytes: int
    label_bytes: int
    class_names: list[str] | None
    class_counts: list[int]
    num_headers: int
    unreadable: dict[str, int]
    formats: dict[str, int]
    shorter_sides: dict[str, int]
    median_width: float
    median_height: float
    conversion: dict[str, Any] | None


@dataclass(frozen=True)
class _Shard:
    """A shard to read. `headers` has the numbers of the samples whose images are read."""

    split: str
    label_reader: LabelReader
    images: tuple[str, ...]
    tar: Path
    index: Path
    headers: frozenset[int]


@dataclass
class _ShardResult:
    shard: _Shard
    num_samples: int
    image_bytes: int = 0
    label_bytes: int = 0
    labels: collections.Counter[int] = field(default_factory=collections.Counter)
    unreadable: collections.Counter[str] = field(default_factory=collections.Counter)
    formats: collections.Counter[str] = field(default_factory=collections.Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width, height


def collect(
    pattern: str,
    *,
    index_dir: str = "",
    label_key: str = "",
    class_file: str = "",
    image_key: str = "",
    sample: int = SAMPLE_SIZE,
    num_workers: int | None = None,
) -> dict[str, SplitInfo]:
    """Returns the contents of the splits of a data set. Shards without an `_info.json` are one split.

    The arguments are the options of `shards info`.

    Raises:
        ValueError: Nothing matches, or a shard, an index or a label is damaged, or an argument is out of range.
    """
    require_positive("sample", sample)
    if index_dir and not os.path.isdir(index_dir):
        raise ValueError(f"--index-dir {index_dir}: no such folder; `shards index` creates it")
    splits = {name: list(dict.fromkeys(found)) for name, found in find_splits(pattern).items()}
    tars = [tar for split_tars in splits.values() for tar in split_tars]
    small = sum(tar.stat().st_size for tar in tars) < BYTES_FOR_ONE_PROCESS
    num_workers = min(choose_workers(num_workers, 1 if small else None), len(tars))
    indices = dict(_each(functools.partial(_find_index, index_dir=index_dir), tars, num_workers, "indices"))
    label_reader = open_labels(label_key, class_file, read_info(tars[0].parent).get("classes"))
    shards = list(_assign_headers(splits, label_reader, image_extensions(image_key), indices, sample))
    results = collections.defaultdict(list)
    for result in _each(_read_shard, shards, num_workers, "shards"):
        results[result.shard.split].append(result)
    return {name: _split_info(name, results[name]) for name in splits}


def _each(function: Callable[[Task], Result], tasks: Sequence[Task], num_workers: int, what: str) -> list[Result]:
    # Without `closing`, the workers would finish their tasks before an interruption ends the command.
    with contextlib.closing(run(function, tasks, num_workers)) as results:
        return list(tqdm(results, what, len(tasks), leave=False, unit="shard", disable=None))


def _find_index(tar: Path, index_dir: str) -> tuple[Path, Path]:
    return tar, ensure_index(tar, index_dir)


def _assign_headers(
    splits: dict[str, list[Path]],
    label_reader: LabelReader,
    images: tuple[str, ...],
    indices: dict[Path, Path],
    sample: int,
) -> Iterator[_Shard]:
    """Yields the shards with the samples whose headers are read, evenly spaced over all shards together."""
    counts = {tar: count_samples(index) for tar, index in indices.items()}
    total = sum(counts[tar] for tars in splits.values() for tar in tars)
    sample = min(sample, total)
    first = 0
    for name, tars in splits.items():
        for tar in tars:
            numbers = range(first, first + counts[tar])
            chosen = (i - first for i in numbers if i * sample // total < (i + 1) * sample // total)
            yield _Shard(name, label_reader, images, tar, indices[tar], frozenset(chosen))
            first += counts[tar]


def _read_shard(shard: _Shard) -> _ShardResult:
    samples = read_index(shard.index)
    result = _ShardResult(shard, len(samples))
    check = ImageCheck("structure")
    with open(shard.tar, "rb") as file:
        for number, sample in enumerate(samples):
            image, label = require_members(shard.tar, sample, shard.images, shard.label_reader.extension, samples)
            result.labels[read_label(file, sample, shard.tar, shard.label_reader)] += 1
            result.image_bytes += image.size
            result.label_bytes += label.size
            if number in shard.headers:
                [verdict] = check([read_member(file, image, shard.tar)])
                if verdict.extension is None:
                    result.unreadable[verdict.reason] += 1
                else:
                    result.formats[verdict.extension] += 1
                    result.sizes.append((verdict.width, verdict.height))
    return result


def _split_info(name: str, results: list[_ShardResult]) -> SplitInfo:
    info = read_info(results[0].shard.tar.parent)
    class_names = results[0].shard.label_reader.classes
    labels = _total(result.labels for result in results)
    # Show labels beyond the listed classes. `verify` reports them as errors.
    num_classes = max([len(class_names or ()), *(label + 1 for label in labels)])
    sizes = [size for result in results for size in result.sizes]
    widths, heights = zip(*sizes or [(0, 0)], strict=True)
    sides = collections.Counter(SIDE_NAMES[sum(min(size) >= side for side in SIDES)] for size in sizes)
    lengths = [result.num_samples for result in results]
    return SplitInfo(
        num_shards=len(results),
        num_samples=sum(lengths),
        shard_samples=(min(lengths), max(lengths)),
        shard_bytes=sum(result.shard.tar.stat().st_size for result in results),
        image_bytes=sum(result.image_bytes for result in results),
        label_bytes=sum(result.label_bytes for result in results),
        class_names=list(class_names) if class_names else None,
        class_counts=[labels[label] for label in range(num_classes)],
        num_headers=sum(len(result.shard.headers) for result in results),
        unreadable=dict(_total(result.unreadable for result in results).most_common()),
        formats=dict(_total(result.formats for result in results).most_common()),
        shorter_sides={side: sides[side] for side in SIDE_NAMES},
        median_width=statistics.median(widths),
        median_height=statistics.median(heights),
        conversion=info.get("splits", {}).get(name, {}).get("conversion"),
    )


def _total(counters: Iterator[collections.Counter[Result]]) -> collections.Counter[Result]:
    return sum(counters, collections.Counter())


def as_json(splits: dict[str, SplitInfo]) -> str:
    """Returns one JSON object: `{"splits": {NAME: {the attributes of SplitInfo}}}`."""
    return json.dumps({"splits": {name: dataclasses.asdict(split) for name, split in splits.items()}}, indent=1)


def as_text(splits: dict[str, SplitInfo]) -> str:
    """Returns a table of the splits, and a paragraph for each."""
    rows = [("split", "shards", "samples", "classes", "MB")]
    for name, split in splits.items():
        counts = f"{split.num_shards:,}", f"{split.num_samples:,}", f"{len(split.class_counts):,}"
        rows.append((printable(name), *counts, f"{split.shard_bytes / 1e6:,.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([*lines, *(line for name, split in splits.items() for line in ["", printable(name), *_paragraph(split)])])


def _paragraph(split: SplitInfo) -> Iterator[str]:
    yield from _entry("classes", _class_balance(split))
    low, high = split.shard_samples
    yield from _entry("shards", [f"{counted(low, 'sample')} each" if low == high else f"{low:,} to {counted(high, 'sample')}"])
    if split.num_samples:
        yield from _entry("images", _image_facts(split))
        yield from _entry("shorter side", _histogram(split.shorter_sides))
        yield from _entry("an epoch reads", _reading(split))
    if split.conversion:
        yield from _entry("converted with", [", ".join(_settings(split.conversion))])


def _settings(conversion: dict[str, Any]) -> Iterator[str]:
    """Yields the settings of a conversion, and the size of its source."""
    for name, value in conversion.items():
        if name == "source":
            yield f"{counted(value['images'], 'image')} in the source" if value and "images" in value else "an unknown source"
        elif value is not None:
            yield printable(f"{name.replace('_', ' ')} {value}")


def _entry(heading: str, texts: Iterable[str]) -> list[str]:
    indent = " " * (TEXT_INDENT + 2)
    lines = [line for text in texts for line in textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)]
    return [f"  {heading:<{TEXT_INDENT}}{lines[0]}", *(indent + line for line in lines[1:])]


def _class_balance(split: SplitInfo) -> Iterator[str]:
    counts = {label: count for label, count in enumerate(split.class_counts) if count}
    num_classes = len(split.class_counts)
    if not counts:
        yield f"{num_classes:,}: all are empty"
        return

    def named(label: int) -> str:
        names = split.class_names or ()
        name = printable(names[label]) if label < len(names) else f"class {label}"
        return f"{name} {split.class_counts[label]:,}"

    smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    extent = f"{split.num_samples / num_classes:,.1f} samples on average, smallest {named(smallest)}, largest {named(largest)}"
    if counts[smallest] == counts[largest]:
        extent = f"{counted(counts[smallest], 'sample')} each"
    num_empty = num_classes - len(counts)
    empty = f"{num_empty:,} classes are empty" if num_empty > 1 else f"{'one' if num_empty else 'no'} class is empty"
    yield f"{num_classes:,}: {extent}; {empty}"
    if note := no_class_zero(counts.keys()):
        yield f"warning: {note}"
    if num_classes <= NAMED_CLASSES:
        yield ", ".join(map(named, range(num_classes)))


def _image_facts(split: SplitInfo) -> Iterator[str]:
    if split.num_headers < split.num_samples:
        yield f"in an evenly spaced sample of {split.num_headers:,} of {split.num_samples:,} images:"
    shown = ", ".join(f"{name} {count:,}" for name, count in split.formats.items()) or "none that could be read"
    yield f"{shown}; median {split.median_width:g} x {split.median_height:g} pixels"
    if split.unreadable:
        reasons = "; ".join(f"{count:,} {printable(reason)}" for reason, count in split.unreadable.items())
        yield f"training cannot decode {sum(split.unreadable.values()):,} ({reasons}); `shards verify` lists them"


def _histogram(counts: dict[str, int]) -> Iterator[str]:
    name_width, count_width = max(map(len, counts)), max(len(f"{count:,}") for count in counts.values())
    for name, count in counts.items():
        bar = "#" * -(-BAR_LENGTH * count // max(1, *counts.values()))
        yield f"{name:<{name_width}}  {count:>{count_width},}  {bar}".rstrip()


def _reading(split: SplitInfo) -> Iterator[str]:
    num_bytes, image_kilobytes = split.image_bytes + split.label_bytes, split.image_bytes / split.num_samples / 1e3
    yield f"{num_bytes / 1e6:,.1f} MB of images and labels; {image_kilobytes:,.1f} kB per image on average"
    yield ", ".join(f"{num_bytes / split.num_samples * rate / 1e6:,.1f} MB/s at {rate:,} images/s" for rate in RATES)
