"""Images in tars that are not shards: ImageNet's tar of class tars, a tar of class folders, a flat tar with a label file."""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipelines.shards.index import check_end_mark
from tools.shards.sources.label_file import LabelFile
from tools.shards.sources.listing import Extent, Extents, Listing, is_image_name, named_classes

NOT_A_TAR = "not a readable, uncompressed tar; unpack a compressed one"


def list_tars(location: str, tars: tuple[Path, ...], labels: LabelFile | None) -> Listing:
    """Lists the images in tars. A tar within a tar is a class, as in `ILSVRC2012_img_train.tar`.

    Raises:
        ValueError: A tar is damaged or compressed, or there are no images, or their classes cannot be determined.
    """
    extents, left_out = Extents(), list[tuple[str, str]]()
    for tar in tars:
        modified = tar.stat().st_mtime_ns
        prefix = f"{tar.stem}/" if len(tars) > 1 else ""
        for name, offset, size in sorted(_list_members(tar, left_out)):
            extents.append(Extent(prefix + name, str(tar), offset, size, modified))
    if not len(extents):
        raise ValueError(f"{location}: no file in it has the extension of an image")
    if labels is not None:
        listing = labels.apply(location, extents)
    else:
        listing = named_classes(location, extents, _class_names(location, extents.names))
    listing.left_out = left_out
    return listing


def first_members(tar_path: Path, count: int = 20) -> list[str]:
    """Returns the names of the first files in a tar.

    Raises:
        ValueError: The file is not a tar, or it is compressed.
    """
    names: list[str] = []
    try:
        with tarfile.open(tar_path, "r:") as tar:
            while len(names) < count and (member := tar.next()) is not None:
                names += [member.name] if member.isreg() else []
    except tarfile.TarError as error:
        raise ValueError(f"{tar_path}: {NOT_A_TAR} ({error})") from error
    return names


def _list_members(tar_path: Path, left_out: list[tuple[str, str]]) -> Iterator[tuple[str, int, int]]:
    """Yields name, offset and size of each image in a tar and in the tars that are its members."""
    with open(tar_path, "rb") as file:
        for member in _members(file, tar_path, left_out):
            if member.name.endswith(".tar"):
                file.seek(member.offset_data)
                stem = PurePosixPath(member.name).stem
                for image in _members(file, f"{tar_path}: {member.name}", left_out):
                    yield f"{stem}/{_plain(image.name)}", image.offset_data, image.size
            else:
                yield _plain(member.name), member.offset_data, member.size


def _members(file: BinaryIO, place: Path | str, left_out: list[tuple[str, str]]) -> Iterator[tarfile.TarInfo]:
    """Yields the images and tars in the tar that begins at the file's position.

    Appends name and reason of images without bytes of their own to `left_out`.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all, a kilobyte each
                name = PurePosixPath(member.name).name
                if name.startswith(".") or not (is_image_name(name) or name.endswith(".tar")):
                    continue
                if member.isreg() and not member.issparse():
                    yield member
                elif not member.isdir():
                    left_out.append((_plain(member.name), "a link or sparse file in the tar, without bytes of its own"))
            end = tar.offset
    # tarfile lets ValueError and OverflowError of damaged headers through.
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(f"{place}: {NOT_A_TAR} ({error})") from error
    check_end_mark(file, str(place), end)


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _class_names(location: str, names: list[str]) -> list[str]:
    """Returns the class folder of each image: the first folder of its path that differs among the images."""
    depth = 0
    while len({name.split("/", depth + 1)[depth] for name in names}) == 1 and all(
        name.count("/") > depth + 1 for name in names
    ):
        depth += 1
    flat = next((name for name in names if name.count("/") <= depth), None)
    if flat is not None:
        raise ValueError(f"{location}: {flat} is in no class folder; give the classes in a file with --labels")
    return [name.split("/", depth + 1)[depth] for name in names]
