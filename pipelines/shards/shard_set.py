"""The shards of a split: tars, index files, sample counts, labels and class names."""

import collections
import contextlib
import hashlib
import io
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pipelines.files import replace_bytes, user_cache
from pipelines.location import expand_location
from pipelines.printable import counted
from pipelines.remote.object_store import RemoteFile, is_url
from pipelines.shards.find_tars import INFO_FILE, find_local, find_remote
from pipelines.shards.index import Sample, count_samples, ensure_indices, read_index
from pipelines.shards.labels import LabelReader, open_labels
from pipelines.shards.members import IMAGE_EXTENSIONS, first_of, image_extensions, key_of, read_member, require_members, short

if TYPE_CHECKING:  # the --help of the tools imports this module, and needs no numpy
    import numpy as np
    from numpy.typing import NDArray

LABEL_RULE = 2  # of the labels in the user's cache; raise it when `LabelReader` reads something else


@dataclass(frozen=True)
class ShardSet:
    """The shards of one split.

    Attributes:
        tars: Tars in reading order: local paths, or URLs.
        indices: Index file of each tar; always local.
        lengths: Samples per tar; none is 0.
        sizes: Bytes per tar.
        classes: Class names by label; `None` if neither an `_info.json` nor a class file lists them.
        label_reader: Finds and reads the label of a sample.
        images: Extensions of the image of a sample, in lower case.
    """

    tars: tuple[str, ...]
    indices: tuple[Path, ...]
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    classes: tuple[str, ...] | None
    label_reader: LabelReader = LabelReader()
    images: tuple[str, ...] = IMAGE_EXTENSIONS

    @property
    def num_samples(self) -> int:
        return sum(self.lengths)

    @property
    def is_remote(self) -> bool:
        return is_url(self.tars[0])

    def num_classes(self) -> int:
        """Returns the number of class names or, without names, the largest label plus one.

        Unreadable labels are ignored here; the loader handles their samples.

        Raises:
            ValueError: No label is readable, or the tars are remote; see `labels`.
        """
        if self.classes is not None:
            return len(self.classes)
        count = int(self.label_array().max()) + 1
        if not count:
            self.labels()  # raises the error of the first label
        return count

    def labels(self) -> list[int]:
        """Reads the labels of all samples, in order. Each takes a read of a few bytes.

        Raises:
            ValueError: A sample has no valid label, or the tars are remote, where each read would be a request.
        """
        labels = []
        for file, sample, tar, samples in self._samples():
            require_members(tar, sample, self.images, self.label_reader.extension, samples)
            labels.append(read_label(file, sample, tar, self.label_reader))
        return labels

    def used_classes(self) -> list[int]:
        """Returns the class numbers that occur, ascending; raises like `label_array`."""
        import numpy as np

        return [label for label in np.unique(self.label_array()).tolist() if label >= 0]

    def label_array(self) -> "NDArray[np.int32]":
        """Returns the labels of all samples, int32 `(num_samples,)`; -1 for unreadable ones.

        Reading them takes a small read per sample. The user's cache folder keeps the result until a tar or an index changes.

        Raises:
            ValueError: The tars are remote; see `labels`.
        """
        import numpy as np

        kept = None if self.is_remote else self._kept_labels()
        if kept is not None:
            with contextlib.suppress(OSError, ValueError):  # missing or damaged
                found = np.load(kept, allow_pickle=False)
                if found.dtype == np.int32 and found.shape == (self.num_samples,):
                    return found
        labels = np.full(self.num_samples, -1, np.int32)
        for row, (file, sample, tar, _) in enumerate(self._samples()):
            with contextlib.suppress(ValueError):
                labels[row] = read_label(file, sample, tar, self.label_reader)
        if kept is not None:
            content = io.BytesIO()
            np.save(content, labels)
            with contextlib.suppress(OSError):  # if the disk is full, only the next start takes some seconds longer
                replace_bytes(kept, content.getvalue())
        return labels

    def _samples(self) -> Iterator[tuple[BinaryIO, Sample, str, list[Sample]]]:
        """Yields (open tar, sample, path of the tar, all samples of the tar) for all samples."""
        if self.is_remote:
            raise ValueError(
                f"{self.tars[0]}: labels of remote shards are not read before training. To state the number of classes, put an "
                f"{INFO_FILE} with a list of `classes` beside the tars, or name a list with --data.class-file"
            )
        for tar, index in zip(self.tars, self.indices, strict=True):
            with open(tar, "rb") as file:
                samples = read_index(index)
                for sample in samples:
                    yield file, sample, tar, samples

    def _kept_labels(self) -> Path | None:
        """Returns the cache file for the labels of these local shards; `None` without a writable cache folder."""
        files = [os.path.abspath(str(file)) for file in (*self.tars, *self.indices)]
        states = [f"{file} {now.st_size} {now.st_mtime_ns}" for file, now in zip(files, map(os.stat, files), strict=True)]
        identity = "\n".join([f"{LABEL_RULE} {self.label_reader!r}", *states])
        try:
            path = user_cache("labels", f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy")
        except ValueError:
            return None
        return path if os.access(path.parent, os.W_OK) else None


def read_label(file: BinaryIO, sample: Sample, tar: str | Path, reader: LabelReader) -> int:
    """Reads the class number of a sample from its tar, which is open as `file`.

    Raises:
        ValueError: The label is missing or invalid; the message names tar, offset and member.
    """
    label = first_of(sample, (reader.extension,))
    if label is None:
        raise ValueError(f"{tar}: {short(key_of(sample))}: no .{short(reader.extension)} among its members")
    return reader.parse(read_member(file, label, tar), f"{tar}:{label.offset}:{short(label.name)}")


def open_shards(
    pattern: str, split: str, index_dir: str = "", label_key: str = "", class_file: str = "", image_key: str = ""
) -> ShardSet:
    """Opens the shards that a glob, a brace pattern, a tar or a folder names, local or in an object store.

    Args:
        pattern: `shards/train-*.tar`, `shards/train-{000000..000007}.tar`, one tar, a folder, or the URL of any of these. A
            URL without `.tar` at its end is a folder.
        split: "train" or "valid"; selects the split if a folder has several.
        index_dir: Folder of index files, which take precedence over those beside the tars.
        label_key: See `open_labels`.
        class_file: See `open_labels`.
        image_key: See `image_extensions`.

    Raises:
        ValueError: Nothing matches, the folder lacks the split, there are no samples, an index does not belong to its tar, or
            the class file is invalid.
        OSError: The store cannot be read.
    """
    pattern, index_dir, class_file = map(expand_location, (pattern, index_dir, class_file))
    if index_dir and not os.path.isdir(index_dir):
        raise ValueError(
            f"{index_dir}: no such folder of index files; `shards index SHARDS --index-dir {index_dir}` creates it"
        )
    tars: list[Path] | list[RemoteFile]
    if is_url(pattern):
        tars, info = find_remote(pattern, split)
        sizes = [tar.size for tar in tars]
    else:
        tars, info = find_local(pattern, split)
        sizes = [tar.stat().st_size for tar in tars]
    [(name, count)] = collections.Counter(map(str, tars)).most_common(1)
    if count > 1:
        raise ValueError(f"{pattern!r} names {name} more than once; each shard is read once per epoch")
    indices = ensure_indices(tars, index_dir)
    lengths = [count_samples(index) for index in indices]
    if not any(lengths):
        raise ValueError(f"{pattern!r}: no sample in {counted(len(tars), 'tar')}")
    label_reader = open_labels(label_key, class_file, info.get("classes"))
    return ShardSet(
        tars=tuple(map(str, itertools.compress(tars, lengths))),
        indices=tuple(itertools.compress(indices, lengths)),
        lengths=tuple(filter(None, lengths)),
        sizes=tuple(itertools.compress(sizes, lengths)),
        classes=label_reader.classes,
        label_reader=label_reader,
        images=image_extensions(image_key),
    )
