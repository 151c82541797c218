"""Recognizes the kind of a source, and lists its images."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand

from pipelines.shards.index import split_name
from tools.shards.sources.folders import list_class_folders, list_labelled_folder, require_folder
from tools.shards.sources.label_file import LabelFile
from tools.shards.sources.listing import Listing, is_image_name
from tools.shards.sources.parquet import list_parquet
from tools.shards.sources.tars import first_members, list_tars
from tools.shards.sources.webdataset import LABEL_EXTENSIONS, list_webdataset

Kind = Literal["auto", "folders", "tar", "webdataset", "parquet"]


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source. The options of `shards convert` describe the fields."""

    kind: Kind = "auto"
    labels: Path | None = None
    class_names: Path | None = None
    label_key: str | None = None
    image_key: str = "image"
    class_file: str = ""


def list_source(location: str, options: SourceOptions, scratch: Path | None, num_workers: int) -> Listing:
    """Lists the images of a source.

    Args:
        location: A folder, a tar, a Parquet file, or a glob or brace pattern of tars or Parquet files.
        options: How to read the source.
        scratch: Folder for unpacked files, created if needed. Without it, nothing can be unpacked.
        num_workers: Number of processes.

    Raises:
        ValueError: The source does not exist, or its kind is unclear, or it cannot be used.
    """
    if options.class_names is not None and options.labels is None:
        raise ValueError("--class-names needs --labels")
    labels = LabelFile(options.labels, options.class_names) if options.labels is not None else None
    files = _files(location)
    kind = _guess(location, files) if options.kind == "auto" else options.kind
    if labels is not None and kind in ("webdataset", "parquet"):
        raise ValueError(f"{location}: --labels is for folders and tars of images, not for {kind}")
    if options.class_file and kind != "webdataset":
        raise ValueError(f"{location}: --class-file is for WebDataset shards, not for {kind}")
    if kind == "folders":
        return list_class_folders(Path(location)) if labels is None else list_labelled_folder(Path(location), labels)
    if not files:
        raise ValueError(f"{location}: no .tar or .parquet files")
    if kind == "tar":
        return list_tars(location, files, labels)
    _require_one_set(location, files)
    if kind == "webdataset":
        return list_webdataset(location, files, options.label_key, options.class_file, num_workers)
    if scratch is None:
        raise ValueError(f"{location}: Parquet files must be unpacked; name a local folder with --scratch")
    return list_parquet(location, files, options.image_key, options.label_key or "label", scratch, num_workers)


def _files(location: str) -> tuple[Path, ...]:
    """Returns the tars or Parquet files of a location, sorted, or nothing for a folder of other files."""
    if os.path.isdir(location):
        return tuple(sorted(Path(location).glob("*.tar"))) or tuple(sorted(Path(location).glob("*.parquet")))
    parts = [location] if os.path.exists(location) else list(braceexpand(location))
    found = [Path(file) for part in parts for file in (sorted(glob.glob(part)) if glob.has_magic(part) else [part])]
    missing = [file for file in found if not file.is_file()]
    if missing or not found:
        raise ValueError(f"{missing[0] if missing else location}: no such file or folder")
    return tuple(found)


def _require_one_set(location: str, files: tuple[Path, ...]) -> None:
    """Raises ValueError if a folder holds several splits: training must not receive validation images."""
    sets = sorted({re.sub(r"([-_.]?[0-9]+(-of-[0-9]+)?)?$", "", file.stem) for file in files})
    if os.path.isdir(location) and len(sets) > 1:
        shown = ", ".join(f"{name}*" for name in sets[:5])
        example = f"'{location}/{sets[0]}*{files[0].suffix}'"
        raise ValueError(f"{location}: several sets of files ({shown}); name one of them, for example {example}")


def _guess(location: str, files: tuple[Path, ...]) -> Kind:
    if not files:
        require_folder(Path(location))
        return "folders"
    if os.path.isdir(location) and any(child.is_dir() and not child.name.startswith(".") for child in Path(location).iterdir()):
        raise ValueError(f"{location}: has both folders and {files[0].suffix} files; give its kind with --source")
    if files[0].suffix == ".parquet":
        return "parquet"
    if files[0].suffix != ".tar":
        raise ValueError(f"{files[0]}: neither a folder nor a .tar nor a .parquet file")
    members = first_members(files[0])
    extensions = {split_name(name)[1].lower() for name in members}
    # In shards, each image has a label beside it.
    return "webdataset" if extensions & set(LABEL_EXTENSIONS) and any(map(is_image_name, members)) else "tar"
