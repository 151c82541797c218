"""Which shards: from what the user typed to tars, their indices, sample counts and class names."""

import collections
import glob
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from braceexpand import UnbalancedBracesError, braceexpand

from pipelines.index import Component, Sample, count_samples, ensure_index, read_index
from pipelines.labels import LabelReader, open_labels

INFO_FILE = "_info.json"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "jp2", "pnm", "ppm", "pgm")


@dataclass(frozen=True)
class ShardSet:
    """The shards of one split.

    Attributes:
        tars: Tar files, in reading order.
        indices: The index file of each.
        num_samples: Over all shards.
        classes: Class names by label, or None where neither an `_info.json` nor a class file lists them.
        label_reader: Finds and reads the label of a sample.
    """

    tars: tuple[Path, ...]
    indices: tuple[Path, ...]
    num_samples: int
    classes: tuple[str, ...] | None
    label_reader: LabelReader = LabelReader()

    def num_classes(self) -> int:
        """The number of classes: that of the class names, or else one more than the largest label in the shards."""
        return len(self.classes) if self.classes is not None else max(self.labels()) + 1

    def labels(self) -> list[int]:
        """The label of each sample, in order, read from the shards (a read of a few bytes a sample).

        Raises:
            ValueError: A sample has no label, or one that is no class; says which.
        """
        labels = []
        for tar, index in zip(self.tars, self.indices, strict=True):
            with open(tar, "rb") as file:
                labels += [read_label(file, sample, tar, self.label_reader) for sample in read_index(index)]
        return labels


def find_component(sample: Sample, extensions: Sequence[str], tar: str | Path) -> Component:
    """The component of a sample that has one of the extensions, in lower or upper case.

    Raises:
        ValueError: There is none; names the tar and the sample.
    """
    for component in sample:
        if component.extension.lower() in extensions:
            return component
    raise ValueError(f"{tar}: the sample of {sample[0].name} has no member that ends in .{' .'.join(extensions)}")


def read_label(file: BinaryIO, sample: Sample, tar: str | Path, reader: LabelReader) -> int:
    """The class number of a sample, from the tar, which is open as `file`.

    Raises:
        ValueError: There is none; names tar, offset and member.
    """
    label = find_component(sample, (reader.extension,), tar)
    file.seek(label.offset)
    return reader.parse(file.read(label.size), f"{tar}:{label.offset}:{label.name}")


def open_shards(pattern: str, split: str, index_dir: str = "", label_key: str = "", class_file: str = "") -> ShardSet:
    """The shards that a glob, a brace pattern or a folder names.

    Args:
        pattern: `shards/train-*.tar`, `shards/train-{000000..000007}.tar`, one tar, or a folder. A folder written by
            `shards convert` holds several splits; the one called like `split` is meant.
        split: "train" or "valid".
        index_dir: Folder whose index files are taken before those beside the tars.
        label_key: See `open_labels`.
        class_file: The same.

    Raises:
        ValueError: Nothing matches, or the folder has no such split, or it has no samples, or an index is not its tar's, or the
            class file is none or not theirs.
    """
    if index_dir and not os.path.isdir(index_dir):
        raise ValueError(f"{index_dir}: no such folder of index files; `shards index SHARDS --index-dir {index_dir}` makes it")
    tars = _tars_in_folder(Path(pattern), split) if os.path.isdir(pattern) else _expand(pattern)
    indices = [ensure_index(tar, index_dir) for tar in tars]
    lengths = [count_samples(index) for index in indices]
    if not any(lengths):
        raise ValueError(f"{pattern!r} names {len(tars)} shards without a single sample")
    label_reader = open_labels(label_key, class_file, read_info(tars[0].parent).get("classes"))
    return ShardSet(
        tars=tuple(itertools.compress(tars, lengths)),  # DALI refuses an index without samples
        indices=tuple(itertools.compress(indices, lengths)),
        num_samples=sum(lengths),
        classes=label_reader.classes,
        label_reader=label_reader,
    )


