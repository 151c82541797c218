"""`shards convert`: a folder of class folders becomes the shards of one split."""

import collections
import json
import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.files import replace_text
from pipelines.shards import INFO_FILE, read_info
from tools.shards.check import DecodeCheck
from tools.shards.sources import ClassFolders, find_class_folders
from tools.shards.write import SplitWriter, shard_name

REJECTED_FILE = "rejected.jsonl"
CHECKED_AT_ONCE = 64  # images held in memory and decoded together


@dataclass(frozen=True)
class Summary:
    """What a conversion did; `rejected` counts images left out, by reason."""

    split: str
    num_classes: int
    shard_lengths: tuple[int, ...]
    image_bytes: int
    seconds: float
    rejected: dict[str, int]
    empty_classes: tuple[str, ...]

    def __str__(self) -> str:
        count, megabytes = sum(self.shard_lengths), self.image_bytes / 1e6
        shards = f"{len(self.shard_lengths)} shard{'s' if len(self.shard_lengths) > 1 else ''}"
        lines = [
            f"{self.split}: {count:,} images of {self.num_classes} classes in {shards}, {megabytes:,.1f} MB, "
            f"in {self.seconds:.1f} s ({count / self.seconds:,.0f} images/s, {megabytes / self.seconds:,.1f} MB/s)"
        ]
        if self.rejected:
            reasons = "; ".join(f"{number:,} {reason}" for reason, number in sorted(self.rejected.items()))
            total = sum(self.rejected.values())
            lines.append(f"left out: {total:,} files that training could not decode ({reasons}); see {REJECTED_FILE}")
        if self.empty_classes:
            lines.append(f"warning: class folders without files were passed over: {', '.join(self.empty_classes)}")
        return "\n".join(lines)


def convert(
    source_folder: Path, destination: Path, *, name: str, shard_samples: int, seed: int, overwrite: bool = False
) -> Summary:
    """Writes `destination/NAME-000000.tar`, its index, and so on, and enters the split in `destination/_info.json`.

    Samples are shuffled over the whole set. Images are copied unchanged; those that the training pipeline could not decode are
    left out and listed in `rejected.jsonl`. The shards appear under their names only once all of them are written.

    Args:
        source_folder: A folder of class folders.
        destination: Folder of the data set; made where it is not there.
        name: Of the split.
        shard_samples: Samples in a shard; the last may have fewer.
        seed: Of the shuffle.
        overwrite: Replace a split of that name.

    Raises:
        ValueError: The arguments, the source or the destination cannot be used as they are; says what to change.
    """
    started = time.perf_counter()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", name):
        raise ValueError(f"--name {name!r}: letters, digits and underscores are allowed")
    if shard_samples < 1:
        raise ValueError(f"--shard-samples {shard_samples}: at least 1 is needed")
    if destination.resolve().is_relative_to(source_folder.resolve()):
        raise ValueError(f"{destination} lies inside the source {source_folder}; name a folder outside of it")
    source = find_class_folders(source_folder)
    info = read_info(destination)
    classes = _agree_on_classes(source, info, name, destination, overwrite)

    partial = destination / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was interrupted
    partial.mkdir(parents=True)
    with SplitWriter(partial, name, shard_samples) as writer:
        rejected = _copy_decodable(source, classes, seed, writer)
    if not writer.shard_lengths:
        shutil.rmtree(partial)
        raise ValueError(f"{source_folder}: none of its {len(source.files)} files is an image that training could decode")
    _publish(partial, destination, name, writer.shard_lengths, classes, info, rejected)
    return Summary(
        split=name,
        num_classes=len(classes),
        shard_lengths=tuple(writer.shard_lengths),
        image_bytes=writer.image_bytes,
        seconds=time.perf_counter() - started,
        rejected=dict(collections.Counter(entry["reason"] for entry in rejected)),
        empty_classes=source.empty,
    )


def _agree_on_classes(source: ClassFolders, info: dict[str, Any], name: str, destination: Path, overwrite: bool) -> list[str]:
    """The class names of the data set: the first split's, which later ones have to share."""
    splits = info.get("splits", {})
    if (name in splits or any(destination.glob(f"{name}-*.tar"))) and not overwrite:
        raise ValueError(f"{destination} has a split {name!r} already; give another --name, or --overwrite")
    if set(splits) <= {name}:
        return list(source.classes)
    if "classes" not in info:
        raise ValueError(f"{destination}/{INFO_FILE} lists splits and no classes, so a new split cannot be numbered like them")
    unknown = [label for label in source.classes if label not in info["classes"]]
    if unknown:
        raise ValueError(
            f"{source.folder}: {len(unknown)} classes that the other splits in {destination} do not have: "
            f"{', '.join(unknown[:20])}{', ...' if len(unknown) > 20 else ''}; all splits of a data set share their classes"
        )
    return list(info["classes"])


def _copy_decodable(source: ClassFolders, classes: list[str], seed: int, writer: SplitWriter) -> list[dict[str, str]]:
    """Writes what can be decoded, in shuffled order; returns path and reason of what cannot."""
    labels = {label: str(number).encode() for number, label in enumerate(classes)}
    files = list(source.files)
    random.Random(seed).shuffle(files)
    check, rejected = DecodeCheck(), []
    started, num_bytes = time.perf_counter(), 0
    with tqdm(total=len(files), unit="img", disable=None) as progress:  # None: only where there is a terminal
        for start in range(0, len(files), CHECKED_AT_ONCE):
            chunk = files[start : start + CHECKED_AT_ONCE]
            contents = [(source.folder / path).read_bytes() for path, _ in chunk]
            for (path, label), encoded, verdict in zip(chunk, contents, check(contents), strict=True):
                if verdict.extension is None:
                    rejected.append({"path": str(source.folder / path), "reason": verdict.reason})
                else:
                    writer.add(path, {verdict.extension: encoded, "cls": labels[label]})
            num_bytes += sum(map(len, contents))
            progress.set_postfix_str(f"{num_bytes / 1e6 / (time.perf_counter() - started):.1f} MB/s", refresh=False)
            progress.update(len(chunk))
    return rejected


def _publish(
    partial: Path,
    destination: Path,
    name: str,
    shard_lengths: list[int],
    classes: list[str],
    info: dict[str, Any],
    rejected: list[dict[str, str]],
) -> None:
    """Gives the finished shards their names, and lists them: from here on the split is there."""
    splits = info.get("splits", {})
    if splits.pop(name, None):
        _write_info(destination, {**info, "splits": splits})  # what is replaced is not listed while it is
    for old in [*destination.glob(f"{name}-*.tar"), *destination.glob(f"{name}-*.idx")]:
        old.unlink()
    for file in sorted(partial.iterdir()):
        file.replace(destination / file.name)
    partial.rmdir()
    _write_rejected(destination / REJECTED_FILE, name, rejected)
    splits[name] = {
        "name": name,
        "num_samples": sum(shard_lengths),
        "filenames": [shard_name(name, number) for number in range(len(shard_lengths))],
        "shard_lengths": shard_lengths,
    }
    _write_info(destination, {**info, "splits": splits, "classes": classes})


def _write_info(destination: Path, info: dict[str, Any]) -> None:
    replace_text(destination / INFO_FILE, json.dumps(info, indent=1) + "\n")


def _write_rejected(path: Path, name: str, rejected: list[dict[str, str]]) -> None:
    """Replaces the split's entries among those of all splits; no file where there are none."""
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    entries = [entry for entry in entries if entry["split"] != name] + [{"split": name, **entry} for entry in rejected]
    if entries:
        replace_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    else:
        path.unlink(missing_ok=True)
