"""Checks one tar, its index and its samples: the part of `shards verify` that runs in its workers."""

import functools
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.index import Component, Sample, as_field, group_samples, iter_components, read_index, split_name
from pipelines.shards.labels import LabelReader
from pipelines.shards.shard_set import IMAGE_EXTENSIONS, image_or_first
from tools.shards.check import ImageCheck
from tools.shards.shape import Level, image_batches

LABEL_BYTES = 2**24  # a larger member is not a label, although training would read it


@dataclass(frozen=True)
class Finding:
    """A problem in a data set.

    Attributes:
        kind: damaged-tar, missing-tar, wrong-index, wrong-info, duplicate-key, blank-in-key, missing-image, missing-label,
            repeated-member, bad-label, bad-image or bad-in-training.
        tar: Path of the tar or of the `_info.json`.
        offset: Offset of the member's data in the tar, or None for the whole file.
        member: Name of the member. Empty for the whole file.
        detail: Description of the problem.
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
    """A tar to check. Without an index file, all its samples are checked.

    Attributes:
        known: Why a run left a sample out, by the offset of its image, or of its first member if it has no image.
    """

    tar: Path
    index_path: Path | None
    label_reader: LabelReader
    level: Level
    known: dict[int, str] = field(default_factory=dict)


class Contents(NamedTuple):
    """The contents of a tar. `samples` are those that training would read: those of the index if it is valid, or else all."""

    samples: list[Sample]
    num_in_tar: int
    damage: str
    index_error: str


@dataclass
class TarResult:
    """The result of checking a tar.

    Attributes:
        num_in_tar: Number of samples in the tar. For a damaged tar, those before the damage.
        num_samples: Number of samples that training would read.
        mend_index: Whether the index is wrong, or would be wrong if DALI's tool made it.
        bad_samples: Offsets of the first members of bad samples.
        hashes: Hash of the key of each sample that training would read.
    """

    task: Task
    num_in_tar: int = 0
    num_samples: int = 0
    damaged: bool = False
    mend_index: bool = False
    findings: list[Finding] = field(default_factory=list)
    bad_samples: set[int] = field(default_factory=set)
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    def add(self, kind: str, detail: str, member: Component | None = None) -> None:
        """Adds a finding on the whole tar, or on a member."""
        offset, name = (None, "") if member is None else (member.offset, member.name)
        self.findings.append(Finding(kind, str(self.task.tar), offset, name, detail))

    def add_bad(self, kind: str, sample: Sample, member: Component, detail: str) -> None:
        """Adds a finding on a member that makes its sample unusable."""
        self.add(kind, detail, member)
        self.bad_samples.add(sample[0].offset)


def check_tar(task: Task) -> TarResult:
    """Finds all problems that do not involve other tars."""
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
    except OSError as error:  # the disk fails, or permission is denied
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
    # The index of a damaged tar may list lost samples. This is not a separate finding.
    return Contents(listed, len(samples), damage, "" if damage else index_error)


def hash_key(sample: Sample) -> int:
    """Returns 64 bits for a sample's key. The hashes of many millions of samples fit into memory."""
    return int.from_bytes(hashlib.blake2b(key_of(sample).encode(), digest_size=8).digest(), "big")


def key_of(sample: Sample) -> str:
    """Returns the key that the members of the sample share."""
    return split_name(sample[0].name)[0]


def _whole(samples: list[Sample], tar_size: int, label_extension: str) -> list[Sample]:
    """Returns the complete samples of a damaged tar. The last sample may lack members, or its last member bytes."""
    if not samples:
        return []
    *before, last = samples
    cut = any(component.offset + component.size > tar_size for component in last)
    return before if cut or not (_members(last, *IMAGE_EXTENSIONS) and _members(last, label_extension)) else samples


def _members(sample: Sample, *extensions: str) -> list[Component]:
    return [component for component in sample if component.extension.lower() in extensions]


def _listed(samples: list[Sample], index_path: Path) -> tuple[list[Sample], str]:
    """Returns the samples that an index lists, or all samples and the error in the index."""
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
        same = all(
            place and (part.size, part.extension) == (place[1].size, as_field(place[1].extension))
            for part, place in zip(line, found, strict=True)
        )
        if not same or len(numbers) != 1 or numbers & listed.keys():
            wrong.append(line[0].name)
        else:
            listed[numbers.pop()] = [place[1] for place in found if place]
    if wrong:
        return samples, f"{len(wrong):,} of its {len(lines):,} samples differ from the tar, the first at {wrong[0]}"
    return list(listed.values()), ""


def _check_samples(file: BinaryIO, samples: list[Sample], result: TarResult) -> None:
    _check_keys(samples, result)
    for sample in samples:
        _check_label(file, sample, result)
        if not _members(sample, *IMAGE_EXTENSIONS):
            result.add_bad("missing-image", sample, sample[0], f"the sample has no .{' .'.join(IMAGE_EXTENSIONS)} member")
        named = image_or_first(sample)
        if (reason := result.task.known.get(named.offset)) is not None:
            result.add_bad("bad-in-training", sample, named, f"left out by a run: {reason}")
    if result.task.level != "none":
        images = ((sample, image) for sample in samples for image in _members(sample, *IMAGE_EXTENSIONS))
        for batch in image_batches(images, lambda pair: pair[1].size):
            _check_images(file, batch, result.task.level, result)


def _check_keys(samples: list[Sample], result: TarResult) -> None:
    """Finds repeated members, and keys with blanks.

    A blank ends a field of an index. `shards index` replaces blanks by other characters, but DALI's tool writes broken lines.
    """
    for sample in samples:
        extensions = [component.extension.lower() for component in sample]
        if len(set(extensions)) < len(extensions):
            result.add_bad("repeated-member", sample, sample[0], f"members share an extension: .{' .'.join(extensions)}")
        if len(key_of(sample).split()) != 1 and (result.task.index_path is None or result.mend_index):
            result.mend_index = True
            detail = "blanks in the key break an index made by DALI's wds2idx; `shards index` writes a valid one"
            result.add("blank-in-key", detail, sample[0])


def _check_label(file: BinaryIO, sample: Sample, result: TarResult) -> None:
    reader = result.task.label_reader
    labels = _members(sample, reader.extension)
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


def _check_images(
    file: BinaryIO, batch: list[tuple[Sample, Component]], level: Literal["decode", "structure"], result: TarResult
) -> None:
    images = []
    for _, image in batch:
        file.seek(image.offset)
        images.append(file.read(image.size))
    for (sample, image), verdict in zip(batch, _image_check(level)(images), strict=True):
        if verdict.extension is None:
            result.add_bad("bad-image", sample, image, verdict.reason)


@functools.cache
def _image_check(level: Literal["decode", "structure"]) -> ImageCheck:
    return ImageCheck(level)
