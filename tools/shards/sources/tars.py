"""Images in tars that are no shards: ImageNet's tar of class tars, a tar of class folders, a flat tar with a label file."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tools.shards.sources.label_file import LabelFile
from tools.shards.sources.listing import Extent, Extents, Listing, is_image_name, named_classes

NOT_A_TAR = "not a readable, uncompressed tar; unpack a compressed one"


@dataclass(frozen=True)
class ImageTars:
    """Tars of images, read where they lie. A tar within a tar is a class, as in `ILSVRC2012_img_train.tar`."""

    location: str
    tars: tuple[Path, ...]
    labels: LabelFile | None

    def listing(self) -> Listing:
        extents = Extents()
        for tar in self.tars:
            modified = tar.stat().st_mtime_ns
            prefix = f"{tar.stem}/" if len(self.tars) > 1 else ""
            for name, offset, size in sorted(list_members(tar)):
                extents.append(Extent(prefix + name, str(tar), offset, size), modified)
        if not len(extents):
            raise ValueError(f"{self.location}: no images in it, judging by the names of its members")
        if self.labels is not None:
            return self.labels.apply(self.location, extents)
        return named_classes(self.location, extents, _class_names(self.location, extents.names))


def list_members(tar_path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each image in an uncompressed tar, and in the tars that are its members.

    Raises:
        ValueError: It is no tar, or compressed, or cut short.
    """
    try:
        with open(tar_path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = os.fstat(file.fileno()).st_size
            for member in _members(tar, end):
                if member.name.endswith(".tar"):
                    file.seek(member.offset_data)
                    stem = PurePosixPath(member.name).stem
                    with tarfile.open(fileobj=file, mode="r:") as inner:
                        for image in _members(inner, member.offset_data + member.size):
                            yield f"{stem}/{_plain(image.name)}", image.offset_data, image.size
                else:
                    yield _plain(member.name), member.offset_data, member.size
    except tarfile.TarError as error:
        raise ValueError(f"{tar_path}: {NOT_A_TAR} ({error})") from error


def first_members(tar_path: Path, count: int = 20) -> list[str]:
    """The names of the first files in a tar.

    Raises:
        ValueError: It is no tar, or compressed.
    """
    names: list[str] = []
    try:
        with tarfile.open(tar_path, "r:") as tar:
            while len(names) < count and (member := tar.next()) is not None:
                names += [member.name] if member.isreg() else []
    except tarfile.TarError as error:
        raise ValueError(f"{tar_path}: {NOT_A_TAR} ({error})") from error
    return names


def _members(tar: tarfile.TarFile, end: int) -> Iterator[tarfile.TarInfo]:
    """The images and tars among the members; `tarfile` would keep all of them, a kilobyte each."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # not in its annotations
        if member.offset_data + member.size > end:
            raise tarfile.ReadError(f"cut short within {member.name}")
        hidden = PurePosixPath(member.name).name.startswith(".")
        if member.isreg() and not hidden and (is_image_name(member.name) or member.name.endswith(".tar")):
            yield member


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _class_names(location: str, names: list[str]) -> list[str]:
    """The folder that holds each class: the first one in which the names differ."""
    depth = 0
    while len({name.split("/", depth + 1)[depth] for name in names}) == 1 and all(
        name.count("/") > depth + 1 for name in names
    ):
        depth += 1
    if any(name.count("/") <= depth for name in names):
        flat = next(name for name in names if name.count("/") <= depth)
        raise ValueError(f"{location}: {flat} lies in no class folder; give the classes in a file, as --labels")
    return [name.split("/", depth + 1)[depth] for name in names]
