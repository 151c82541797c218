"""Finds the tars and the `_info.json` that a path, a pattern or a URL names."""

import collections
import glob
import json
import os
from pathlib import Path
from typing import Any

from braceexpand import UnbalancedBracesError, braceexpand

from pipelines.remote.object_store import RemoteFile, glob_files, is_url, list_folder, read_text, stat_existing

INFO_FILE = "_info.json"


def find_local(pattern: str, split: str) -> tuple[list[Path], dict[str, Any]]:
    """Returns the tars of one split and the `_info.json` beside them; raises like `open_shards`."""
    if os.path.isdir(pattern):
        folder, info = Path(pattern), read_info(Path(pattern))
        splits = info.get("splits")
        return _listed_tars(folder, _choose_split(str(folder), splits, split)) if splits else _unlisted_tars(folder), info
    tars = _expand(pattern)
    return tars, read_info(tars[0].parent)


def find_remote(pattern: str, split: str) -> tuple[list[RemoteFile], dict[str, Any]]:
    """Returns the same as `find_local`, for a URL."""
    parts = _split_braces(pattern)
    if parts == [pattern] and not pattern.endswith(".tar") and not glob.has_magic(pattern):
        return _find_in_remote_folder(pattern.rstrip("/"), split)
    plain = [part for part in parts if not glob.has_magic(part)]
    existing = dict(zip(plain, stat_existing(plain), strict=True))
    tars: list[RemoteFile] = []
    for part in parts:
        tar = existing.get(part)
        found = glob_files(part) if part not in existing else [tar] if tar else []
        if not found:
            raise ValueError(f"no such shard: {part!r}{_part_of(pattern, part)}")
        tars += found
    return tars, _read_remote_info(tars[0].url.rpartition("/")[0])


def find_splits(pattern: str) -> dict[str, list[Path]]:
    """Returns the tars that a local glob, brace pattern or folder names, by split.

    A folder with an `_info.json` has the splits that the file lists. Anything else is one split, named after the first tar
    without its number.

    Raises:
        ValueError: Nothing matches.
    """
    folder = Path(pattern) if os.path.isdir(pattern) else None
    splits = read_info(folder).get("splits") if folder else None
    if folder and splits:
        return {name: _listed_tars(folder, split) for name, split in sorted(splits.items())}
    tars = _unlisted_tars(folder) if folder else _expand(pattern)
    return {naming_scheme(tars[0].name)[0].rstrip("-_.") or "shards": tars}


def naming_scheme(tar_name: str) -> tuple[str, int]:
    """Returns a shard's name without its number, and the count of the number's digits. One set of shards shares both."""
    stem = tar_name.removesuffix(".tar")
    prefix = stem.rstrip("0123456789")
    return prefix, len(stem) - len(prefix)


def read_info(folder: Path) -> dict[str, Any]:
    """Reads the `_info.json` of a folder of shards; returns an empty dict if there is none.

    Raises:
        ValueError: The file is not a JSON object.
    """
    path = folder / INFO_FILE
    return parse_info(path.read_text(), str(path)) if path.exists() else {}


def parse_info(text: str, place: str) -> dict[str, Any]:
    """Parses the text of an `_info.json`.

    Raises:
        ValueError: It is not a JSON object; the message begins with `place`.
    """
    try:
        info = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(info, dict):
        raise ValueError(f"{place}: a JSON object is needed, not {type(info).__name__}")
    return info


def _find_in_remote_folder(folder: str, split: str) -> tuple[list[RemoteFile], dict[str, Any]]:
    files = {file.url.rpartition("/")[2]: file for file in list_folder(folder)}
    info = _read_remote_info(folder) if INFO_FILE in files else {}
    splits = info.get("splits")
    if splits:
        names = _choose_split(folder, splits, split)["filenames"]
        _check_complete(folder, [name for name in names if name not in files])
    else:
        names = sorted(name for name in files if name.endswith(".tar"))
        _check_one_set(folder, names)
    return [files[name] for name in names], info


def _read_remote_info(folder: str) -> dict[str, Any]:
    place = f"{folder}/{INFO_FILE}"
    text = read_text(place)
    return {} if text is None else parse_info(text, place)


def _listed_tars(folder: Path, split_info: dict[str, Any]) -> list[Path]:
    tars = [folder / name for name in split_info["filenames"]]
    _check_complete(str(folder), [tar.name for tar in tars if not tar.exists()])
    return tars


def _unlisted_tars(folder: Path) -> list[Path]:
    tars = sorted(folder.glob("*.tar"))
    _check_one_set(str(folder), [tar.name for tar in tars])
    return tars


def _choose_split(folder: str, splits: dict[str, Any], split: str) -> dict[str, Any]:
    if split in splits:
        return dict(splits[split])
    raise ValueError(
        f"folder {folder} has the splits {', '.join(sorted(splits))} and none called {split!r}; "
        f"name the shards themselves, for example '{folder}/{min(splits)}-*.tar'"
    )


def _check_complete(folder: str, missing: list[str]) -> None:
    if missing:
        raise ValueError(f"{folder}/{INFO_FILE} lists shards that are not there: {', '.join(missing[:5])}")


def _check_one_set(folder: str, names: list[str]) -> None:
    """Without an `_info.json` the tars of a folder must be one set, so that train and valid are never mixed."""
    if not names:
        raise ValueError(f"no .tar files in folder {folder}")
    schemes = collections.Counter(map(naming_scheme, names))
    if len(schemes) > 1:
        found = ", ".join(f"{prefix}{'#' * digits}.tar ({count})" for (prefix, digits), count in sorted(schemes.items())[:5])
        raise ValueError(
            f"folder {folder} has shards of several naming schemes: {found}; name one, as in '{folder}/PREFIX-*.tar'"
        )


def _split_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise ValueError(f"{pattern!r}: the braces do not match ({error})") from error


def _expand(pattern: str) -> list[Path]:
    if is_url(pattern):
        raise ValueError(f"{pattern!r}: this command reads local shards only; copy them to a local folder")
    tars: list[Path] = []
    for part in _split_braces(pattern):
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        if not found or not os.path.isfile(found[0]):
            raise ValueError(f"no such shard: {part!r}{_part_of(pattern, part)}; looked from {Path.cwd()}")
        tars += [Path(tar) for tar in found]
    return tars


def _part_of(pattern: str, part: str) -> str:
    return f" (part of {pattern!r})" if part != pattern else ""
