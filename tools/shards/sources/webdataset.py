"""Images in WebDataset shards: to shuffle or divide them again, to resize images, or to move labels from `.json` to `.cls`."""

import functools
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pipelines.shards.find_tars import read_info
from pipelines.shards.index import Component, Sample, scan_tar, split_name
from pipelines.shards.labels import LabelReader, json_label, open_labels
from pipelines.shards.shard_set import IMAGE_EXTENSIONS
from tools.shards import parallel
from tools.shards.sources.listing import ALL_EXTENSIONS, Extent, Extents, Listing, labelled

LABEL_EXTENSIONS = ("cls", "json")
DEFAULT_KEY = "label"

Found = tuple[list[tuple[Extent, str]], list[tuple[str, str]]]  # samples with their labels; name and reason of the others


def list_webdataset(location: str, tars: tuple[Path, ...], label_key: str | None, class_file: str, num_workers: int) -> Listing:
    """Lists samples with an image and a label. A label is a class number or name in `.cls` or `.json`.

    With `label_key`, labels are read from `.json`. Without it, they are read from `.cls`, or else from `.json`.
    Other members are skipped. Classes are numbered as in the class file, or as in the `_info.json` beside the tars.

    Raises:
        ValueError: A tar is damaged, or there are no samples, or a label is not a class.
    """
    extents, labels = Extents(), list[str]()
    left_out: list[tuple[str, str]] = []
    scan = functools.partial(_scan, label_key=label_key)
    for found, bad in _in_order(parallel.run(scan, tars, min(num_workers, len(tars))), tars):
        left_out += bad
        for extent, label in found:
            extents.append(extent)
            labels.append(label)
    if not labels:
        raise ValueError(f"{location}: no sample with an image and a label; {left_out[0] if left_out else 'it is empty'}")
    reader = open_labels("", class_file, read_info(tars[0].parent).get("classes"))
    numbered = _numbered(location, extents, labels, reader) if reader.classes else None
    listing = numbered or labelled(location, extents, labels)
    listing.left_out = left_out
    return listing


def _numbered(location: str, extents: Extents, labels: Sequence[str], reader: LabelReader) -> Listing:
    """Makes a listing with the classes of the reader, which reads labels as training does.

    Raises:
        ValueError: A label is none of its classes.
    """
    classes, numbers = reader.classes or (), array("i")
    for name, label in zip(extents.names, labels, strict=True):
        number = reader.parse(label.encode("utf-8", "replace"), f"{location}: {name}")
        if number >= len(classes):
            raise ValueError(f"{location}: {name}: class {number} is out of range; there are {len(classes)} classes, from 0 on")
        numbers.append(number)
    return Listing(location, extents, numbers, classes)


def _in_order(results: Iterable[tuple[Path, Found]], tars: Sequence[Path]) -> Iterator[Found]:
    """Yields the results in the order of the tars, each as soon as possible."""
    waiting: dict[Path, Found] = {}
    remaining = iter(tars)
    tar = next(remaining)
    for done, found in results:
        waiting[done] = found
        while tar in waiting:
            yield waiting.pop(tar)
            tar = next(remaining, Path())


def _scan(tar: Path, label_key: str | None) -> tuple[Path, Found]:
    samples: list[tuple[Extent, str]] = []
    modified = tar.stat().st_mtime_ns
    left_out: list[tuple[str, str]] = []
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for sample in scan_tar(tar):
            key = f"{tar.stem}/{split_name(sample[0].name)[0]}"
            # If a sample has several images, choose the one that training reads.
            image = _first(sample, IMAGE_EXTENSIONS) or _first(sample, ALL_EXTENSIONS)
            label = (_first(sample, ("cls",)) if label_key is None else None) or _first(sample, ("json",))
            try:
                if image is None or label is None:
                    lacks_label = f"no {'.cls or ' if label_key is None else ''}.json in the sample"
                    raise ValueError("no image in the sample" if image is None else lacks_label)
                text = _parse_label(label, os.pread(descriptor, label.size, label.offset), label_key or DEFAULT_KEY)
            except ValueError as error:
                left_out.append((key, str(error)))
            else:
                name = f"{key}.{image.extension}"
                samples.append((Extent(name, str(tar), image.offset, image.size, modified), text))
    finally:
        os.close(descriptor)
    return tar, (samples, left_out)


def _first(sample: Sample, extensions: Sequence[str]) -> Component | None:
    """Returns the first component with one of these extensions."""
    return next((component for component in sample if component.extension.lower() in extensions), None)


def _parse_label(component: Component, data: bytes, label_key: str) -> str:
    """Returns the label in a `.cls` or `.json` member.

    Raises:
        ValueError: There is none, or it is neither a number nor a name.
    """
    if component.extension.lower() == "cls":
        label: object = data.decode("utf-8", "replace").strip()
    else:
        try:
            label = json_label(data, label_key)
        except KeyError as error:
            raise ValueError(f"{error.args[0]}; --label-key names another") from error
        if isinstance(label, float) and label.is_integer():
            label = int(label)
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise ValueError(f"label {label!r} is neither a class number nor a class name")
    return str(label)
