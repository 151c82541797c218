"""What is wrong with one tar, its index and its samples: the part of `shards verify` that its workers do."""

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.index import Component, Sample, as_field, group_samples, iter_components, read_index, split_name
from pipelines.shards.labels import LabelReader
from pipelines.shards.shard_set import IMAGE_EXTENSIONS, image_or_first
from tools.shards.check import ImageCheck
from tools.shards.shape import Level

# Read and decoded together in one process; fewer where they are large.
IMAGES_AT_ONCE = 16
BYTES_AT_ONCE = 32e6
LABEL_BYTES = 2**24  # what is larger is no label; training would read it all the same


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        kind: damaged-tar, missing-tar, wrong-index, wrong-info, duplicate-key, blank-in-key, missing-image, missing-label,
            repeated-member, bad-label, bad-image or bad-in-training.
        tar: The tar, or the `_info.json`.
        offset: Of the member's data in the tar; None where the whole file is meant.
        member: Its name; empty for the whole file.
        detail: What is wrong, for people.
    """

    kind: str
    tar: str
    offset: int | None
    member: str
    detail: str

    def __str__(self) -> str:
        place = self.tar if self.offset is None else f"{self.tar}:{self.offset}:{self.member}"
        return f"{place}  {self.kind}  {self.detail}"


@dataclass(frozen=True)
class Task:
    """A tar to check; without an index file, all of its samples.

    Attributes:
        known: Samples that a run has found bad, and why, by the offset of the image or else of the first member.
    """

    tar: Path
    index_path: Path | None
    label_reader: LabelReader
    level: Level
    known: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """What a tar holds.

    Attributes:
        samples: Those that training would read: of those in the tar the ones that the index lists, where that is right.
        num_in_tar: Samples in the tar.
        damage: What is wrong with the tar; empty where it is whole.
        index_error: The same of the index.
    """

    samples: list[Sample]
    num_in_tar: int
    damage: str
    index_error: str


@dataclass
class TarResult:
    """What was found out about a tar.

    Attributes:
        task: The tar.
        num_in_tar: Samples in it; of a damaged tar those before the damage, if it can be read at all.
        num_samples: Samples that training would read.
        damaged: Whether the tar is.
        mend_index: Its index is wrong, or would be if DALI's tool made it.
        findings: In the order in which they were made.
        bad_samples: Offsets of the first members of samples that training must not read.
        hashes: A number for the key of each sample that training would read.
    """

    task: Task
    num_in_tar: int = 0
    num_samples: int = 0
    damaged: bool = False
    mend_index: bool = False
    findings: list[Finding] = field(default_factory=list)
    bad_samples: set[int] = field(default_factory=set)
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    def add(self, kind: str, detail: str) -> None:
        """Enters a finding about the whole tar."""
        self.findings.append(Finding(kind, str(self.task.tar), None, "", detail))

    def add_bad(self, kind: str, sample: Sample, member: Component, detail: str) -> None:
        """Enters a finding about a member, which makes its sample a bad one."""
        self.findings.append(Finding(kind, str(self.task.tar), member.offset, member.name, detail))
        self.bad_samples.add(sample[0].offset)


def check_tar(task: Task) -> TarResult:
    """Finds everything that can be told without the other tars."""
    result = TarResult(task)
    try:
        contents = read_contents(task)
        result.num_in_tar, result.num_samples = contents.num_in_tar, len(contents.samples)
        result.damaged, result.mend_index = bool(contents.damage), bool(contents.index_error)
        if contents.damage:
            result.add("damaged-tar", contents.damage)
        if contents.index_error:
            result.add("wrong-index", f"{task.index_path}: {contents.index_error}")
        with open(task.tar, "rb") as file:
            _check_samples(file, contents.samples, result)
    except OSError as error:  # the disk fails, or it may not be read
        result.damaged, result.num_in_tar, result.num_samples = True, 0, 0
        result.add("damaged-tar", str(error))
    else:
        result.hashes = np.array([hash_key(sample) for sample in contents.samples], np.uint64)
    return result


def read_contents(task: Task) -> Contents:
    """Reads the headers of a tar, and its index."""
    components, damage = [], ""
    with open(task.tar, "rb") as file:
        try:
            for component in iter_components(file, str(task.tar)):
                components.append(component)
        except ValueError as error:
            damage = str(error).removeprefix(f"{task.tar}: ")
        size = os.fstat(file.fileno()).st_size
    samples = group_samples(components)
    if damage:
        samples = _whole(samples, size, task.label_reader.extension)
    listed, index_error = _listed(samples, task.index_path) if task.index_path else (samples, "")
    # Of a damaged tar an index may well list more than is left of it: that is the same finding.
    return Contents(listed, len(samples), damage, "" if damage else index_error)


def hash_key(sample: Sample) -> int:
    """64 bits for a sample's key: those of many millions of samples have to fit into memory together."""
    return int.from_bytes(hashlib.blake2b(key_of(sample).encode(), digest_size=8).digest(), "big")


def key_of(sample: Sample) -> str:
    """The key that the members of the sample share."""
    return split_name(sample[0].name)[0]


