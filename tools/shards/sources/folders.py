"""Images as files: a folder with one folder a class, or a flat one with a label file."""

import os
from dataclasses import dataclass
from pathlib import Path

from tools.shards.sources.label_file import LabelFile
from tools.shards.sources.listing import WHOLE_FILE, Extent, Extents, Listing, is_image_name, named_classes


@dataclass(frozen=True)
class ClassFolders:
    """FOLDER/CLASS/.../IMAGE: images at any depth below their class's folder."""

    folder: Path

    def listing(self) -> Listing:
        require_folder(self.folder)
        entries = _visible(self.folder)
        names = sorted(entry.name for entry in entries if entry.is_dir())
        extents, class_names, empty = Extents(str(self.folder)), [], []
        left_out: list[tuple[str, str]] = []
        for name in names:
            before = len(extents)
            list_files(self.folder, name, extents, left_out)
            class_names += [name] * (len(extents) - before)
            if len(extents) == before:
                empty.append(name)
        if not class_names:
            raise ValueError(
                f"{self.folder}: no images in class folders; SRC/CLASS/IMAGE is the layout needed, with a folder a class, "
                "or else a list of the classes as --labels"
            )
        listing = named_classes(str(self.folder), extents, class_names)
        listing.left_out = left_out
        if len(entries) > len(names):
            listing.notes.append(
                f"{len(entries) - len(names):,} files in {self.folder} that lie in no class folder were passed over"
            )
        if empty:
            listing.notes.append(f"class folders without files were passed over: {', '.join(empty)}")
        return listing


@dataclass(frozen=True)
class LabelledFolder:
    """A folder of images, flat or not, whose classes are in a label file."""

    folder: Path
    labels: LabelFile

    def listing(self) -> Listing:
        require_folder(self.folder)
        extents, left_out = Extents(str(self.folder)), list[tuple[str, str]]()
        list_files(self.folder, "", extents, left_out, images_only=True)
        listing = self.labels.apply(str(self.folder), extents)
        listing.left_out = left_out
        return listing


def require_folder(folder: Path) -> None:
    """Raises ValueError where there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")


def list_files(root: Path, below: str, extents: Extents, left_out: list[tuple[str, str]], images_only: bool = False) -> None:
    """Appends the files below `root/below`, sorted within each folder; names that begin with a dot are passed over."""
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
                left_out.append((name, "link to a file that is not there" if entry.is_symlink() else "not a regular file"))
    for name in folders:
        list_files(root, name, extents, left_out, images_only)


def _visible(folder: Path) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
