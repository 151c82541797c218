"""Images in WebDataset shards: to shuffle or divide them again, to resize images, or to move labels from `.json` to `.cls`."""

import functools
import itertools
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from pipelines.printable import counted, printable
from pipelines.shards.find_tars import read_info
from pipelines.shards.index import Component, Sample, as_component, group_samples, split_name
from pipelines.shards.labels import (
    BinaryLabelError,
    LabelReader,
    check_range,
    class_number,
    label_place,
    open_labels,
    padded_length,
    require_name,
)
from pipelines.shards.members import IMAGE_EXTENSIONS, first_of, image_extensions, lacks, short
from pipelines.shards.walk import FOLDER, Entry, walk
from tools.shards import parallel
from tools.shards.sources.compressed import SourceTar
from tools.shards.sources.listing import ALL_EXTENSIONS, MAX_CLASSES, Extent, Extents, Listing, labelled

LABEL_EXTENSIONS = ("cls", "json")
DEFAULT_KEY = "label"
RARE = 0.01  # fraction of the samples up to which a name among class numbers is a bad label, not a class

LeftOut = list[tuple[str, str]]  # name and reason


class Found(NamedTuple):
    """The samples of a tar.

    Attributes:
        samples: Image and text of the label; and its length in bytes if it could also be a number in binary, or else 0.
        left_out: Name and reason of the samples that cannot be used.
        binary: Lengths in bytes of the labels that were numbers in binary.
        num_joined: Number of samples whose members do not form a WebDataset sample, and were put together by their names.
    """

    samples: list[tuple[Extent, str, int]]
    left_out: LeftOut
    binary: set[int]
    num_joined: int


def list_webdataset(
    location: str,
    tars: tuple[SourceTar, ...],
    image_key: str | None,
    label_key: str | None,
    class_file: str,
    num_workers: int,
) -> Listing:
    """Lists samples with an image and a label. A label is a class number or name in `.cls` or `.json`.

    With `label_key`, labels are read from the member that it names. Without it, they are in `.cls`, or else in `.json`.
    Other members are skipped. Classes are numbered as in the class file, or as in the `_info.json` beside the tars. A sample
    with a bad label is left out.

    Raises:
        ValueError: A tar is damaged, or no sample can be used, or class numbers and unlisted names are mixed.
    """
    listed, left_out, notes = _Listed(tars), LeftOut(), list[str]()
    readers = [LabelReader(), LabelReader("json", DEFAULT_KEY)] if label_key is None else [LabelReader(*label_place(label_key))]
    reader = open_labels("", class_file, read_info(tars[0].origin.parent).get("classes"))
    scan = functools.partial(_scan, images=image_extensions(image_key), readers=readers)
    binary, num_joined = set[int](), 0
    for found in _in_order(parallel.run(scan, tars, min(num_workers, len(tars))), tars):
        left_out += found.left_out
        binary, num_joined = binary | found.binary, num_joined + found.num_joined
        for extent, label, doubtful in found.samples:
            try:
                listed.append(extent, _meaning(label, reader), doubtful)
            except ValueError as error:
                left_out.append((extent.name, str(error)))
    if binary:  # then the number 49, whose bytes are `1\0\0\0`, must not become class 1
        bad = {i for i, length in enumerate(listed.doubtful) if length in binary}
        left_out += listed.remove(bad, "may be a number in binary, as other labels of this set are")
    if reader.classes is None:
        left_out += _without_rare_names(location, listed)
    if not listed.labels:
        if not left_out:
            raise ValueError(f"{location}: no samples")
        [(name, reason), *_] = left_out
        first = f"{printable(name)}: {reason}"
        raise ValueError(f"{location}: none of its {len(left_out):,} samples has an image and a valid label; {first}")
    listing = _listing(location, listed, reader)
    if num_joined:
        samples = counted(num_joined, "sample")
        notes.append(f"the members of {samples} form no WebDataset samples, and were joined by their names")
    listing.left_out, listing.notes = left_out, [*listing.notes, *notes]
    return listing


