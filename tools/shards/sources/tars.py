"""Images in tars that are no shards: ImageNet's tar of class tars, a tar of class folders, a flat tar with a label file."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipelines.shards.index import check_end_mark
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
        extents, left_out = Extents(), list[tuple[str, str]]()
        for tar in self.tars:
            modified = tar.stat().st_mtime_ns
            prefix = f"{tar.stem}/" if len(self.tars) > 1 else ""
            for name, offset, size in sorted(list_members(tar, left_out)):
                extents.append(Extent(prefix + name, str(tar), offset, size, modified))
        if not len(extents):
            raise ValueError(f"{self.location}: no images in it, judging by the names of its members")
        if self.labels is not None:
            listing = self.labels.apply(self.location, extents)
        else:
            listing = named_classes(self.location, extents, _class_names(self.location, extents.names))
        listing.left_out = left_out
        return listing


def list_members(tar_path: Path, left_out: list[tuple[str, str]]) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each image in an uncompressed tar, and in the tars that are its members.

    Args:
        tar_path: The tar.
        left_out: Gets name and reason of images that have no bytes of their own.

    Raises:
        ValueError: It is no tar, or compressed, or damaged, or cut short.
    """
    with open(tar_path, "rb") as file:
        for member in _members(file, tar_path, left_out):
            if member.name.endswith(".tar"):
                file.seek(member.offset_data)
                stem = PurePosixPath(member.name).stem
                for image in _members(file, f"{tar_path}: {member.name}", left_out):
                    yield f"{stem}/{_plain(image.name)}", image.offset_data, image.size
            else:
                yield _plain(member.name), member.offset_data, member.size


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


def _members(file: BinaryIO, place: Path | str, left_out: list[tuple[str, str]]) -> Iterator[tarfile.TarInfo]:
    """The images and tars among the members of the tar that begins where the file stands."""
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all, a kilobyte each
                name = PurePosixPath(member.name).name
                if name.startswith(".") or not (is_image_name(name) or name.endswith(".tar")):
                    continue
                if member.isreg() and not member.issparse():
                    yield member
                elif not member.isdir():
                    left_out.append((_plain(member.name), "a link or a sparse file within the tar, without bytes of its own"))
            end = tar.offset
    # The others are what it lets through from inside a damaged header.
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(f"{place}: {NOT_A_TAR} ({error})") from error
    check_end_mark(file, str(place), end)


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
