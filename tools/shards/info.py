"""`shards info`: what a data set holds, how even it is, and what reading it will ask of the storage."""

import collections
import dataclasses
import functools
import itertools
import json
import os
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from pipelines.shards.index import count_samples, ensure_index, read_index
from pipelines.shards.labels import LabelReader, open_labels
from pipelines.shards.shard_set import IMAGE_EXTENSIONS, find_component, find_splits, read_info, read_label
from tools.shards.check import ImageCheck
from tools.shards.parallel import num_cpus, run

SAMPLE_SIZE = 20_000
# Up to so many bytes of tars one process is done before others have started.
BYTES_FOR_ONE_PROCESS = 1e9
SIDES = (64, 128, 256, 512, 1024)
SIDE_NAMES = ("<64", *(f"{low}-{high - 1}" for low, high in itertools.pairwise(SIDES)), f">={SIDES[-1]}")
BAR_LENGTH = 40
NAMED_CLASSES = 20  # up to so many each class gets its count
TEXT_INDENT = 16
RATES = (1_000, 10_000)  # images/s

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class SplitInfo:
    """A split, as `shards info --json` gives it: the attributes are the keys.

    Attributes:
        num_shards: Tars.
        num_samples: Over all shards.
        shard_samples: Samples of the smallest and of the largest shard.
        shard_bytes: Size of the tars.
        image_bytes: Size of the encoded images of all samples, which an epoch of training reads.
        label_bytes: The same of the labels.
        class_names: By class number; None where neither a class file nor an `_info.json` lists them.
        class_counts: Samples of each class, by class number.
        num_headers: Images of which the header was read: all, or an evenly spaced sample.
        unreadable: Among these, what training could not decode: images by reason.
        formats: Among these, images by format.
        shorter_sides: Among these, images by their shorter side in pixels.
        median_width: In pixels, of these; 0 where none could be read.
        median_height: The same.
        conversion: Options of the conversion, where `_info.json` has them.
    """

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
    """What is asked of a worker; `headers` are the numbers of the samples whose images it looks at."""

    split: str
    label_reader: LabelReader
    tar: Path
    index: Path
    headers: frozenset[int]


@dataclass(frozen=True)
class _ShardResult:
    shard: _Shard
    num_samples: int
    image_bytes: int
    label_bytes: int
    labels: collections.Counter[int]
    unreadable: collections.Counter[str]
    formats: collections.Counter[str]
    sizes: list[tuple[int, int]]  # width, height


def collect(
    pattern: str,
    *,
    index_dir: str = "",
    label_key: str = "",
    class_file: str = "",
    sample: int = SAMPLE_SIZE,
    num_workers: int | None = None,
) -> dict[str, SplitInfo]:
    """What the splits of a data set hold.

    Args:
        pattern: A folder, a glob, a brace pattern or a tar; shards without an `_info.json` are one split.
        index_dir: Folder whose index files are taken before those beside the tars.
        label_key: See `open_labels`.
        class_file: The same.
        sample: Images whose headers are read, evenly spaced over the data set; all where there are no more.
        num_workers: Processes; by default one for a small data set and one a CPU otherwise.

    Raises:
        ValueError: Nothing matches; or a shard, an index or a label is damaged; or an argument is out of range.
    """
    for option, value in (("sample", sample), ("workers", num_workers)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} {value}: at least 1 is needed")
    if index_dir and not os.path.isdir(index_dir):
        raise ValueError(f"--index-dir {index_dir}: no such folder")
    splits = find_splits(pattern)
    tars = [tar for split_tars in splits.values() for tar in split_tars]
    if num_workers is None:
        small = sum(tar.stat().st_size for tar in tars) < BYTES_FOR_ONE_PROCESS
        num_workers = 1 if small else min(num_cpus(), len(tars))
    indices = dict(_each(functools.partial(_find_index, index_dir=index_dir), tars, num_workers, "indices"))
    label_reader = open_labels(label_key, class_file, read_info(tars[0].parent).get("classes"))
    shards = list(_assign_headers(splits, label_reader, indices, sample))
    results = collections.defaultdict(list)
    for result in _each(_read_shard, shards, num_workers, "shards"):
        results[result.shard.split].append(result)
    return {name: _split_info(name, results[name]) for name in splits}


