"""What is to be predicted: image files, folders of them and shards, read one image after the other."""

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

from pipelines.remote.cache import open_cache
from pipelines.remote.object_store import is_url
from pipelines.shards.index import Sample, read_index, split_name
from pipelines.shards.shard_set import IMAGE_EXTENSIONS, INFO_FILE, ShardSet, image_or_first, open_shards, read_label
from tools.shards.sources.folders import list_files
from tools.shards.sources.listing import Extents

CACHE_GIGABYTES = 64.0  # of copies of remote shards, which are deleted at the end


@dataclass(frozen=True)
class Label:
    """What a shard says about a sample: the number of its class, and the class's name where that is known."""

    number: int
    name: str | None


@dataclass(frozen=True)
class Encoded:
    """An image as it is stored.

    Attributes:
        place: Where it is: `path`, or `tar` and `key`.
        content: The bytes of its file; nothing, where they cannot be had.
        label: Of a sample of a shard that has one.
        problem: Why the bytes cannot be had, or else empty.
        note: What else is wrong with it, or empty.
    """

    place: dict[str, str]
    content: bytes = b""
    label: Label | None = None
    problem: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """The place, for people."""
        return ":".join(self.place.values())


class Source(Protocol):
    """Images in an order."""

    def read(self) -> Iterator[Encoded]: ...


@dataclass(frozen=True)
class ImageFiles:
    """Files that are images, whatever their names."""

    paths: Sequence[str]

    def read(self) -> Iterator[Encoded]:
        return map(_read_file, self.paths)


@dataclass(frozen=True)
class ImageFolder:
    """All images below a folder, in the order of `shards convert`: sorted, a folder's own files before its folders."""

    folder: str
    extents: Extents
    left_out: Sequence[tuple[str, str]]

    def read(self) -> Iterator[Encoded]:
        for name, reason in self.left_out:
            yield Encoded({"path": os.path.join(self.folder, name)}, problem=reason)
        for name in self.extents.names:
            yield _read_file(os.path.join(self.folder, name))


@dataclass(frozen=True)
class Shards:
    """The samples of shards, in their order; remote ones are copied to a temporary folder on the way."""

    shards: ShardSet

    def read(self) -> Iterator[Encoded]:
        shards = self.shards
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
                        yield self._read_sample(file, tar, sample)

    def _read_sample(self, file: BinaryIO, tar: str, sample: Sample) -> Encoded:
        place = {"tar": tar, "key": split_name(sample[0].name)[0]}
        image, reader = image_or_first(sample), self.shards.label_reader
        if image.extension.lower() not in IMAGE_EXTENSIONS:
            return Encoded(place, problem=f"no image among its members, .{' .'.join(part.extension for part in sample)}")
        label, note = None, ""
        if any(part.extension.lower() == reader.extension for part in sample):
            try:
                number = read_label(file, sample, tar, reader)
                label = Label(number, reader.classes[number] if reader.classes and number < len(reader.classes) else None)
            except ValueError as error:
                note = f"predicted, but without its label; {error}"
        file.seek(image.offset)
        content = file.read(image.size)
        if len(content) < image.size:
            raise OSError(f"{tar} ends in the middle of {image.name}; it was cut short: copy or convert it again")
        return Encoded(place, content, label, note=note)


def open_inputs(inputs: Sequence[str], split: str, label_key: str, classes: tuple[str, ...] | None) -> list[Source]:
    """What the command line names, in its order.

    Args:
        inputs: Image files and patterns for them, folders of images, and shards as for `open_shards`.
        split: Which, of a folder of shards with several.
        label_key: See `open_shards`.
        classes: Names of classes by number, where shards have none of their own.

    Raises:
        ValueError: One of them is not there, or has no image or no sample.
    """
    return [_open_input(location, split, label_key, classes) for location in inputs]


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS


def _open_input(location: str, split: str, label_key: str, classes: tuple[str, ...] | None) -> Source:
    path = Path(location)
    has_tars = path.is_dir() and any(path.glob("*.tar"))
    if has_tars and not (path / INFO_FILE).exists() and any(map(_is_image, os.listdir(path))):
        raise ValueError(f"{location}: holds images and tars; name the tars ('{path / '*.tar'}'), or the images, or both")
    if path.is_dir() and not (path / INFO_FILE).exists() and not has_tars:
        extents, left_out = Extents(location), list[tuple[str, str]]()
        list_files(path, "", extents, left_out, images_only=True)
        if not extents and not left_out:
            raise ValueError(f"{location}: no images in this folder, nor shards")
        return ImageFolder(location, extents, left_out)
    if path.is_file() and path.suffix != ".tar":
        return ImageFiles([location])
    if not path.exists() and not is_url(location):
        # A pattern that the shell has left as it is.
        paths = [match for match in sorted(glob.glob(location, recursive=True)) if not Path(match).is_dir()]
        if paths and not any(match.endswith(".tar") for match in paths):
            return ImageFiles(paths)
        if glob.has_magic(location) and _is_image(location):
            raise ValueError(f"{location}: no such image")
        if not set(location) & set("*?[{"):
            raise ValueError(f"{location}: no such file or folder")
    shards = open_shards(location, split, label_key=label_key)
    if shards.classes is None:
        shards = replace(shards, label_reader=replace(shards.label_reader, classes=classes))
    return Shards(shards)


def _read_file(path: str) -> Encoded:
    try:
        return Encoded({"path": path}, Path(path).read_bytes())
    except OSError as error:
        return Encoded({"path": path}, problem=f"cannot be read ({error.strerror})")
