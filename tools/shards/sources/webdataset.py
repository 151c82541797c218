"""Images in WebDataset shards: to shuffle and part anew, to resize, to bring a label out of `.json`."""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.index import Component, Sample, scan_tar, split_name
from pipelines.shards import read_info
from tools.shards import parallel
from tools.shards.sources.listing import ALL_EXTENSIONS, Extent, Extents, Listing, labelled

LABEL_EXTENSIONS = ("cls", "json")


@dataclass(frozen=True)
class WebDatasetShards:
    """Tars of samples with an image and a `.cls` (a number or a name) or a `.json` with the label under `label_key`.

    Other members of a sample are passed over.
    """

    location: str
    tars: tuple[Path, ...]
    label_key: str
    num_workers: int

    def listing(self) -> Listing:
        extents, labels = Extents(), list[str]()
        left_out: list[tuple[str, str]] = []
        scan = functools.partial(_scan, label_key=self.label_key)
        results = parallel.run(scan, self.tars, min(self.num_workers, len(self.tars)))
        for found, bad in _in_order(results, self.tars):
            left_out += bad
            for extent, label in found:
                extents.append(extent)
                labels.append(label)
        if not labels:
            raise ValueError(
                f"{self.location}: no sample with an image and a label; {left_out[0] if left_out else 'it is empty'}"
            )
        names = read_info(self.tars[0].parent).get("classes")
        listing = labelled(self.location, extents, labels, names)
        listing.left_out = left_out
        return listing


def _first(left_out: list[tuple[str, str]]) -> str:
    return f"{left_out[0][0]}: {left_out[0][1]}" if left_out else "it is empty"


Found = tuple[list[tuple[Extent, str]], list[tuple[str, str]]]


def _in_order(results: Iterable[tuple[Path, Found]], tars: Sequence[Path]) -> Iterator[Found]:
    """What was found in each tar, in the order of the tars, each as soon as it can be."""
    waiting: dict[Path, Found] = {}
    remaining = iter(tars)
    tar = next(remaining)
    for done, found in results:
        waiting[done] = found
        while tar in waiting:
            yield waiting.pop(tar)
            tar = next(remaining, Path())


def _scan(tar: Path, label_key: str) -> tuple[Path, Found]:
    """The samples of a tar with their labels, and those that lack something, with the reason."""
    samples: list[tuple[Extent, str]] = []
    modified = tar.stat().st_mtime_ns
    left_out: list[tuple[str, str]] = []
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for sample in scan_tar(tar):
            key = f"{tar.stem}/{split_name(sample[0].name)[0]}"
            image, label = _find(sample, ALL_EXTENSIONS), _find(sample, LABEL_EXTENSIONS)
            try:
                if image is None or label is None:
                    raise ValueError("no image in the sample" if image is None else "no .cls or .json in the sample")
                text = parse_label(label, os.pread(descriptor, label.size, label.offset), label_key)
            except ValueError as error:
                left_out.append((key, str(error)))
            else:
                name = f"{key}.{image.extension}"
                samples.append((Extent(name, str(tar), image.offset, image.size, modified), text))
    finally:
        os.close(descriptor)
    return tar, (samples, left_out)


def _find(sample: Sample, extensions: Iterable[str]) -> Component | None:
    """The component with the first of these extensions."""
    by_extension = {component.extension.lower(): component for component in sample}
    return next((by_extension[extension] for extension in extensions if extension in by_extension), None)


def parse_label(component: Component, data: bytes, label_key: str) -> str:
    """The label in a `.cls` or `.json` member.

    Raises:
        ValueError: There is none, or it is neither a number nor a name.
    """
    if component.extension.lower() == "cls":
        label: object = data.decode("utf-8", "replace").strip()
    else:
        try:
            label = json.loads(data)
        except ValueError as error:
            raise ValueError(f"damaged .json ({error})") from error
        for part in label_key.split("."):
            if not isinstance(label, dict) or part not in label:
                raise ValueError(f"no {label_key!r} in .json; --label-key names another")
            label = label[part]
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise ValueError(f"label {label!r} is neither a class number nor a class name")
    return str(label)
