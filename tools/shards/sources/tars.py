"""Images in tars that are not shards: ImageNet's tar of class tars, a tar of class folders, a flat tar with a label file."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipelines.printable import printable
from pipelines.shards.compression import compression_in
from pipelines.shards.walk import FOLDER, Entry, walk
from tools.shards.sources.compressed import SourceTar, is_tar_name
from tools.shards.sources.label_file import LabelFile
from tools.shards.sources.listing import Extent, Extents, Listing, is_image_name, is_system_name, named_classes, require_images


class LabelMembersError(Exception):
    """A tar has `.cls` members, so it is a shard."""


def list_tars(location: str, tars: tuple[SourceTar, ...], labels: LabelFile | None, is_certain: bool = True) -> Listing:
    """Lists the images in tars. A tar within a tar is a class, as in `ILSVRC2012_img_train.tar`.

    Args:
        location: The source as the user named it.
        tars: The tars.
        labels: The classes of the images; `None` if they are in class folders.
        is_certain: Whether these are no shards, although they may have `.cls` members.

    Raises:
        LabelMembersError: Not certain, and there is a `.cls`.
        ValueError: A tar is damaged, or there are no images, or their classes cannot be determined.
    """
    extents, left_out = Extents(unpacked=any(tar.is_unpacked for tar in tars)), list[tuple[str, str]]()
    for tar in tars:
        modified = tar.modified
        prefix = f"{tar.stem}/" if len(tars) > 1 else ""
        for name, offset, size in sorted(_list_members(tar, left_out, is_certain)):
            extents.append(Extent(prefix + name, str(tar.path), offset, size, modified))
    require_images(location, extents, left_out)
    if labels is not None:
        listing = labels.apply(location, extents, left_out)
    else:
        listing = named_classes(location, extents, _class_names(location, extents.names))
    listing.left_out += left_out
    return listing


def first_members(tar: SourceTar, count: int = 20) -> list[str]:
    """Returns the names of the first files in a tar.

    Raises:
        ValueError: The file is not a tar.
    """
    names: list[str] = []
    with open(tar.path, "rb") as file:
        for entry in walk(file, str(tar.origin)):
            names += [] if entry.other else [entry.name]
            if len(names) == count:
                break
    return names


def _list_members(tar: SourceTar, left_out: list[tuple[str, str]], is_certain: bool) -> Iterator[tuple[str, int, int]]:
    """Yields name, offset and size of each image in a tar and in the tars that are its members.

    Appends name and reason of images without bytes of their own to `left_out`.
    """
    with open(tar.path, "rb") as file, open(tar.path, "rb") as inner:
        for name, entry in _files(walk(file, str(tar.origin)), left_out):
            if name.lower().endswith(".cls"):
                if not is_certain:
                    raise LabelMembersError
                continue
            if is_image_name(name):
                yield name, entry.offset, entry.size
                continue
            place = f"{tar.origin}: {printable(entry.name)}"
            inner.seek(entry.offset)
            if kind := compression_in(inner.read(8)):
                raise ValueError(f"{place}: compressed ({kind}); unpack the tars within the tar first")
            inner.seek(entry.offset)
            stem = PurePosixPath(name).stem
            for image, part in _files(walk(inner, place, entry.offset + entry.size), left_out):
                if is_image_name(image):  # tars within tars within tars are not read
                    yield f"{stem}/{image}", part.offset, part.size


def _files(entries: Iterator[Entry], left_out: list[tuple[str, str]]) -> Iterator[tuple[str, Entry]]:
    """Yields images, tars and labels among the members of a tar, with their names in the listing."""
    for entry in entries:
        name = entry.name.removeprefix("./")
        if not (is_image_name(name) or is_tar_name(name) or name.lower().endswith(".cls")) or any(
            map(is_system_name, name.split("/"))
        ):
            continue
        if not entry.other:
            yield name, entry
        elif entry.other != FOLDER:
            left_out.append((name, entry.other))


def _class_names(location: str, names: list[str]) -> list[str]:
    """Returns the class folder of each image: the first folder of its path that differs among the images."""
    depth = 0
    while len({name.split("/", depth + 1)[depth] for name in names}) == 1 and all(
        name.count("/") > depth + 1 for name in names
    ):
        depth += 1
    flat = next((name for name in names if name.count("/") <= depth), None)
    if flat is not None:
        raise ValueError(
            f"{location}: {printable(flat)} is in no class folder, and no member of the tar is a .cls; "
            "give the classes in a file with --labels"
        )
    return [name.split("/", depth + 1)[depth] for name in names]
