"""Finds the tars and the `_info.json` that a path, a pattern or a URL names."""

import collections
import fnmatch
import glob
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from braceexpand import UnbalancedBracesError, braceexpand

from pipelines.json_file import as_object, get, parse_json, read_limited
from pipelines.location import expand_location, refuse_other_notations
from pipelines.printable import printable
from pipelines.remote.object_store import RemoteFile, glob_files, is_url, list_folder, read_existing, stat_existing
from pipelines.shards.compression import TAR_ENDINGS, compressed, compression_of

INFO_FILE = "_info.json"
MOST_MISSING = 5  # names in a message
# What people and other tools call the splits.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "valid": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}


def find_local(pattern: str, split: str) -> tuple[list[Path], dict[str, Any]]:
    """Returns the tars of one split and the `_info.json` beside them; raises like `open_shards`."""
    if os.path.isdir(pattern):
        folder, info = Path(pattern), read_info(Path(pattern))
        splits = info.get("splits")
        if not splits:
            return _unlisted_tars(folder), info
        chosen = _choose_split(str(folder), splits, split, lambda: [path.name for path in folder.glob("*.tar")])
        return _listed_tars(folder, chosen), info
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
    pattern = expand_location(pattern)
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
        ValueError: The file cannot be used; see `parse_info`.
    """
    path = folder / INFO_FILE
    return parse_info(read_limited(path), str(path)) if path.exists() else {}


def parse_info(content: bytes, place: str) -> dict[str, Any]:
    """Parses the content of an `_info.json`, in which each split has `filenames`. Unknown keys are kept, null means no key.

    Raises:
        ValueError: It is not JSON, or a known key has a value that cannot be used; the message begins with `place`.
    """
    info = _without_nulls(as_object(parse_json(content, place), place))
    get(info, "classes", "a list of texts", place, default=None)
    splits = get(info, "splits", "an object", place, default={})
    for name, split in splits.items():
        where = f"{place}: split {printable(name)!r}"
        splits[name] = _without_nulls(as_object(split, where))
        _check_split(splits[name], where)
    return info


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _check_split(split: dict[str, Any], place: str) -> None:
    for name in get(split, "filenames", "a list of texts", place):
        # Anything else could lead out of the folder.
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(
                f"{place}: 'filenames' has {printable(name)!r}, which is not the name of a file beside {INFO_FILE}"
            )
    for key in ("shard_lengths", "shard_bytes"):
        get(split, key, "a list of whole numbers from 0", place, default=None)
    get(split, "num_samples", "a whole number from 0", place, default=None)
    conversion = get(split, "conversion", "an object", place, default={})
    get(get(conversion, "source", "an object", place, default={}), "images", "a whole number from 0", place, default=None)
    if not split["filenames"]:
        raise ValueError(f"{place}: 'filenames' is empty")


def _find_in_remote_folder(folder: str, split: str) -> tuple[list[RemoteFile], dict[str, Any]]:
    files = {file.url.rpartition("/")[2]: file for file in list_folder(folder)}
    info = _read_remote_info(folder) if INFO_FILE in files else {}
    splits = info.get("splits")
    if splits:
        names = _choose_split(folder, splits, split, lambda: files)["filenames"]
        _check_complete(folder, [name for name in names if name not in files])
    else:
        names = sorted(name for name in files if name.endswith(".tar"))
        _check_one_set(folder, names)
    return [files[name] for name in names], info


def _read_remote_info(folder: str) -> dict[str, Any]:
    place = f"{folder}/{INFO_FILE}"
    content = read_existing(place)
    return {} if content is None else parse_info(content, place)


def _listed_tars(folder: Path, split_info: dict[str, Any]) -> list[Path]:
    tars = [folder / name for name in split_info["filenames"]]
    _check_complete(str(folder), [tar.name for tar in tars if not tar.exists()])
    return tars


def _unlisted_tars(folder: Path) -> list[Path]:
    tars = tars_of_folder(folder)
    _check_one_set(str(folder), [tar.name for tar in tars])
    return tars


def tars_of_folder(folder: Path) -> list[Path]:
    """Returns the tars of a folder, by name.

    Raises:
        ValueError: There are none; the message says so of compressed ones.
    """
    tars = sorted(folder.glob("*.tar"))
    if tars:
        return tars
    for file in sorted(folder.glob("*")):
        if file.name.endswith(TAR_ENDINGS) and file.is_file() and (kind := compression_of(file)):
            raise ValueError(f"no .tar files in folder {folder}; {compressed(str(file), kind)}")
    raise ValueError(f"no .tar files in folder {folder}")


def _choose_split(folder: str, splits: Mapping[str, Any], split: str, files: Callable[[], Collection[str]]) -> dict[str, Any]:
    """Returns the entry of a split. If no split has its exact name, one with another name for the same will do.

    Args:
        folder: Path or URL.
        splits: The entries by name.
        split: Name of the split.
        files: Returns the names of the files in the folder, for a message.
    """
    others = next((words for words in SPLIT_WORDS.values() if split in words), ())
    found = [split] if split in splits else [name for name in others if name in splits]
    if len(found) > 1:  # where `dev` or `val` is there too, an evaluation is often a test
        found = [name for name in found if not name.startswith("eval")]
    if len(found) == 1:
        return dict(splits[found[0]])
    candidates = sorted(found or splits)
    names = ", ".join(map(printable, candidates))
    problem = f"and each of them may be {split!r}" if found else f"but none called {split!r}"
    there = files()
    patterns = (_pattern_of(folder, splits[name]["filenames"], there) for name in candidates)
    raise ValueError(f"folder {folder} has the splits {names}, {problem}; name the shards themselves{_example(patterns)}")


def _pattern_of(folder: str, names: Sequence[str], files: Collection[str]) -> str:
    """Returns a pattern that matches these files of a folder and no others; empty if there is no simple one."""
    schemes = set(map(naming_scheme, names))
    for prefix, digits in schemes if len(schemes) == 1 else ():
        for name in (f"{glob.escape(prefix)}*.tar", f"{glob.escape(prefix)}{'[0-9]' * digits}.tar"):
            pattern = f"{glob.escape(folder)}/{name}"
            if sorted(fnmatch.filter(files, name)) == sorted(names) and _split_braces(pattern) == [pattern]:
                return pattern
    return ""


def _example(patterns: Iterable[str]) -> str:
    return next((f", for example '{printable(pattern)}'" for pattern in patterns if pattern), "")


def _check_complete(folder: str, missing: list[str]) -> None:
    if missing:
        names = ", ".join(map(printable, missing[:MOST_MISSING]))
        more = f" and {len(missing) - MOST_MISSING:,} more" if len(missing) > MOST_MISSING else ""
        raise ValueError(f"{folder}/{INFO_FILE} lists shards that are not there: {names}{more}")


def _check_one_set(folder: str, names: list[str]) -> None:
    """Without an `_info.json` the tars of a folder must be one set, so that train and valid are never mixed."""
    if not names:
        raise ValueError(f"no .tar files in folder {folder}")
    schemes = collections.defaultdict(list)
    for name in names:
        schemes[naming_scheme(name)].append(name)
    if len(schemes) > 1:
        counts = [f"{printable(prefix)}{'#' * digits}.tar ({len(of)})" for (prefix, digits), of in sorted(schemes.items())[:5]]
        example = _example(_pattern_of(folder, of, names) for _, of in sorted(schemes.items()))
        raise ValueError(f"folder {folder} has shards of several naming schemes: {', '.join(counts)}; name one{example}")


def _split_braces(pattern: str) -> list[str]:
    if "{" not in pattern and "}" not in pattern:
        return [pattern]  # `braceexpand` would remove backslashes
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise ValueError(f"{pattern!r}: the braces do not match") from error


def _expand(pattern: str) -> list[Path]:
    if is_url(pattern):
        raise ValueError(f"{pattern!r}: this command reads local shards only; copy them to a local folder")
    if os.path.isfile(pattern):  # a name may have brackets or braces
        return [Path(pattern)]
    refuse_other_notations(pattern)
    tars: list[Path] = []
    for part in _split_braces(pattern):
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        if found and os.path.exists(found[0]) and not os.path.isfile(found[0]):
            raise ValueError(f"{printable(found[0])}: not a regular file")
        if not found or not os.path.isfile(found[0]):
            place = "" if os.path.isabs(part) else f"; looked from {Path.cwd()}"
            raise ValueError(f"no such shard: {part!r}{_part_of(pattern, part)}{place}")
        tars += [Path(tar) for tar in found]
    return tars


def _part_of(pattern: str, part: str) -> str:
    return f" (part of {pattern!r})" if part != pattern else ""