def _whole(samples: list[Sample], tar_size: int, label_extension: str) -> list[Sample]:
    """The samples before the damage of a tar; the last one may lack members, and the last member bytes."""
    if not samples:
        return []
    *before, last = samples
    cut = any(component.offset + component.size > tar_size for component in last)
    return before if cut or not (_images(last) and _labels(last, label_extension)) else samples


def _images(sample: Sample) -> list[Component]:
    return [component for component in sample if component.extension.lower() in IMAGE_EXTENSIONS]


def _labels(sample: Sample, extension: str) -> list[Component]:
    return [component for component in sample if component.extension.lower() == extension]


def _listed(samples: list[Sample], index_path: Path) -> tuple[list[Sample], str]:
    """The samples that an index lists; or all, and what is wrong with the index."""
    try:
        lines = read_index(index_path)
    except ValueError as error:
        return samples, str(error).removeprefix(f"{index_path}: ")
    places = {component.offset: (i, component) for i, sample in enumerate(samples) for component in sample}
    listed: dict[int, Sample] = {}
    wrong = []
    for line in lines:
        found = [places.get(component.offset) for component in line]
        numbers = {place[0] for place in found if place}
        same = all(place and _matches(component, place[1]) for component, place in zip(line, found, strict=True))
        if not same or len(numbers) != 1 or numbers & listed.keys():
            wrong.append(line[0].name)
        else:
            listed[numbers.pop()] = [place[1] for place in found if place]
    if wrong:
        return (
            samples,
            f"{len(wrong):,} of its {len(lines):,} samples are not in the tar like that; the first is that of {wrong[0]}",
        )
    return list(listed.values()), ""


def _matches(listed: Component, component: Component) -> bool:
    return listed.size == component.size and listed.extension == as_field(component.extension)


def _check_samples(file: BinaryIO, samples: list[Sample], result: TarResult) -> None:
    _check_keys(samples, result)
    for sample in samples:
        _check_label(file, sample, result)
        if not _images(sample):
            result.add_bad("missing-image", sample, sample[0], f"the sample has no .{' .'.join(IMAGE_EXTENSIONS)} member")
        named = image_or_first(sample)
        if (reason := result.task.known.get(named.offset)) is not None:
            result.add_bad("bad-in-training", sample, named, f"left out by a run: {reason}")
    if result.task.level != "none":
        for chunk in _chunks(samples):
            _check_images(file, chunk, result.task.level, result)


def _check_keys(samples: list[Sample], result: TarResult) -> None:
    """Blanks end a field of an index; a right one has others in their place, one by DALI's tool is broken by them."""
    for sample in samples:
        key = key_of(sample)
        extensions = [component.extension.lower() for component in sample]
        if len(set(extensions)) < len(extensions):
            result.add_bad("repeated-member", sample, sample[0], f"several members of one extension: .{' .'.join(extensions)}")
        if len(key.split()) != 1 and (result.task.index_path is None or result.mend_index):
            result.mend_index = True
            detail = "blanks in the key break an index made by DALI's wds2idx; `shards index` makes one that copes"
            result.findings.append(Finding("blank-in-key", str(result.task.tar), sample[0].offset, sample[0].name, detail))


def _check_label(file: BinaryIO, sample: Sample, result: TarResult) -> None:
    reader = result.task.label_reader
    labels = _labels(sample, reader.extension)
    if not labels:
        result.add_bad("missing-label", sample, sample[0], f"the sample has no .{reader.extension} member")
        return
    file.seek(labels[0].offset)
    try:
        label = reader.parse(file.read(min(labels[0].size, LABEL_BYTES)), "")
    except ValueError as error:
        result.add_bad("bad-label", sample, labels[0], str(error).removeprefix(": "))
        return
    if reader.classes is not None and label >= len(reader.classes):
        detail = f"class {label} is out of range; there are {len(reader.classes)} classes, from 0 on"
        result.add_bad("bad-label", sample, labels[0], detail)


def _chunks(samples: list[Sample]) -> Iterator[list[tuple[Sample, Component]]]:
    """Images, a few at a time, with their samples."""
    chunk: list[tuple[Sample, Component]] = []
    num_bytes = 0
    for sample in samples:
        for image in _images(sample):
            if chunk and (len(chunk) == IMAGES_AT_ONCE or num_bytes + image.size > BYTES_AT_ONCE):
                yield chunk
                chunk, num_bytes = [], 0
            chunk.append((sample, image))
            num_bytes += image.size
    if chunk:
        yield chunk


def _check_images(
    file: BinaryIO, chunk: list[tuple[Sample, Component]], level: Literal["decode", "structure"], result: TarResult
) -> None:
    images = []
    for _, image in chunk:
        file.seek(image.offset)
        images.append(file.read(image.size))
    for (sample, image), verdict in zip(chunk, _image_check(level)(images), strict=True):
        if verdict.extension is None:
            result.add_bad("bad-image", sample, image, verdict.reason)


@functools.cache
def _image_check(level: Literal["decode", "structure"]) -> ImageCheck:
    return ImageCheck(level)