class _Listed:
    """The samples with their labels, a number or a name as text.

    Attributes:
        doubtful: For each sample, see `Found.samples`.
    """

    def __init__(self, tars: Iterable[SourceTar]) -> None:
        self._unpacked = any(tar.is_unpacked for tar in tars)
        self.extents, self.labels, self.doubtful = Extents(unpacked=self._unpacked), list[str](), bytearray()

    def append(self, extent: Extent, label: str, doubtful: int) -> None:
        self.extents.append(extent)
        self.labels.append(label)
        self.doubtful.append(doubtful)

    def remove(self, bad: Collection[int], reason: str) -> LeftOut:
        """Removes the samples at these positions; returns their names with a reason."""
        before, removed = (self.extents, self.labels, self.doubtful), LeftOut()
        self.extents, self.labels, self.doubtful = Extents(unpacked=self._unpacked), [], bytearray()
        extents, labels, doubtful = before
        for i, label in enumerate(labels):
            if i in bad:
                removed.append((extents.names[i], f"the label is {label!r}, which {reason}"))
            else:
                self.append(extents[i], label, doubtful[i])
        return removed


def _meaning(label: str, reader: LabelReader) -> str:
    """Returns the class number of a label as text; its name if no list has the names of the classes.

    Raises:
        ValueError: It is neither a class number nor a class name.
    """
    if reader.classes is not None:
        number = reader.number(label)
        check_range(number, len(reader.classes))
        return str(number)
    unlisted = class_number(label)
    if unlisted is None:
        require_name(label)
        return label
    if unlisted >= MAX_CLASSES:
        raise ValueError(f"the label is {label!r}; a class number below {MAX_CLASSES:,} is needed")
    return str(unlisted)


def _without_rare_names(location: str, listed: _Listed) -> LeftOut:
    """Removes the few names among class numbers.

    Raises:
        ValueError: Numbers and names are mixed.
    """
    labels = listed.labels
    names = [i for i, label in enumerate(labels) if not label.isdecimal()]
    if not names or len(names) == len(labels):
        return []
    if len(names) <= RARE * len(labels):
        return listed.remove(set(names), "is a name among class numbers")
    number = next(i for i, label in enumerate(labels) if label.isdecimal())
    shown = [f"{labels[i]!r} ({printable(listed.extents.names[i])})" for i in (number, names[0])]
    raise ValueError(
        f"{location}: some labels are class numbers, such as {shown[0]}, and some are names, such as {shown[1]}; "
        "list the names of all classes in the order of their numbers with --class-file"
    )


def _listing(location: str, listed: _Listed, reader: LabelReader) -> Listing:
    if reader.classes is None:
        return labelled(location, listed.extents, listed.labels)
    return Listing(location, listed.extents, array("i", map(int, listed.labels)), reader.classes)


def _in_order(results: Iterable[tuple[SourceTar, Found]], tars: Sequence[SourceTar]) -> Iterator[Found]:
    """Yields the results in the order of the tars, each as soon as possible."""
    waiting: dict[SourceTar, Found] = {}
    remaining = iter(tars)
    tar: SourceTar | None = next(remaining)
    for done, found in results:
        waiting[done] = found
        while tar in waiting:
            yield waiting.pop(tar)
            tar = next(remaining, None)


def _scan(tar: SourceTar, images: Sequence[str], readers: Sequence[LabelReader]) -> tuple[SourceTar, Found]:
    samples: list[tuple[Extent, str, int]] = []
    left_out: LeftOut = []
    modified, binary = tar.modified, set[int]()
    with open(tar.path, "rb") as file:
        entries = list(walk(file, str(tar.origin)))
    whole, joined, rest = _split(entries, images, [reader.extension for reader in readers])
    descriptor = os.open(tar.path, os.O_RDONLY)
    try:
        for sample in itertools.chain(whole, joined):
            image = _image(sample, images)
            reader, label = next((one, found) for one in readers if (found := first_of(sample, (one.extension,))))
            assert image is not None
            name = f"{tar.stem}/{image.name}"
            raw = os.pread(descriptor, label.size, label.offset)
            try:
                _require_one_each(sample, image, label)
                text = reader.text(raw)
            except ValueError as error:
                binary |= {len(raw)} if isinstance(error, BinaryLabelError) else set()
                left_out.append((name, str(error)))
            else:
                samples.append((Extent(name, str(tar.path), image.offset, image.size, modified), text, padded_length(raw)))
    finally:
        os.close(descriptor)
    left_out += [(f"{tar.stem}/{key}", reason) for key, reason in rest]
    return tar, Found(samples, left_out, binary, len(joined))


