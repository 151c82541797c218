"""Which shards: from what the user typed to tars, their indices, sample counts and class names."""

import collections
import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from braceexpand import UnbalancedBracesError, braceexpand

from pipelines.files import replace_bytes, user_cache
from pipelines.remote.object_store import RemoteFile, glob_files, is_url, list_folder, read_text, stat_existing
from pipelines.shards.index import Component, Sample, count_samples, ensure_indices, read_index
from pipelines.shards.labels import LabelReader, open_labels

if TYPE_CHECKING:  # imported where they are used, see `build_loader`
    import numpy as np
    from numpy.typing import NDArray

INFO_FILE = "_info.json"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "jp2", "pnm", "ppm", "pgm")


@dataclass(frozen=True)
class ShardSet:
    """The shards of one split.

    Attributes:
        tars: Tar files, in reading order: local paths, or URLs.
        indices: The index file of each; local ones always.
        lengths: Samples of each; none is 0.
        sizes: Bytes of each tar.
        classes: Class names by label, or None where neither an `_info.json` nor a class file lists them.
        label_reader: Finds and reads the label of a sample.
    """

    tars: tuple[str, ...]
    indices: tuple[Path, ...]
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    classes: tuple[str, ...] | None
    label_reader: LabelReader = LabelReader()

    @property
    def num_samples(self) -> int:
        """Over all shards."""
        return sum(self.lengths)

    @property
    def is_remote(self) -> bool:
        """Whether the tars are URLs."""
        return is_url(self.tars[0])

    def num_classes(self) -> int:
        """The number of classes: that of the class names, or else one more than the largest label in the shards.

        Labels that cannot be read do not count: what becomes of their samples is for the loader to decide.

        Raises:
            ValueError: There is no label that can be read; or the tars are remote, see `labels`.
        """
        if self.classes is not None:
            return len(self.classes)
        count = int(self.label_array().max()) + 1
        if not count:
            self.labels()  # says what is wrong with the first
        return count

    def labels(self) -> list[int]:
        """The label of each sample, in order, read from the shards (a read of a few bytes a sample).

        Raises:
            ValueError: A sample has none, or one that is no class; says which. Or the tars are remote, where each of these
                reads would be a request.
        """
        labels = []
        for label in self._read_labels():
            if isinstance(label, ValueError):
                raise label
            labels.append(label)
        return labels

    def label_array(self) -> "NDArray[np.int32]":
        """The label of each sample, -1 where there is none that can be read: int32 `(num_samples,)`.

        To read them all takes as long as to find that many small pieces of files, so it is done once: they are kept in the
        user's cache folder, as long as tars and indices are what they were.

        Raises:
            ValueError: The tars are remote, see `labels`.
        """
        import numpy as np

        kept = None if self.is_remote else self._kept_labels()
        if kept is not None:
            with contextlib.suppress(OSError, ValueError):  # it is not there, or damaged
                found = np.load(kept, allow_pickle=False)
                if found.dtype == np.int32 and found.shape == (self.num_samples,):
                    return found
        labels = np.array([-1 if isinstance(label, ValueError) else label for label in self._read_labels()], np.int32)
        if kept is not None:
            content = io.BytesIO()
            np.save(content, labels)
            with contextlib.suppress(OSError):  # a full disk costs the next start some seconds, and this one nothing
                replace_bytes(kept, content.getvalue())
        return labels

    def _read_labels(self) -> Iterator[int | ValueError]:
        if self.is_remote:
            raise ValueError(
                f"{self.tars[0]}: the labels of remote shards are not read ahead of training. For the number of classes put an "
                f"{INFO_FILE} with a list of `classes` beside the tars, or name a list with --data.class-file"
            )
        for tar, index in zip(self.tars, self.indices, strict=True):
            with open(tar, "rb") as file:
                for sample in read_index(index):
                    try:
                        yield read_label(file, sample, tar, self.label_reader)
                    except ValueError as error:
                        yield error

    def _kept_labels(self) -> Path | None:
        """Where the labels of these local shards are kept; None where the user has no cache folder to write to."""
        files = [os.path.abspath(str(file)) for file in (*self.tars, *self.indices)]
        states = [f"{file} {now.st_size} {now.st_mtime_ns}" for file, now in zip(files, map(os.stat, files), strict=True)]
        identity = "\n".join([repr(self.label_reader), *states])
        try:
            path = user_cache("labels", f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy")
        except OSError:
            return None
        return path if os.access(path.parent, os.W_OK) else None


def image_or_first(sample: Sample) -> Component:
    """The image of a sample, by which it is called; its first member where it has none."""
    return next((component for component in sample if component.extension.lower() in IMAGE_EXTENSIONS), sample[0])


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
    """The shards that a glob, a brace pattern or a folder names, here or in an object store.

    Args:
        pattern: `shards/train-*.tar`, `shards/train-{000000..000007}.tar`, one tar, or a folder; or the URL of one of these, of
            which a tar ends with `.tar`. A folder written by `shards convert` holds several splits; the one called like
            `split` is meant.
        split: "train" or "valid".
        index_dir: Folder whose index files are taken before those beside the tars.
        label_key: See `open_labels`.
        class_file: The same.

    Raises:
        ValueError: Nothing matches, or the folder has no such split, or it has no samples, or an index is not its tar's, or the
            class file is none or not theirs.
        OSError: The store does not answer as it should.
    """
    if index_dir and not os.path.isdir(index_dir):
        raise ValueError(f"{index_dir}: no such folder of index files; `shards index SHARDS --index-dir {index_dir}` makes it")
    tars: list[Path] | list[RemoteFile]
    if is_url(pattern):
        tars = _find_remote(pattern, split)
        sizes = [tar.size for tar in tars]
        info = _read_remote_info(tars[0].url.rpartition("/")[0])
    else:
        tars = _tars_in_folder(Path(pattern), split) if os.path.isdir(pattern) else _expand(pattern)
        sizes = [tar.stat().st_size for tar in tars]
        info = read_info(tars[0].parent)
    [(name, count)] = collections.Counter(map(str, tars)).most_common(1)
    if count > 1:
        raise ValueError(f"{pattern!r} names {name} twice; each shard is read once an epoch")
    indices = ensure_indices(tars, index_dir)
    lengths = [count_samples(index) for index in indices]
    if not any(lengths):
        raise ValueError(f"{pattern!r} names {len(tars)} shards without a single sample")
    label_reader = open_labels(label_key, class_file, info.get("classes"))
    return ShardSet(
        tars=tuple(map(str, itertools.compress(tars, lengths))),
        indices=tuple(itertools.compress(indices, lengths)),
        lengths=tuple(filter(None, lengths)),
        sizes=tuple(itertools.compress(sizes, lengths)),
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
    _check_complete(str(folder), [tar.name for tar in tars if not tar.exists()])
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
    """The tars of a folder without an `_info.json`."""
    tars = sorted(folder.glob("*.tar"))
    _check_one_set(str(folder), [tar.name for tar in tars])
    return tars


def _tars_in_folder(folder: Path, split: str) -> list[Path]:
    splits = read_info(folder).get("splits")
    return listed_tars(folder, _choose_split(str(folder), splits, split)) if splits else _unlisted_tars(folder)


def _find_remote(pattern: str, split: str) -> list[RemoteFile]:
    parts = _split_braces(pattern)
    if parts == [pattern] and not pattern.endswith(".tar") and not glob.has_magic(pattern):
        return _remote_tars_in_folder(pattern.rstrip("/"), split)
    plain = [part for part in parts if not glob.has_magic(part)]
    there = dict(zip(plain, stat_existing(plain), strict=True))
    tars: list[RemoteFile] = []
    for part in parts:
        tar = there.get(part)
        found = glob_files(part) if part not in there else [tar] if tar else []
        if not found:
            raise ValueError(f"no such shard: {part!r}{f' (part of {pattern!r})' if part != pattern else ''}")
        tars += found
    return tars


def _remote_tars_in_folder(folder: str, split: str) -> list[RemoteFile]:
    files = {file.url.rpartition("/")[2]: file for file in list_folder(folder)}
    splits = _read_remote_info(folder).get("splits") if INFO_FILE in files else None
    if splits:
        names = _choose_split(folder, splits, split)["filenames"]
        _check_complete(folder, [name for name in names if name not in files])
    else:
        names = sorted(name for name in files if name.endswith(".tar"))
        _check_one_set(folder, names)
    return [files[name] for name in names]


def _read_remote_info(folder: str) -> dict[str, Any]:
    place = f"{folder}/{INFO_FILE}"
    try:
        text = read_text(place)
    except (FileNotFoundError, PermissionError):  # S3 denies access to what is not there, where listing is not allowed
        return {}
    return parse_info(text, place)


def _choose_split(folder: str, splits: dict[str, Any], split: str) -> dict[str, Any]:
    if split not in splits:
        raise ValueError(
            f"folder {folder} has the splits {', '.join(sorted(splits))} and none called {split!r}; "
            f"name the shards themselves, for example '{folder}/{min(splits)}-*.tar'"
        )
    found: dict[str, Any] = splits[split]
    return found


def _check_complete(folder: str, missing: list[str]) -> None:
    if missing:
        raise ValueError(f"{folder}/{INFO_FILE} lists shards that are not there: {', '.join(missing[:5])}")


def _check_one_set(folder: str, names: list[str]) -> None:
    """The tars of a folder without an `_info.json` have to be one set: train must not be mixed with valid."""
    if not names:
        raise ValueError(f"no .tar files in folder {folder}")
    schemes = collections.Counter(map(naming_scheme, names))
    if len(schemes) > 1:
        found = ", ".join(f"{prefix}{'#' * digits}.tar ({count})" for (prefix, digits), count in sorted(schemes.items())[:5])
        raise ValueError(
            f"folder {folder} has shards of several naming schemes: {found}; name one, as in '{folder}/PREFIX-*.tar'"
        )


def _split_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise ValueError(f"{pattern!r}: the braces do not match ({error})") from error


def _expand(pattern: str) -> list[Path]:
    if is_url(pattern):
        raise ValueError(f"{pattern!r}: shards on remote storage are for training; copy them to a local folder for this")
    tars: list[Path] = []
    for part in _split_braces(pattern):
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        missing = not found or not os.path.isfile(found[0])
        if missing:
            of = f" (part of {pattern!r})" if part != pattern else ""
            raise ValueError(f"no such shard: {part!r}{of}; looked from {Path.cwd()}")
        tars += [Path(tar) for tar in found]
    return tars
