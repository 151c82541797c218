"""Checks one tar, its index and its samples: the part of `shards verify` that runs in its workers."""

import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.bad_samples.limits import MAX_PIXELS
from pipelines.shards.index import Component, Sample, as_component, as_field, group_samples, read_index, split_name
from pipelines.shards.labels import LabelReader, check_range
from pipelines.shards.members import IMAGE_EXTENSIONS, image_or_first, key_of, lacks
from pipelines.shards.walk import Entry, walk
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
        images: Extensions of the image of a sample.
        known: Why a run left a sample out, by the offset of its image, or of its first member if it has no image.
    """

    tar: Path
    index_path: Path | None
    label_reader: LabelReader
    level: Level
    known: dict[int, str] = field(default_factory=dict)
    images: tuple[str, ...] = IMAGE_EXTENSIONS
    max_pixels: int = MAX_PIXELS


class Contents(NamedTuple):
    """The contents of a tar.

    `samples` are those that training would read: those of the index if it is valid, or else all. `others` are members without
    bytes of their own, such as links, by the key of their sample.
    """

    samples: list[Sample]
    num_in_tar: int
    damage: str
    index_error: str
    others: dict[str, list[Entry]]


@dataclass
class TarResult:
    """The result of checking a tar.

    Attributes:
        num_in_tar: Number of samples in the tar. For a damaged tar, those before the damage.
        num_samples: Number of samples that training would read.
        mend_index: Whether the index is wrong, or would be wrong if DALI's tool made it.
        bad_samples: The bad samples, see `place_of`.
        labels: Class numbers that occur.
        hashes: Hash of the key of each sample that training would read.
    """

    task: Task
    num_in_tar: int = 0
    num_samples: int = 0
    damaged: bool = False
    mend_index: bool = False
    findings: list[Finding] = field(default_factory=list)
    bad_samples: set[tuple[int, int]] = field(default_factory=set)
    labels: set[int] = field(default_factory=set)
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    def add(self, kind: str, detail: str, member: Component | None = None) -> None:
        """Adds a finding on the whole tar, or on a member."""
        offset, name = (None, "") if member is None else (member.offset, member.name)
        self.findings.append(Finding(kind, str(self.task.tar), offset, name, detail))

    def add_bad(self, kind: str, sample: Sample, member: Component, detail: str) -> None:
        """Adds a finding on a member that makes its sample unusable."""
        self.add(kind, detail, member)
        self.bad_samples.add(place_of(sample))


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
            _check_samples(file, contents, result)
    except OSError as error:  # the disk fails, or permission is denied
        result.damaged, result.num_in_tar, result.num_samples = True, 0, 0
        result.add("damaged-tar", str(error))
    else:
        result.hashes = np.array([hash_key(sample) for sample in contents.samples], np.uint64)
    return result


def read_contents(task: Task) -> Contents:
    """Reads the headers of a tar, and its index."""
    components, damage, others = list[Component](), "", dict[str, list[Entry]]()
    with open(task.tar, "rb") as file:
        try:
            for entry in walk(file, str(task.tar)):
                if (component := as_component(entry)) is not None:
                    components.append(component)
                elif entry.other:
                    others.setdefault(split_name(entry.name)[0], []).append(entry)
        except ValueError as error:
            damage = str(error).removeprefix(f"{task.tar}: ")
    samples = group_samples(components)
    if damage and samples and not _is_whole(samples[-1], task):
        samples.pop()
    listed, index_error = _listed(samples, task.index_path) if task.index_path else (samples, "")
    # The index of a damaged tar may list lost samples. This is not a separate finding.
    return Contents(listed, len(samples), damage, "" if damage else index_error, others)


def hash_key(sample: Sample) -> int:
    """Returns 64 bits for a sample's key. The hashes of many millions of samples fit into memory."""
    return int.from_bytes(hashlib.blake2b(key_of(sample).encode(), digest_size=8).digest(), "big")