def _require_one_each(sample: Sample, image: Component, label: Component) -> None:
    """Raises ValueError if the name of the image or of the label occurs twice: the second may belong to another sample."""
    extensions = [component.extension for component in sample]
    for extension in (image.extension, label.extension):
        if extensions.count(extension) > 1:
            raise ValueError(f"the sample has several members that end in .{printable(extension)}")


def _image(sample: Sample, images: Sequence[str]) -> Component | None:
    """Returns the image of a sample; of several images, the one that training reads."""
    return first_of(sample, images) or first_of(sample, _pictures(images))


def _pictures(images: Sequence[str]) -> Sequence[str]:
    """Returns the extensions of what conversion can make an image of."""
    return ALL_EXTENSIONS if tuple(images) == IMAGE_EXTENSIONS else images


def _split(
    entries: Sequence[Entry], images: Sequence[str], labels: Sequence[str]
) -> tuple[list[Sample], list[Sample], LeftOut]:
    """Groups the members of a tar into samples.

    Neighbors with one key are a sample, as for WebDataset. From the members of samples without an image or a label, those with
    one key anywhere in the tar are put together; and then those whose names differ only behind the last dot. Such a sample must
    have exactly one image and one label, so nothing is guessed: beside `1.jpg`, `1.seg.png` and `1.seg.json` are no sample.

    Returns:
        The whole samples; those that were put together; and key and reason of the rest.
    """

    def is_whole(sample: Sample) -> bool:
        return _image(sample, images) is not None and first_of(sample, labels) is not None

    def is_clear(sample: Sample) -> bool:
        extensions = [component.extension.lower() for component in sample]
        counts = [extensions.count(label) for label in labels]
        return sum(map(_pictures(images).__contains__, extensions)) == 1 == next(filter(None, counts), 0)

    groups = group_samples(component for entry in entries if (component := as_component(entry)) is not None)
    whole = [group for group in groups if is_whole(group)]
    by_key = _grouped((part for group in groups if not is_whole(group) for part in group), _key)
    joined = [group for group in by_key if is_clear(group)]
    parts = [part for group in by_key if not is_clear(group) for part in group]
    wanted = {*_pictures(images), *labels}
    plain = {_key(part) for part in parts if part.extension.lower() in wanted}
    dotted = (part for part in parts if _key(part) not in plain)
    last = (Component(part.name.rpartition(".")[2], part.offset, part.size, part.name) for part in dotted)
    by_stem = [group for group in _grouped(last, lambda part: part.name.rpartition(".")[0]) if is_clear(group)]
    used = {part.name for group in by_stem for part in group}
    rest = _grouped((part for part in parts if part.name not in used), _key)
    return whole, [*joined, *by_stem], list(_reasons(rest, entries, images, labels))


def _key(component: Component) -> str:
    return split_name(component.name)[0]


def _grouped(components: Iterable[Component], key: Callable[[Component], str]) -> list[Sample]:
    groups: dict[str, Sample] = {}
    for component in components:
        groups.setdefault(key(component), []).append(component)
    return list(groups.values())


def _reasons(
    samples: Sequence[Sample], entries: Sequence[Entry], images: Sequence[str], labels: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yields key and reason of samples that are not whole, and of links and the like that belong to no sample."""
    others: dict[str, list[Entry]] = {}
    for entry in entries:
        key, extension = split_name(entry.name)
        if entry.other and extension.lower() in (*_pictures(images), *labels):
            others.setdefault(key, []).append(entry)
    for sample in samples:
        key = _key(sample[0])
        links = others.pop(key, [])
        if _image(sample, images) and first_of(sample, labels):
            yield key, "several images or labels with this key lie apart in the tar"
        else:
            yield key, lacks(sample, _pictures(images), labels, others=links)
    for key, links in others.items():
        yield from ((key, f"{short(link.name)} is {link.other}") for link in links if link.other != FOLDER)
