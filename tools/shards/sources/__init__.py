"""Where images come from, with their classes. README.md says how to add another kind of source."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand

from pipelines.shards.index import split_name
from tools.shards.sources.folders import ClassFolders, LabelledFolder, require_folder
from tools.shards.sources.label_file import LabelFile
from tools.shards.sources.listing import Listing, Source, is_image_name
from tools.shards.sources.parquet import ParquetFiles
from tools.shards.sources.tars import ImageTars, first_members
from tools.shards.sources.webdataset import LABEL_EXTENSIONS, WebDatasetShards

__all__ = ["Kind", "Listing", "Source", "SourceOptions", "open_source"]

Kind = Literal["auto", "folders", "tar", "webdataset", "parquet"]


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source; see the options of `shards convert`."""

    kind: Kind = "auto"
    labels: Path | None = None
    class_names: Path | None = None
    label_key: str | None = None
    image_key: str = "image"
    class_file: str = ""


def open_source(location: str, options: SourceOptions, scratch: Path | None, num_workers: int) -> Source:
    """The source that a path, a glob or a brace pattern names.

    Args:
        location: A folder, a tar, a Parquet file, or a pattern of several tars or Parquet files.
        options: How to read it.
        scratch: Folder for what has to be unpacked; made if it is needed. Without it nothing can be.
        num_workers: Processes to list it with.

    Raises:
        ValueError: There is no such thing, or it is not clear what it is.
    """
    if options.class_names is not None and options.labels is None:
        raise ValueError("--class-names goes with --labels")
    labels = LabelFile(options.labels, options.class_names) if options.labels is not None else None
    files = _files(location)
    kind = _guess(location, files) if options.kind == "auto" else options.kind
    if labels is not None and kind in ("webdataset", "parquet"):
        raise ValueError(f"{location}: --labels is for folders and tars of images; this is {kind}")
    if options.class_file and kind != "webdataset":
        raise ValueError(f"{location}: --class-file is for WebDataset shards; this is {kind}")
    if kind == "folders":
        return ClassFolders(Path(location)) if labels is None else LabelledFolder(Path(location), labels)
    if not files:
        raise ValueError(f"{location}: no .tar or .parquet files")
    if kind != "tar":
        _require_one_set(location, files)
    if kind == "parquet":
        if scratch is None:
            raise ValueError(
                f"{location}: Parquet files are unpacked before they are shuffled; name a folder for it as --scratch"
            )
        return ParquetFiles(location, files, options.image_key, options.label_key or "label", scratch, num_workers)
    if kind == "tar":
        return ImageTars(location, files, labels)
    return WebDatasetShards(location, files, options.label_key, options.class_file, num_workers)


def _files(location: str) -> tuple[Path, ...]:
    """The tars or the Parquet files that a location names, sorted; none for a folder of anything else."""
    if os.path.isdir(location):
        return tuple(sorted(Path(location).glob("*.tar"))) or tuple(sorted(Path(location).glob("*.parquet")))
    parts = [location] if os.path.exists(location) else list(braceexpand(location))
    found = [Path(file) for part in parts for file in (sorted(glob.glob(part)) if glob.has_magic(part) else [part])]
    missing = [file for file in found if not file.is_file()]
    if missing or not found:
        raise ValueError(f"{missing[0] if missing else location}: no such file or folder")
    return tuple(found)


def _require_one_set(location: str, files: tuple[Path, ...]) -> None:
    """Raises ValueError where a folder holds several splits: validation images must not get among those to train on."""
    sets = sorted({re.sub(r"([-_.]?[0-9]+(-of-[0-9]+)?)?$", "", file.stem) for file in files})
    if os.path.isdir(location) and len(sets) > 1:
        shown = ", ".join(f"{name}*" for name in sets[:5])
        raise ValueError(
            f"{location}: several sets of files ({shown}); name one, as in '{location}/{sets[0]}*{files[0].suffix}'"
        )


def _guess(location: str, files: tuple[Path, ...]) -> Kind:
    if not files:
        require_folder(Path(location))
        return "folders"
    if os.path.isdir(location) and any(child.is_dir() and not child.name.startswith(".") for child in Path(location).iterdir()):
        raise ValueError(f"{location}: has both folders and {files[0].suffix} files; say what it is with --source")
    if files[0].suffix == ".parquet":
        return "parquet"
    if files[0].suffix != ".tar":
        raise ValueError(f"{files[0]}: neither a folder nor a .tar nor a .parquet file")
    members = first_members(files[0])
    extensions = {split_name(name)[1].lower() for name in members}
    # A sample of a shard is an image with its label beside it.
    return "webdataset" if extensions & set(LABEL_EXTENSIONS) and any(map(is_image_name, members)) else "tar"
