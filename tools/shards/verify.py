"""`shards verify`: finds everything in a data set that would disturb training."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipelines.bad_samples.limits import MAX_PIXELS, check_max_pixels
from pipelines.bad_samples.quarantine import location, read_quarantine
from pipelines.printable import counted, printable
from pipelines.shards.find_tars import INFO_FILE, find_splits, naming_scheme, read_info, tars_of_folder
from pipelines.shards.labels import no_class_zero, open_labels
from pipelines.shards.members import image_extensions, key_of
from tools.shards.index import index_paths, require_writable, save_index
from tools.shards.parallel import choose_workers, run
from tools.shards.shape import Level
from tools.shards.verify_tar import Finding, TarResult, Task, check_tar, hash_key, place_of, read_contents

LINES_PER_KIND = 50
LIMITS_OF_LEVELS = {
    "structure": "images were not decoded (--check structure), so damage within an image is not found",
    "none": "images were not read (--check none); only their presence in each sample was checked",
}


@dataclass(frozen=True)
class Report:
    """The result of `shards verify`.

    `num_samples` counts the samples that training would read, and `num_left_out` those that the index files leave out. The last
    two fields are the number of samples that `--quarantine` left out, and the index files that it wrote.
    """

    num_tars: int
    num_samples: int
    num_left_out: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    num_quarantined: int
    quarantine: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """The number of findings by kind, the most frequent first."""
        return dict(collections.Counter(finding.kind for finding in self.findings).most_common())

    def __str__(self) -> str:
        found = counted(len(self.findings), "finding") if self.findings else "no findings"
        lines = [f"{counted(self.num_tars, 'tar')}, {counted(self.num_samples, 'sample')}: {found}"]
        lines += [f"  {kind:<16}{count:>10,}" for kind, count in self.counts.items()]
        for kind, count in self.counts.items():
            of_kind = (finding for finding in self.findings if finding.kind == kind)
            lines += (printable(str(finding)) for finding in itertools.islice(of_kind, LINES_PER_KIND))
            if count > LINES_PER_KIND:
                lines.append(f"... and {count - LINES_PER_KIND:,} more {kind}; --json lists all")
        return "\n".join([*lines, *(printable(f"note: {note}") for note in self.notes)])

    def to_json(self) -> str:
        """Returns one JSON object: the attributes, and `counts` with the number of findings by kind."""
        return json.dumps({**dataclasses.asdict(self), "counts": self.counts})


@dataclass(frozen=True)
class _Split:
    """The tars of a split, with class names and number of samples per tar from `_info.json`, if known."""

    tars: list[Path]
    classes: list[str] | None
    lengths: dict[Path, int]


def verify(
    pattern: str,
    *,
    level: Level = "decode",
    max_pixels: int = MAX_PIXELS,
    num_workers: int | None = None,
    quarantine: bool = False,
    index_dir: Path | None = None,
    label_key: str = "",
    class_file: str = "",
    image_key: str = "",
    known: Sequence[Path] = (),
) -> Report:
    """Checks tars, index files, keys, labels, images and the counts in `_info.json`.

    The arguments are the options of `shards verify`.

    Raises:
        ValueError: Nothing matches, or the class file or a list of samples is invalid, or the folder of the index files
            cannot be used.
    """
    check_max_pixels(max_pixels)
    splits, findings = _find_splits(pattern)
    tars = [tar for split in splits for tar in split.tars]
    targets = dict(zip(tars, index_paths(list(map(str, tars)), index_dir), strict=True))
    _check_folders({target.parent for target in targets.values()}, index_dir, quarantine)
    bad_in_training: dict[str, dict[int, str]] = collections.defaultdict(dict)
    for sample in itertools.chain.from_iterable(map(read_quarantine, known)):
        bad_in_training[sample.tar][sample.offset] = sample.reason
    readers = [open_labels(label_key, class_file, split.classes) for split in splits]
    tasks, images = [], image_extensions(image_key)
    for split, reader in zip(splits, readers, strict=True):
        for tar in split.tars:
            index = next((path for path in (targets[tar], tar.with_suffix(".idx")) if path.exists()), None)
            tasks.append(Task(tar, index, reader, level, bad_in_training.get(location(str(tar)), {}), images, max_pixels))
    results = _check_tars(tasks, min(choose_workers(num_workers), max(1, len(tasks))))
    for split in splits:
        _check_lengths(results, split.lengths)
        _check_keys([results[tar] for tar in split.tars])
    for result in results.values():
        findings += sorted(result.findings, key=lambda finding: finding.offset or 0)
    notes = [*_notes(results, level), *_repeated_classes(splits[0].classes or ())]
    written, num_quarantined = _quarantine(results, targets, notes) if quarantine else ([], 0)
    return Report(
        num_tars=len(tars),
        num_samples=sum(result.num_samples for result in results.values()),
        num_left_out=sum(result.num_in_tar - result.num_samples for result in results.values()),
        findings=tuple(findings),
        notes=tuple(notes),
        num_quarantined=num_quarantined,
        quarantine=tuple(written),
    )


def _find_splits(pattern: str) -> tuple[list[_Split], list[Finding]]:
    """Returns the splits of a pattern without missing tars, and the findings on their `_info.json`."""
    if os.path.isdir(pattern):
        return _splits_of_folder(Path(pattern))
    [tars] = find_splits(pattern).values()
    info, findings = _read_info(tars[0].parent)
    listed: dict[Path, int] = {}
    for split in info.get("splits", {}).values():
        listed |= _lengths(tars[0].parent, split)
    tars = list(dict.fromkeys(tars))
    return [_Split(tars, info.get("classes"), {tar: listed[tar] for tar in tars if tar in listed})], findings


def _splits_of_folder(folder: Path) -> tuple[list[_Split], list[Finding]]:
    info, findings = _read_info(folder)
    if not info.get("splits"):
        by_scheme = collections.defaultdict(list)
        for tar in tars_of_folder(folder):
            by_scheme[naming_scheme(tar.name)].append(tar)
        return [_Split(tars, info.get("classes"), {}) for tars in by_scheme.values()], findings
    splits = []
    for name, split in sorted(info["splits"].items()):
        findings += _check_counts(folder, name, split)
        tars = [folder / filename for filename in split["filenames"]]
        findings += [Finding("missing-tar", str(tar), None, "", f"{INFO_FILE} lists it") for tar in tars if not tar.exists()]
        present = [tar for tar in tars if tar.exists()]
        splits.append(_Split(present, info.get("classes"), _lengths(folder, split)))
    return splits, findings


def _read_info(folder: Path) -> tuple[dict[str, Any], list[Finding]]:
    try:
        return read_info(folder), []
    except ValueError as error:
        path = str(folder / INFO_FILE)
        return {}, [Finding("wrong-info", path, None, "", str(error).removeprefix(f"{path}: "))]


def _lengths(folder: Path, split: dict[str, Any]) -> dict[Path, int]:
    return dict(zip((folder / name for name in split["filenames"]), split.get("shard_lengths", ()), strict=False))


def _check_counts(folder: Path, name: str, split: dict[str, Any]) -> Iterator[Finding]:
    """Checks that the counts of a split are consistent. `_check_lengths` compares them with the tars."""
    lengths, filenames, num_samples = split.get("shard_lengths", ()), split["filenames"], split.get("num_samples")
    if len(lengths) != len(filenames):
        detail = f"split {name!r} has {counted(len(filenames), 'filename')} and {counted(len(lengths), 'shard length')}"
    elif num_samples != sum(lengths):
        detail = f"split {name!r} has num_samples {num_samples}, but the sum of its shard_lengths is {sum(lengths)}"
    else:
        return
    yield Finding("wrong-info", str(folder / INFO_FILE), None, "", detail)


def _check_folders(folders: set[Path], index_dir: Path | None, quarantine: bool) -> None:
    """Raises ValueError before the long work if index files cannot be read or written."""
    if index_dir is not None and not quarantine and not index_dir.is_dir():
        raise ValueError(f"--index-dir {index_dir}: no such folder; --quarantine or `shards index` creates it")
    for folder in folders if quarantine else ():
        require_writable(folder)


def _check_tars(tasks: list[Task], num_workers: int) -> dict[Path, TarResult]:
    """Returns the result of each tar, in the order of the tasks."""
    results: dict[Path, TarResult] = {}
    # Without `closing`, the workers would finish their tasks before an interruption ends the command.
    with tqdm(unit="sample", disable=None) as progress, contextlib.closing(run(check_tar, tasks, num_workers)) as checked:
        for result in checked:
            results[result.task.tar] = result
            progress.set_postfix_str(f"{len(results)}/{len(tasks)} tars", refresh=False)
            progress.update(result.num_samples)
    return {task.tar: results[task.tar] for task in tasks}


def _check_lengths(results: dict[Path, TarResult], lengths: dict[Path, int]) -> None:
    """Compares the number of samples with `_info.json`. Damaged tars are skipped: they have a finding already."""
    for tar, length in lengths.items():
        if tar in results and not results[tar].damaged and results[tar].num_in_tar != length:
            results[tar].add("wrong-info", f"holds {counted(results[tar].num_in_tar, 'sample')}; {INFO_FILE} says {length}")


def _check_keys(results: list[TarResult]) -> None:
    """Finds keys that occur twice in a split. Workers return hashes; if hashes are equal, this reads the names again."""
    hashes, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *(r.hashes for r in results)]), return_counts=True)
    repeated = set(hashes[counts > 1].tolist())
    first: dict[str, Path] = {}
    for result in results:
        if repeated.isdisjoint(result.hashes.tolist()):
            continue
        for sample in read_contents(result.task).samples:
            if hash_key(sample) not in repeated:
                continue
            if key_of(sample) in first:
                detail = f"an earlier sample, in {first[key_of(sample)].name}, has the same key"
                result.add_bad("duplicate-key", sample, sample[0], detail)
            else:
                first[key_of(sample)] = result.task.tar


def _notes(results: dict[Path, TarResult], level: Level) -> Iterator[str]:
    if level in LIMITS_OF_LEVELS:
        yield LIMITS_OF_LEVELS[level]
    without = [tar for tar, result in results.items() if result.task.index_path is None]
    if without:
        have = "has" if len(without) == 1 else "have"
        yield f"{counted(len(without), 'tar')} {have} no index file, for example {without[0]}; `shards index` writes it"
    left_out = sum(result.num_in_tar - result.num_samples for result in results.values())
    if note := no_class_zero(set[int]().union(*(result.labels for result in results.values()))):
        yield note
    if left_out:
        are, were = ("is", "was") if left_out == 1 else ("are", "were")
        yield f"{counted(left_out, 'sample')} {are} left out by the index files, and {were} not checked"


def _repeated_classes(classes: Sequence[str]) -> Iterator[str]:
    """Yields a note on names that several classes share. Labels by number tell them apart, and the names of ImageNet repeat."""
    repeated = [name for name, count in collections.Counter(classes).items() if count > 1]
    if repeated:
        names = ", ".join(map(printable, repeated[:5]))
        yield f"{counted(len(repeated), 'class name')} of several classes in {INFO_FILE}: {names}"


def _quarantine(results: dict[Path, TarResult], targets: dict[Path, Path], notes: list[str]) -> tuple[list[str], int]:
    """Writes index files without the bad samples. Returns the files, and the number of samples that they leave out."""
    num_samples = sum(result.num_samples for result in results.values())
    repeated = sum(finding.kind == "duplicate-key" for result in results.values() for finding in result.findings)
    if 2 * repeated > num_samples:  # if each tar numbers its samples from 0, all tars but one would be lost
        notes.append(
            f"nothing was quarantined: {repeated:,} of {num_samples:,} keys are repeated, so keys do not identify samples here"
        )
        return [], 0
    written, num_left_out = [], 0
    for tar, result in results.items():
        if not (result.bad_samples or result.mend_index or result.damaged):
            continue
        samples = read_contents(result.task).samples if result.num_samples else []
        kept = [sample for sample in samples if place_of(sample) not in result.bad_samples]
        save_index(targets[tar], kept)
        written.append(str(targets[tar]))
        num_left_out += len(samples) - len(kept)
        if result.damaged:
            notes.append(f"{tar} stays damaged: its index lists only the {counted(len(kept), 'good sample')} before the damage")
    leave = "leaves" if len(written) == 1 else "leave"
    notes.append(f"wrote {counted(len(written), 'index file')}, which {leave} out {counted(num_left_out, 'bad sample')}")
    return written, num_left_out
