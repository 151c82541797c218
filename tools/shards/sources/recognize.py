"""Recognizes the kind of a source, and lists its images."""

import glob
import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from braceexpand import UnbalancedBracesError, braceexpand

from pipelines.printable import printable
from pipelines.shards.compression import TAR_ENDINGS
from tools.shards.sources.compressed import SourceTar, is_tar_name, open_source_tars
from tools.shards.sources.folders import is_folder, list_class_folders, list_labelled_folder, require_folder, visible_entries
from tools.shards.sources.label_file import LabelFile
from tools.shards.sources.listing import Listing, is_image_name
from tools.shards.sources.parquet import list_parquet
from tools.shards.sources.splits import ENDINGS, sets_of_files
from tools.shards.sources.tars import LabelMembersError, first_members, list_tars
from tools.shards.sources.webdataset import LABEL_EXTENSIONS, list_webdataset

Kind = Literal["auto", "folders", "tar", "webdataset", "parquet"]
KINDS = {
    "folders": "folders of images",
    "tar": "tars of images",
    "webdataset": "WebDataset shards",
    "parquet": "Parquet files",
}


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source. The options of `shards convert` describe the fields."""

    kind: Kind = "auto"
    labels: Path | None = None
    class_names: Path | None = None
    label_key: str | None = None
    image_key: str | None = None
    class_file: str = ""

    def record(self) -> dict[str, str]:
        """Returns the options that are not the default, by name as on the command line. A file counts with its content."""
        files = {"labels": self.labels, "class-names": self.class_names, "class-file": self.class_file}
        values = {"source": self.kind, "label-key": self.label_key, "image-key": self.image_key}
        defaults = {"source": "auto", "image-key": "image"}
        given = {name: value for name, value in values.items() if value and value != defaults.get(name)}
        return given | {name: _name_and_digest(Path(file)) for name, file in files.items() if file}


def _name_and_digest(file: Path) -> str:
    is_regular = file.is_file()  # a pipe can be read only once
    return f"{file.name} ({hashlib.sha256(file.read_bytes()).hexdigest()[:8]})" if is_regular else file.name


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
    tars = open_source_tars(files, scratch, num_workers) if kind in ("tar", "webdataset") else ()
    if options.kind == "auto" and kind == "tar":
        kind = _guess_tar(tars[0], options)
    _refuse_other_options(location, kind, options)
    if kind == "folders":
        return list_class_folders(Path(location)) if labels is None else list_labelled_folder(Path(location), labels)
    if not files:
        needed = ".parquet" if kind == "parquet" else ".tar"
        raise ValueError(f"{location}: has no {needed} files, which --source {kind} reads")
    if kind == "tar":
        try:
            return list_tars(location, tars, labels, is_certain=options.kind == "tar" or labels is not None)
        except LabelMembersError:
            kind = "webdataset"
    _require_one_set(location)
    if kind == "webdataset":
        return list_webdataset(location, tars, options.image_key, options.label_key, options.class_file, num_workers)
    if scratch is None:
        raise ValueError(f"{location}: Parquet files must be unpacked; name a local folder with --scratch")
    return list_parquet(location, files, options.image_key or "image", options.label_key or "label", scratch, num_workers)


def _refuse_other_options(location: str, kind: Kind, options: SourceOptions) -> None:
    """Raises ValueError for an option that means nothing for a kind of source."""
    for option, value, kinds in (
        ("labels", options.labels, ("folders", "tar")),
        ("class-file", options.class_file, ("webdataset",)),
        ("label-key", options.label_key, ("webdataset", "parquet")),
        ("image-key", options.image_key, ("webdataset", "parquet")),
    ):
        if value and kind not in kinds:
            wanted = " and ".join(KINDS[name] for name in kinds)
            raise ValueError(f"{location}: --{option} is for {wanted}, not for {KINDS[kind]}")


def _files(location: str) -> tuple[Path, ...]:
    """Returns the tars or Parquet files of a location, sorted, or nothing for a folder of other files."""
    if os.path.isdir(location):
        require_folder(Path(location))
        names = [entry.name for entry in visible_entries(Path(location)) if not is_folder(entry)]
        found = [sorted(Path(location) / name for name in names if name.endswith(ending)) for ending in ENDINGS]
        files = next(filter(None, found), [])
    else:
        try:
            parts = [location] if os.path.exists(location) else list(braceexpand(location))
        except UnbalancedBracesError as error:
            raise ValueError(f"{location}: the braces do not match") from error
        files = [Path(file) for part in parts for file in (sorted(glob.glob(part)) if glob.has_magic(part) else [part])]
        if not files:
            raise ValueError(f"{location}: no such file or folder")
    if bad := next((file for file in files if not file.is_file()), None):
        gone = "a broken symbolic link" if bad.is_symlink() else "no such file or folder"
        raise ValueError(f"{bad}: {'not a regular file' if bad.exists() else gone}")
    return tuple(files)


def _require_one_set(location: str) -> None:
    """Raises ValueError if a folder holds several splits: training must not receive validation images."""
    sets = sets_of_files(location)
    if len(sets) > 1:
        shown = printable(", ".join(f"{name}*" for name in list(sets)[:5]))
        example = shlex.quote(next(iter(sets.values())))
        raise ValueError(f"{location}: several sets of files ({shown}); name one of them, for example {example}")


def _guess(location: str, files: tuple[Path, ...]) -> Kind:
    if not files:
        return "folders"
    if os.path.isdir(location) and any(map(is_folder, visible_entries(Path(location)))):
        raise ValueError(f"{location}: has both folders and {files[0].suffix} files; give its kind with --source")
    if files[0].suffix == ".parquet":
        return "parquet"
    if not is_tar_name(files[0].name):
        raise ValueError(f"{files[0]}: neither a folder nor a tar ({' '.join(TAR_ENDINGS)}) nor a .parquet file")
    return "tar"


def _guess_tar(tar: SourceTar, options: SourceOptions) -> Kind:
    """Tells shards from other tars: each image has a label beside it, or an option is for shards only."""
    if options.labels is None and (options.label_key or options.image_key or options.class_file):
        return "webdataset"
    members = first_members(tar)
    extensions = {name.rpartition(".")[2].lower() for name in members}
    return "webdataset" if extensions & set(LABEL_EXTENSIONS) and any(map(is_image_name, members)) else "tar"
