"""Recognizes a folder that holds the splits of a data set: train/ and val/, or train-*.tar and val-*.tar."""

import fnmatch
import glob
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines.printable import printable
from pipelines.shards.compression import TAR_ENDINGS
from pipelines.shards.find_tars import SPLIT_WORDS
from tools.shards.sources.folders import is_folder, visible_entries
from tools.shards.sources.listing import is_image_name, is_system_name

SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
ENDINGS = (*TAR_ENDINGS, ".parquet")  # of the files of a source


@dataclass(frozen=True)
class Splits:
    """The splits in a folder.

    Attributes:
        sources: The source of each split by its name in the data set, the training split first.
        flat: Folders named like splits that hold images without class folders.
    """

    sources: dict[str, str]
    flat: tuple[str, ...] = ()

    def commands(self, destination: str) -> str:
        """Returns the commands that convert each split, for a shell."""
        target = shlex.quote(destination)
        return " && ".join(
            f"shards convert {shlex.quote(source)} {target} --name {name}" for name, source in self.sources.items()
        )


def require_one_split(location: str, destination: str) -> None:
    """Raises ValueError, with the right commands, if a folder holds splits: they would be taken for classes."""
    found = find_splits(location)
    flat = ", ".join(map(printable, found.flat))
    if found.sources:
        at_once = f"shards convert --splits {shlex.quote(location)} {shlex.quote(destination)}"
        labels = f"; {flat}: no class folders, --labels is needed" if flat else ""
        classes = "" if sets_of_files(location) else "; if these folders are classes, give --source folders"
        raise ValueError(
            f"{location}: holds the splits of a data set; convert each: {found.commands(destination)}; "
            f"or all: {at_once}{labels}{classes}"
        )
    if len(found.flat) > 1:
        raise ValueError(
            f"{location}: holds splits without class folders ({flat}); convert each by itself, with its classes in a file "
            "(--labels); if these folders are classes, give --source folders"
        )


def find_splits(location: str) -> Splits:
    """Finds the splits in a folder: several sets of files named like splits, or folders that hold classes or shards.

    A folder of one set of files, and a folder of classes, hold no splits. Classes may be named like splits. So folders are
    splits only if two of them are named so and hold folders, or if no other folder has images.
    """
    if not os.path.isdir(location):
        return Splits({})
    sets = sets_of_files(location)
    if len(sets) > 1 and all(map(_word_of_files, sets)):
        return Splits(_named((_word_of_files(name), pattern) for name, pattern in sets.items()))
    if sets:
        return Splits({})
    try:
        folders = sorted(entry.path for entry in visible_entries(Path(location)) if is_folder(entry))
    except OSError:  # reported when it is listed
        return Splits({})
    named = [folder for folder in folders if _word_of_folder(folder)]
    splits = [folder for folder in named if _holds_classes(folder)]
    if not named or (len(splits) < 2 and any(_has_images(folder) for folder in folders if folder not in named)):
        return Splits({})
    flat = tuple(folder for folder in named if folder not in splits and _has_images(folder))
    return Splits(_named((_word_of_folder(folder), folder) for folder in splits), flat)


def sets_of_files(location: str) -> dict[str, str]:
    """Returns the sets of tars, or else of Parquet files, in a folder: the common name of each, and a pattern of its files."""
    number = re.compile(r"([-_.]?[0-9]+(-of-[0-9]+(-[0-9a-f]{16})?)?)?$")  # Hugging Face once added a hash to each file
    for suffix in ENDINGS:
        sets: dict[str, list[str]] = {}
        for path in sorted(path for path in Path(location).glob(f"*{suffix}") if not is_system_name(path.name)):
            sets.setdefault(number.sub("", path.name.removesuffix(suffix)), []).append(path.name)
        if sets:
            names = [name for files in sets.values() for name in files]
            return {
                name: os.path.join(glob.escape(location), _pattern(name, suffix, files, names)) for name, files in sets.items()
            }
    return {}


def _pattern(name: str, suffix: str, files: list[str], all_files: list[str]) -> str:
    """Returns a pattern of the files of one set, and of no others."""
    if len(files) == 1:
        return files[0]
    patterns = [f"{glob.escape(name)}{rest}{suffix}" for rest in ("*", "-*", "[-_.0-9]*")]
    return next((pattern for pattern in patterns if fnmatch.filter(all_files, pattern) == files), patterns[-1])


def _named(found: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Returns the sources by the name of their split, given word and source of each. A second one of a name gets a number."""
    words = list(SPLIT_OF)
    sources: dict[str, str] = {}
    for word, source in sorted(found, key=lambda pair: words.index(pair[0])):
        split = SPLIT_OF[word]
        number = sum(name.rstrip("0123456789") == split for name in sources) + 1
        sources[split if number == 1 else f"{split}{number}"] = source
    return sources


def _word_of_folder(folder: str) -> str:
    """Returns the word for a split that names a folder, such as "validation" for `Validation_set`, or ""."""
    word = re.sub(r"[-_ ]?(set|data|images|split)$", "", os.path.basename(folder).lower())
    return word if word in SPLIT_OF else ""


def _word_of_files(name: str) -> str:
    """Returns the word for a split in the name of a set of files, such as "train" for `imagenet1k-train`, or ""."""
    return next((word for word in re.split(r"[-_.]", name.lower()) if word in SPLIT_OF), "")


def _holds_classes(folder: str) -> bool:
    """Returns whether a folder holds folders or shards, and no images of its own."""
    try:
        entries = visible_entries(Path(folder))
    except OSError:  # reported when it is listed
        return False
    folders = [entry for entry in entries if is_folder(entry)]
    files = [entry.name for entry in entries if entry not in folders]
    return bool(folders or any(name.endswith(ENDINGS) for name in files)) and not any(map(is_image_name, files))


def _has_images(folder: str) -> bool:
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_system_name(name)]
        if any(is_image_name(name) and not is_system_name(name) for name in files):
            return True
    return False
