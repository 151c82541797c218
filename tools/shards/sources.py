"""Where images come from, with their classes."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ClassFolders:
    """A folder with one folder a class; images lie at any depth below their class's folder.

    Attributes:
        folder: The folder of class folders.
        classes: Names of the class folders that hold files, sorted.
        empty: Names of those that hold none.
        files: Path relative to `folder` and class name of each image, sorted by path.
    """

    folder: Path
    classes: tuple[str, ...]
    empty: tuple[str, ...]
    files: tuple[tuple[str, str], ...]


def find_class_folders(folder: Path) -> ClassFolders:
    """Lists a folder of class folders; names that begin with a dot are passed over, links are followed.

    Raises:
        ValueError: There is no such folder, or no class folder with a file in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    files = {name: _files_below(folder, name) for name in names}
    classes = tuple(name for name in names if files[name])
    if not classes:
        raise ValueError(f"{folder}: no images in class folders; SRC/CLASS/IMAGE is the layout needed, with a folder a class")
    return ClassFolders(
        folder=folder,
        classes=classes,
        empty=tuple(name for name in names if not files[name]),
        files=tuple((path, name) for name in classes for path in files[name]),
    )


def _files_below(folder: Path, name: str) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder / name, followlinks=True):
        folders[:] = [child for child in folders if not child.startswith(".")]
        found += [os.path.relpath(os.path.join(parent, file), folder) for file in files if not file.startswith(".")]
    return sorted(found)