def _each(function: Callable[[Task], Result], tasks: Sequence[Task], num_workers: int, what: str) -> Iterator[Result]:
    yield from tqdm(run(function, tasks, num_workers), what, len(tasks), leave=False, unit="shard", disable=None)


def _find_index(tar: Path, index_dir: str) -> tuple[Path, Path]:
    return tar, ensure_index(tar, index_dir)


def _assign_headers(
    splits: dict[str, list[Path]], label_reader: LabelReader, indices: dict[Path, Path], sample: int
) -> Iterator[_Shard]:
    """The shards, with `sample` samples chosen at equal distances over all of them together."""
    counts = {tar: count_samples(index) for tar, index in indices.items()}
    total = sum(counts[tar] for tars in splits.values() for tar in tars)
    sample = min(sample, total)
    first = 0
    for name, tars in splits.items():
        for tar in tars:
            numbers = range(first, first + counts[tar])
            chosen = (i - first for i in numbers if i * sample // total < (i + 1) * sample // total)
            yield _Shard(name, label_reader, tar, indices[tar], frozenset(chosen))
            first += counts[tar]


def _read_shard(shard: _Shard) -> _ShardResult:
    samples = read_index(shard.index)
    image_bytes = label_bytes = 0
    labels: collections.Counter[int] = collections.Counter()
    unreadable: collections.Counter[str] = collections.Counter()
    formats: collections.Counter[str] = collections.Counter()
    sizes = []
    check = ImageCheck("structure")
    with open(shard.tar, "rb") as file:
        for number, sample in enumerate(samples):
            image = find_component(sample, IMAGE_EXTENSIONS, shard.tar)
            labels[read_label(file, sample, shard.tar, shard.label_reader)] += 1
            image_bytes += image.size
            label_bytes += find_component(sample, (shard.label_reader.extension,), shard.tar).size
            if number in shard.headers:
                file.seek(image.offset)
                [verdict] = check([file.read(image.size)])
                if verdict.extension is None:
                    unreadable[verdict.reason] += 1
                else:
                    formats[verdict.extension] += 1
                    sizes.append((verdict.width, verdict.height))
    return _ShardResult(shard, len(samples), image_bytes, label_bytes, labels, unreadable, formats, sizes)


def _split_info(name: str, results: list[_ShardResult]) -> SplitInfo:
    info = read_info(results[0].shard.tar.parent)
    class_names = results[0].shard.label_reader.classes
    labels = _total(result.labels for result in results)
    # A label beyond the listed classes is shown, not hidden; that it is an error is for `verify` to say.
    num_classes = max([len(class_names or ()), *(label + 1 for label in labels)])
    widths, heights = zip(*[size for result in results for size in result.sizes] or [(0, 0)], strict=True)
    sides = collections.Counter(_side_name(min(size)) for result in results for size in result.sizes)
    return SplitInfo(
        num_shards=len(results),
        num_samples=sum(result.num_samples for result in results),
        shard_samples=(min(result.num_samples for result in results), max(result.num_samples for result in results)),
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


def _side_name(pixels: int) -> str:
    return SIDE_NAMES[sum(pixels >= side for side in SIDES)]


def as_json(splits: dict[str, SplitInfo]) -> str:
    """One JSON object: `{"splits": {NAME: {the attributes of SplitInfo}}}`."""
    return json.dumps({"splits": {name: dataclasses.asdict(split) for name, split in splits.items()}}, indent=1)


def as_text(splits: dict[str, SplitInfo]) -> str:
    """A table of the splits, then a paragraph for each."""
    rows = [("split", "shards", "samples", "classes", "MB")]
    for name, split in splits.items():
        counts = f"{split.num_shards:,}", f"{split.num_samples:,}", f"{len(split.class_counts):,}"
        rows.append((name, *counts, f"{split.shard_bytes / 1e6:,.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([*lines, *(line for name, split in splits.items() for line in ["", name, *_paragraph(split)])])


def _paragraph(split: SplitInfo) -> list[str]:
    lines = _entry("classes", *_class_balance(split))
    low, high = split.shard_samples
    lines += _entry("shards", f"{low:,} samples each" if low == high else f"{low:,} to {high:,} samples")
    if split.num_samples:
        lines += _entry("images", *_image_facts(split))
        lines += _entry("shorter side", *_histogram(split.shorter_sides))
        lines += _entry("an epoch reads", *_reading(split))
    if split.conversion:
        lines += _entry(
            "converted with", ", ".join(f"{option} {value}" for option, value in split.conversion.items() if value is not None)
        )
    return lines


def _entry(heading: str, *texts: str) -> list[str]:
    indent = " " * (TEXT_INDENT + 2)
    lines = [line for text in texts for line in textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)]
    return [f"  {heading:<{TEXT_INDENT}}{lines[0]}", *(indent + line for line in lines[1:])]


def _class_balance(split: SplitInfo) -> Iterator[str]:
    counts = {label: count for label, count in enumerate(split.class_counts) if count}
    num_classes = len(split.class_counts)
    if not counts:
        yield f"{num_classes:,}: all without samples"
        return

    def named(label: int) -> str:
        return f"{_class_name(split, label)} {split.class_counts[label]:,}"

    smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    extent = f"{split.num_samples / num_classes:,.1f} samples on average, smallest {named(smallest)}, largest {named(largest)}"
    if counts[smallest] == counts[largest]:
        extent = f"{counts[smallest]:,} sample{'s' if counts[smallest] > 1 else ''} each"
    num_empty = num_classes - len(counts)
    yield f"{num_classes:,}: {extent}; {f'{num_empty:,} classes' if num_empty else 'none'} without samples"
    if num_classes <= NAMED_CLASSES:
        yield ", ".join(map(named, range(num_classes)))


def _class_name(split: SplitInfo, label: int) -> str:
    return split.class_names[label] if split.class_names and label < len(split.class_names) else f"class {label}"


def _image_facts(split: SplitInfo) -> Iterator[str]:
    if split.num_headers < split.num_samples:
        yield f"of a sample of {split.num_headers:,} of {split.num_samples:,} images, evenly spaced:"
    shown = ", ".join(f"{name} {count:,}" for name, count in split.formats.items()) or "none that could be read"
    yield f"{shown}; median {split.median_width:g} x {split.median_height:g} pixels"
    if split.unreadable:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in split.unreadable.items())
        yield f"training could not decode {sum(split.unreadable.values()):,} ({reasons})"


def _histogram(counts: dict[str, int]) -> Iterator[str]:
    name_width, count_width = max(map(len, counts)), max(len(f"{count:,}") for count in counts.values())
    for name, count in counts.items():
        bar = "#" * -(-BAR_LENGTH * count // max(1, *counts.values()))
        yield f"{name:<{name_width}}  {count:>{count_width},}  {bar}".rstrip()


def _reading(split: SplitInfo) -> Iterator[str]:
    num_bytes, image_kilobytes = split.image_bytes + split.label_bytes, split.image_bytes / split.num_samples / 1e3
    yield f"{num_bytes / 1e6:,.1f} MB of images and labels; {image_kilobytes:,.1f} kB an image on average"
    yield ", ".join(f"{num_bytes / split.num_samples * rate / 1e6:,.1f} MB/s at {rate:,} images/s" for rate in RATES)
