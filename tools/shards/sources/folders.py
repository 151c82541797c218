"""Images as files: a folder with one folder per class, or a folder with a label file."""

import collections
import errno
import os
from pathlib import Path

from pipelines.printable import counted, printable
from tools.shards.sources.label_file import LabelFile
from tools.shards.sources.listing import (
    WHOLE_FILE,
    Extent,
    Extents,
    Listing,
    begins_like_image,
    is_image_name,
    is_system_name,
    named_classes,
    require_images,
)

NAMES_SHOWN = 10
HEADER_BYTES = 1 << 20
# One entry of a folder has such an error, and not the storage.
ENTRY_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def list_class_folders(folder: Path) -> Listing:
    """Lists FOLDER/CLASS/.../IMAGE: images at any depth below the folder of their class.

    A folder without a file that begins like an image is no class, and its files are left out.

    Raises:
        ValueError: There is no such folder, or it has no images in class folders.
    """
    require_folder(folder)
    entries = visible_entries(folder)
    names = sorted(entry.name for entry in entries if is_folder(entry))
    extents, class_names, without = Extents(str(folder)), [], []
    left_out: list[tuple[str, str]] = []
    for name in names:
        before = len(extents)
        list_files(folder, name, extents, left_out)
        reasons = _why_none_is_image(extents, before)
        if reasons is None:
            class_names += [name] * (len(extents) - before)
        else:
            left_out += zip(extents.names[before:], reasons, strict=True)
            extents.cut(before)
            without.append(name)
    if not class_names:
        raise ValueError(f"{folder}: {_why_no_images(folder, names, left_out)}")
    listing = named_classes(str(folder), extents, class_names)
    listing.left_out = left_out
    if len(entries) > len(names):
        number = len(entries) - len(names)
        are = "is" if number == 1 else "are"
        listing.notes.append(f"skipped {counted(number, 'file')} in {folder} that {are} in no class folder")
    if len(listing.classes) == 1 and len({name.split("/", 2)[1] for name in extents.names if name.count("/") > 1}) > 1:
        only = printable(listing.classes[0])
        listing.notes.append(f"the only class is {only}; if the classes are the folders in it, convert {folder}/{only}")
    if without:
        shown = ", ".join(map(printable, without[:NAMES_SHOWN])) + (", ..." if len(without) > NAMES_SHOWN else "")
        listing.notes.append(f"skipped {counted(len(without), 'class folder')} without images: {shown}")
    return listing


def _why_none_is_image(extents: Extents, first: int) -> list[str] | None:
    """Returns why none of the files from place `first` on is an image, or None if one is, as far as its header tells."""
    places = range(first, len(extents))
    if any(begins_like_image(extents[i]) for i in places):
        return None
    if not places:
        return []
    from pipelines.bad_samples.kinds import EMPTY_FILE, NOT_AN_IMAGE  # slow to import, as is the next one
    from tools.shards.check import ImageCheck

    check, reasons = ImageCheck("structure"), []
    for i in places:
        with open(extents[i].path, "rb") as file:  # it was readable above
            [verdict] = check([file.read(HEADER_BYTES)])
        if verdict.reason not in (EMPTY_FILE, NOT_AN_IMAGE):
            return None
        reasons.append(verdict.reason)
    return reasons


def _why_no_images(folder: Path, names: list[str], left_out: list[tuple[str, str]]) -> str:
    """Returns what is wrong with class folders of which none has an image."""
    for name in names:
        for suffix in (".tar", ".parquet"):
            if any(file.endswith(suffix) and file.startswith(f"{name}/") for file, _ in left_out):
                return f"no images, but {suffix} files in {printable(name)}; convert {folder / printable(name)}"
    layout = "use the layout SRC/CLASS/IMAGE, or give the classes with --labels"
    if not left_out:
        return f"no images in class folders; {layout}"
    reasons = collections.Counter(reason for _, reason in left_out)
    counts = "; ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
    return f"training can decode none of its {len(left_out):,} files ({counts}); {layout}"


def list_labelled_folder(folder: Path, labels: LabelFile) -> Listing:
    """Lists the images at any depth of a folder, with their classes from a label file.

    Raises:
        ValueError: There is no such folder, or the label file cannot be used with it.
    """
    require_folder(folder)
    extents, left_out = Extents(str(folder)), list[tuple[str, str]]()
    list_files(folder, "", extents, left_out, images_only=True)
    require_images(str(folder), extents, left_out)
    listing = labels.apply(str(folder), extents, left_out)
    listing.left_out = left_out
    return listing


def require_folder(folder: Path) -> None:
    """Raises ValueError if this is not a folder, or if it cannot be read."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror})") from error


def list_files(root: Path, below: str, extents: Extents, left_out: list[tuple[str, str]], images_only: bool = False) -> None:
    """Appends the files below `root/below` to `extents`, and name and reason of unusable ones to `left_out`.

    The files of each folder are sorted and come before its folders. What `is_system_name` tells is skipped. Links to folders
    are followed, except to one that contains them.

    Raises:
        OSError: The storage failed.
    """
    start = (os.path.realpath(root),)
    pending = [(below, _folders_on_path(root / below, start) if below else start)]
    while pending:
        name, above = pending.pop()
        if not above:
            left_out.append((name, "a link to a folder that contains it"))
            continue
        folders = []
        try:
            entries = sorted(visible_entries(root / name), key=lambda entry: entry.name)
        except OSError as error:
            left_out.append((name, f"folder cannot be read ({_of_entry(error).strerror})"))
            continue
        for entry in entries:
            path = f"{name}/{entry.name}" if name else entry.name
            try:
                if entry.is_dir():
                    folders.append((path, _folders_on_path(Path(entry.path), above)))
                elif not images_only or is_image_name(path):
                    _append_file(entry, path, extents, left_out)
            except OSError as error:
                left_out.append((path, f"cannot be read ({_of_entry(error).strerror})"))
        pending += reversed(folders)


def _folders_on_path(folder: Path, above: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the real paths of a folder and of the folders in which the links on the way to it lie.

    Args:
        folder: The folder.
        above: The same of the folder in which it lies.

    Returns:
        The paths, the own one last. The tuple is empty if the folder is a link to one that contains the link.
    """
    if not folder.is_symlink():
        return (*above[:-1], f"{above[-1]}/{folder.name}")
    real = os.path.realpath(folder)
    if any(f"{path}/".startswith(f"{real.rstrip('/')}/") for path in above):
        return ()
    return (*above, real)


def _append_file(entry: "os.DirEntry[str]", name: str, extents: Extents, left_out: list[tuple[str, str]]) -> None:
    if entry.is_file():
        status = entry.stat()
        extents.append(Extent(name, entry.path, WHOLE_FILE, status.st_size, status.st_mtime_ns))
    else:
        left_out.append((name, "broken symbolic link" if entry.is_symlink() else "not a regular file"))


def _of_entry(error: OSError) -> OSError:
    """Returns an error that concerns one entry of a folder, and raises any other."""
    if error.errno not in ENTRY_ERRORS:
        raise error
    return error


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Returns whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed
        return False


def visible_entries(folder: Path) -> list["os.DirEntry[str]"]:
    """Returns the entries of a folder without those of systems and tools."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not is_system_name(entry.name)]
