"""Images as files: a folder with one folder per class, or a folder with a label file."""

import os
from pathlib import Path

from tools.shards.sources.label_file import LabelFile
from tools.shards.sources.listing import WHOLE_FILE, Extent, Extents, Listing, is_image_name, named_classes


def list_class_folders(folder: Path) -> Listing:
    """Lists FOLDER/CLASS/.../IMAGE: images at any depth below the folder of their class.

    Raises:
        ValueError: There is no such folder, or it has no images in class folders.
    """
    require_folder(folder)
    entries = _visible(folder)
    names = sorted(entry.name for entry in entries if entry.is_dir())
    extents, class_names, empty = Extents(str(folder)), [], []
    left_out: list[tuple[str, str]] = []
    for name in names:
        before = len(extents)
        list_files(folder, name, extents, left_out)
        class_names += [name] * (len(extents) - before)
        if len(extents) == before:
            empty.append(name)
    if not class_names:
        raise ValueError(
            f"{folder}: no images in class folders; use the layout SRC/CLASS/IMAGE, or give the classes with --labels"
        )
    listing = named_classes(str(folder), extents, class_names)
    listing.left_out = left_out
    if len(entries) > len(names):
        listing.notes.append(f"skipped {len(entries) - len(names):,} files in {folder} that are in no class folder")
    if empty:
        listing.notes.append(f"skipped empty class folders: {', '.join(empty)}")
    return listing


def list_labelled_folder(folder: Path, labels: LabelFile) -> Listing:
    """Lists the images at any depth of a folder, with their classes from a label file.

    Raises:
        ValueError: There is no such folder, or the label file cannot be used with it.
    """
    require_folder(folder)
    extents, left_out = Extents(str(folder)), list[tuple[str, str]]()
    list_files(folder, "", extents, left_out, images_only=True)
    listing = labels.apply(str(folder), extents)
    listing.left_out = left_out
    return listing


def require_folder(folder: Path) -> None:
    """Raises ValueError if there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")


def list_files(root: Path, below: str, extents: Extents, left_out: list[tuple[str, str]], images_only: bool = False) -> None:
    """Appends the files below `root/below` to `extents`, and name and reason of unusable ones to `left_out`.

    The files of each folder are sorted and come before its folders. Names that begin with a dot are skipped.
    """
    folders = []
    try:
        entries = sorted(_visible(root / below), key=lambda entry: entry.name)
    except PermissionError as error:
        left_out.append((below, f"folder cannot be read ({error.strerror})"))
        return
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            folders.append(name)
        elif not images_only or is_image_name(name):
            if entry.is_file():
                status = entry.stat()
                extents.append(Extent(name, entry.path, WHOLE_FILE, status.st_size, status.st_mtime_ns))
            else:
                left_out.append((name, "broken symbolic link" if entry.is_symlink() else "not a regular file"))
    for name in folders:
        list_files(root, name, extents, left_out, images_only)


def _visible(folder: Path) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