def place_of(sample: Sample) -> tuple[int, int]:
    """Returns the offsets of a sample's first and last member. Samples may share one of them, as the target of a hard link."""
    return sample[0].offset, sample[-1].offset


def _is_whole(sample: Sample, task: Task) -> bool:
    """Returns whether the last sample of a damaged tar has what training needs."""
    return bool(_members(sample, *task.images) and _members(sample, task.label_reader.extension))


def _members(sample: Sample, *extensions: str) -> list[Component]:
    return [component for component in sample if component.extension.lower() in extensions]


def _listed(samples: list[Sample], index_path: Path) -> tuple[list[Sample], str]:
    """Returns the samples that an index lists, or all samples and the error in the index."""
    try:
        lines = read_index(index_path)
    except ValueError as error:
        return samples, str(error).removeprefix(f"{index_path}: ")
    places: dict[int, dict[int, Component]] = {}  # by offset and number of the sample; hard links share offsets
    for i, sample in enumerate(samples):
        for component in sample:
            places.setdefault(component.offset, {})[i] = component
    listed: dict[int, Sample] = {}
    wrong = []
    for line in lines:
        found = [places.get(part.offset, {}) for part in line]
        fewest = min(found, key=len)  # all samples of a class may share a label
        number = next((i for i in fewest if i not in listed and all(i in others for others in found)), None)
        parts = [(component.size, component.extension) for component in line]
        if number is None or parts != [(found_in[number].size, as_field(found_in[number].extension)) for found_in in found]:
            wrong.append(line[0].name)
        else:
            listed[number] = [found_in[number] for found_in in found]
    if wrong:
        return samples, f"{len(wrong):,} of its {len(lines):,} samples differ from the tar, the first at {wrong[0]}"
    return list(listed.values()), ""


def _check_samples(file: BinaryIO, contents: Contents, result: TarResult) -> None:
    samples, images, extension = contents.samples, result.task.images, result.task.label_reader.extension
    by_key: dict[str, list[Sample]] = {}
    for sample in samples:
        by_key.setdefault(key_of(sample), []).append(sample)
    _check_keys(samples, result)
    for sample in samples:
        missing = [kind for kind, found in (("image", images), ("label", (extension,))) if not _members(sample, *found)]
        for kind in missing:
            key = key_of(sample)
            detail = lacks(sample, images, (extension,), by_key[key], contents.others.get(key, ()))
            result.add_bad(f"missing-{kind}", sample, sample[0], detail)
        if "label" not in missing:
            _check_label(file, sample, result)
        named = image_or_first(sample, images)
        if (reason := result.task.known.get(named.offset)) is not None:
            result.add_bad("bad-in-training", sample, named, f"left out by a run: {reason}")
    if result.task.level != "none":
        pairs = ((sample, image) for sample in samples for image in _members(sample, *images))
        for batch in image_batches(pairs, lambda pair: pair[1].size):
            _check_images(file, batch, _image_check(result.task.level, result.task.max_pixels), result)


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
    member = _members(sample, reader.extension)[0]
    file.seek(member.offset)
    try:
        label = reader.parse(file.read(min(member.size, LABEL_BYTES)), "")
        if reader.classes is not None:
            check_range(label, len(reader.classes))
    except ValueError as error:
        result.add_bad("bad-label", sample, member, str(error).removeprefix(": "))
    else:
        result.labels.add(label)


def _check_images(file: BinaryIO, batch: list[tuple[Sample, Component]], check: ImageCheck, result: TarResult) -> None:
    images = []
    for _, image in batch:
        file.seek(image.offset)
        images.append(file.read(image.size))
    for (sample, image), verdict in zip(batch, check(images), strict=True):
        if verdict.extension is None:
            result.add_bad("bad-image", sample, image, verdict.reason)


@functools.cache
def _image_check(level: Literal["decode", "structure"], max_pixels: int) -> ImageCheck:
    return ImageCheck(level, max_pixels)
