"""Reads the images to classify, one at a time: from image files, folders and shards."""

import contextlib
import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from pipelines.location import expand_location, refuse_other_notations
from pipelines.remote.cache import open_cache
from pipelines.remote.object_store import is_url
from pipelines.shards.compression import TAR_ENDINGS
from pipelines.shards.find_tars import INFO_FILE
from pipelines.shards.index import Sample, read_index, split_name
from pipelines.shards.members import IMAGE_EXTENSIONS, image_or_first
from pipelines.shards.shard_set import ShardSet, open_shards, read_label
from tools.shards.sources.folders import list_files
from tools.shards.sources.listing import Extents

CACHE_GIGABYTES = 64.0  # for copies of remote shards, which are deleted at the end


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image and its location.

    Attributes:
        place: Its location: `path`, or `tar` and `key`.
        content: Encoded bytes; empty if they cannot be read.
        label: Class number and name (None if unknown) of a shard's sample, if it has a label.
        problem: Why the image cannot be read; empty if it can.
        warning: Any other problem, such as a bad label; empty if there is none.
    """

    place: dict[str, str]
    content: bytes = b""
    label: tuple[int, str | None] | None = None
    problem: str = ""
    warning: str = ""

    @property
    def name(self) -> str:
        """The location as text."""
        return ":".join(self.place.values())


def open_inputs(
    inputs: Sequence[str], split: str, label_key: str, classes: tuple[str, ...] | None, image_key: str = ""
) -> Iterator[EncodedImage]:
    """Checks all inputs, then reads their images in order.

    Args:
        inputs: Image files, globs and folders of images, and shards as for `open_shards`.
        split: Split to read from a folder of shards that holds several.
        label_key: Key of the labels in `.json`, see `open_shards`.
        classes: Class names by number, for shards without names of their own.
        image_key: Extension of the image in each sample, see `open_shards`.

    Raises:
        ValueError: An input does not exist, or holds no image or sample.
        OSError: A shard cannot be read; raised while reading.
    """
    return itertools.chain.from_iterable([_open_input(location, split, label_key, classes, image_key) for location in inputs])


def _open_input(
    location: str, split: str, label_key: str, classes: tuple[str, ...] | None, image_key: str
) -> Iterable[EncodedImage]:
    location = expand_location(location)
    if not location:
        raise ValueError("the name of an image is empty; name an image, a folder or shards")
    path = Path(location)
    if path.is_dir() and not (path / INFO_FILE).exists():
        if not any(path.glob("*.tar")):
            return _open_folder(location)
        if any(map(_is_image, os.listdir(path))):
            raise ValueError(f"{location}: holds images and tars; name the tars ('{path / '*.tar'}'), or the images, or both")
    if path.is_file() and not path.name.endswith(TAR_ENDINGS):
        return map(_read_file, [location])
    if not path.exists() and not is_url(location):
        refuse_other_notations(location)
        # The shell leaves a quoted pattern to us.
        paths = [match for match in sorted(glob.glob(location, recursive=True)) if not Path(match).is_dir()]
        if paths and not any(match.endswith(".tar") for match in paths):
            return map(_read_file, paths)
        if glob.has_magic(location) and _is_image(location):
            raise ValueError(f"{location}: no such image")
        if not set(location) & set("*?[{"):
            raise ValueError(f"{location}: no such file or folder")
    shards = open_shards(location, split, label_key=label_key, image_key=image_key)
    if shards.classes is None:
        shards = replace(shards, label_reader=replace(shards.label_reader, classes=classes, source="the checkpoint"))
    return _read_shards(shards)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS


def _read_file(path: str) -> EncodedImage:
    try:
        return EncodedImage({"path": path}, Path(path).read_bytes())
    except OSError as error:
        return EncodedImage({"path": path}, problem=f"cannot be read ({error.strerror})")


def _open_folder(folder: str) -> Iterable[EncodedImage]:
    """Lists all images below a folder in the order of `shards convert`: sorted, a folder's own files before its subfolders."""
    extents, left_out = Extents(folder), list[tuple[str, str]]()
    list_files(Path(folder), "", extents, left_out, images_only=True)
    if not extents and not left_out:
        raise ValueError(f"{folder}: no images in this folder, nor shards")
    unusable = [EncodedImage({"path": os.path.join(folder, name)}, problem=reason) for name, reason in left_out]
    return itertools.chain(unusable, (_read_file(os.path.join(folder, name)) for name in extents.names))


def _read_shards(shards: ShardSet) -> Iterator[EncodedImage]:
    """Reads the samples of shards in order. Remote shards are copied to a temporary folder, one shard ahead."""
    with contextlib.ExitStack() as held:
        cache = held.enter_context(open_cache("", CACHE_GIGABYTES)) if shards.is_remote else None
        urls = list(zip(shards.tars, shards.sizes, strict=True))
        for number, (tar, index) in enumerate(zip(shards.tars, shards.indices, strict=True)):
            with contextlib.ExitStack() as copy:
                path = tar
                if cache is not None:
                    [path] = map(str, copy.enter_context(cache.hold([urls[number]])))
                    cache.prefetch(urls[number + 1 : number + 2])
                file = copy.enter_context(open(path, "rb"))
                for sample in read_index(index):
                    yield _read_sample(file, sample, tar, shards)


def _read_sample(file: BinaryIO, sample: Sample, tar: str, shards: ShardSet) -> EncodedImage:
    place = {"tar": tar, "key": split_name(sample[0].name)[0]}
    image, reader = image_or_first(sample, shards.images), shards.label_reader
    if image.extension.lower() not in shards.images:
        return EncodedImage(place, problem=f"no image among its members, .{' .'.join(part.extension for part in sample)}")
    label, warning = None, ""
    if any(part.extension.lower() == reader.extension for part in sample):
        try:
            number = read_label(file, sample, tar, reader)
            label = (number, reader.classes[number] if reader.classes and number < len(reader.classes) else None)
        except ValueError as error:
            warning = f"predicted without its label; {error}"
    file.seek(image.offset)
    content = file.read(image.size)
    if len(content) < image.size:
        raise OSError(f"{tar} ends in the middle of {image.name}; it was cut short: copy or convert it again")
    return EncodedImage(place, content, label, warning=warning)