def read_info(folder: Path) -> dict[str, Any]:
    """The `_info.json` of a folder of shards, or an empty dict where there is none.

    Raises:
        ValueError: The file is not a JSON object.
    """
    path = folder / INFO_FILE
    if not path.exists():
        return {}
    return parse_info(path.read_text(), str(path))


def parse_info(text: str, place: str) -> dict[str, Any]:
    """The content of an `_info.json`.

    Raises:
        ValueError: It is not a JSON object; names `place`.
    """
    try:
        info = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(info, dict):
        raise ValueError(f"{place}: a JSON object is needed, not {type(info).__name__}")
    return info


def listed_tars(folder: Path, split_info: dict[str, Any]) -> list[Path]:
    """The tars of one split of an `_info.json`.

    Raises:
        ValueError: Some of them are not there.
    """
    tars = [folder / name for name in split_info["filenames"]]
    missing = [tar.name for tar in tars if not tar.exists()]
    if missing:
        raise ValueError(f"{folder / INFO_FILE} lists shards that are not there: {', '.join(missing[:5])}")
    return tars


def find_splits(pattern: str) -> dict[str, list[Path]]:
    """The tars that a glob, a brace pattern or a folder names, by split.

    A folder with an `_info.json` has its splits; anything else is one split, called as its first tar is up to its number.

    Raises:
        ValueError: Nothing matches.
    """
    folder = Path(pattern) if os.path.isdir(pattern) else None
    splits = read_info(folder).get("splits") if folder else None
    if folder and splits:
        return {name: listed_tars(folder, split) for name, split in sorted(splits.items())}
    tars = _unlisted_tars(folder) if folder else _expand(pattern)
    return {naming_scheme(tars[0].name)[0].rstrip("-_.") or "shards": tars}


def naming_scheme(tar_name: str) -> tuple[str, int]:
    """What the names of a set of shards share: the part before the number, and the number of its digits."""
    stem = tar_name.removesuffix(".tar")
    prefix = stem.rstrip("0123456789")
    return prefix, len(stem) - len(prefix)


def _unlisted_tars(folder: Path) -> list[Path]:
    """The tars of a folder without an `_info.json`, which have to be one set: train must not be mixed with valid."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"no .tar files in folder {folder}")
    schemes = collections.Counter(naming_scheme(tar.name) for tar in tars)
    if len(schemes) > 1:
        found = ", ".join(f"{prefix}{'#' * digits}.tar ({count})" for (prefix, digits), count in sorted(schemes.items())[:5])
        raise ValueError(
            f"folder {folder} has shards of several naming schemes: {found}; name one, as in '{tars[0].parent}/PREFIX-*.tar'"
        )
    return tars


def _tars_in_folder(folder: Path, split: str) -> list[Path]:
    splits = read_info(folder).get("splits")
    if not splits:
        return _unlisted_tars(folder)
    if split not in splits:
        raise ValueError(
            f"folder {folder} has the splits {', '.join(sorted(splits))} and none called {split!r}; "
            f"name the shards themselves, for example '{folder}/{min(splits)}-*.tar'"
        )
    return listed_tars(folder, splits[split])


def _expand(pattern: str) -> list[Path]:
    if re.match(r"[a-z0-9]+://", pattern):
        raise ValueError(f"{pattern!r}: shards on remote storage are not supported; copy them to a local folder")
    try:
        parts = list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise ValueError(f"{pattern!r}: the braces do not match ({error})") from error
    tars: list[Path] = []
    for part in parts:
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        missing = not found or not os.path.isfile(found[0])
        if missing:
            of = f" (part of {pattern!r})" if part != pattern else ""
            raise ValueError(f"no such shard: {part!r}{of}; looked from {Path.cwd()}")
        tars += [Path(tar) for tar in found]
    return tars
