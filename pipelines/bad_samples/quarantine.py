"""The known bad samples of a split, and the file that later runs and `shards verify` read."""

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.json_file import as_object, get, read_json_lines
from pipelines.printable import counted, printable
from pipelines.remote.object_store import is_url
from pipelines.shards.index import Component, read_index, read_sample
from pipelines.shards.members import image_or_first
from pipelines.shards.shard_set import ShardSet

if TYPE_CHECKING:
    from pipelines.config import DataConfig

log = logging.getLogger(__name__)

FILE_NAME = "quarantine.jsonl"
RUN_FILES = ("config.json", "metrics.jsonl")  # the folder of a run has them from its start
LINES_OF_TABLE = 20


class RowId(NamedTuple):
    """A sample: the index of its shard in the set, and of its row in that shard's index file."""

    shard: int
    row: int


@dataclass(frozen=True)
class BadSample:
    """A sample that training cannot use.

    Attributes:
        tar: Absolute path or URL of its shard.
        offset: Offset of its image in the tar, in bytes; of its first member if it has no image.
        member: Name of that member.
        reason: What is wrong with it.
    """

    tar: str
    offset: int
    member: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.tar}:{self.offset}:{self.member}: {self.reason}")


def location(tar: str) -> str:
    """Returns the name of a shard in the file: a URL as it is, or an absolute path."""
    return tar if is_url(tar) else os.path.abspath(tar)


def read_quarantine(path: Path) -> list[BadSample]:
    """Reads the samples that a `quarantine.jsonl` lists.

    Args:
        path: The file, or the folder of a run, which has no such file unless the run met a bad sample.

    Raises:
        ValueError: The file or folder does not exist, or is another one, or a line is malformed.
    """
    if path.is_dir():
        if not any((path / name).exists() for name in (FILE_NAME, *RUN_FILES)):
            raise ValueError(
                f"{path}: neither the folder of a run nor a folder with a {FILE_NAME}; a run writes that file once it meets a "
                "bad sample"
            )
        path /= FILE_NAME
        if not path.exists():
            return []
    if not path.exists():
        raise ValueError(f"{path}: no such file; a run writes {FILE_NAME} into its folder once it meets a bad sample")
    samples = []
    for place, value in read_json_lines(path, torn=True):
        fields = as_object(value, place)
        texts = {key: get(fields, key, "a text", place) for key in ("tar", "member")}
        offset = get(fields, "offset", "a whole number from 0", place)
        samples.append(BadSample(**texts, offset=offset, reason=get(fields, "reason", "a text", place, default="")))
    return samples


class Quarantine:
    """Records the bad samples of a split, warns of each once, and stops the run when there are too many.

    Args:
        shards: Shards of the split.
        config: Says what to do about bad samples, and names files that list known ones.
        path: File to which new bad samples are added, or None.

    Raises:
        ValueError: A file of known samples cannot be read, or lists too many.
    """

    def __init__(self, shards: ShardSet, config: "DataConfig", path: Path | None = None) -> None:
        self.shards, self._config, self._path = shards, config, path
        self._reasons = self._known()
        self._check()

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, row: RowId) -> bool:
        return row in self._reasons

    def add(self, found: Mapping[RowId, str], place: str) -> None:
        """Records samples that were just found to be bad.

        Args:
            found: The samples, and what is wrong with each.
            place: Position in training, for messages.

        Raises:
            ValueError: Bad samples must not be skipped, or there are too many.
        """
        for row, reason in found.items():
            sample = self._describe(row, reason)
            if self._config.on_error == "stop":
                raise ValueError(f"{sample} ({place}); --data.on-error skip leaves such samples out")
            self._reasons[row] = reason
            log.warning("left out a bad sample (%s): %s", place, sample)
            self._write(sample, place)
        self._check()

    def state_dict(self) -> dict[str, Any]:
        rows = sorted(self._reasons)
        return {"rows": [list(row) for row in rows], "reasons": [self._reasons[row] for row in rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the bad samples of a saved state, and adds those that `DataConfig.quarantine` lists."""
        saved = {RowId(*row): reason for row, reason in zip(state["rows"], state["reasons"], strict=True)}
        self._reasons = self._known() | saved

    def _known(self) -> dict[RowId, str]:
        """Returns the samples of earlier runs that are in these shards."""
        numbers = {location(tar): number for number, tar in enumerate(self.shards.tars)}
        listed: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)  # shard; offset and name of a member: reason
        for file in self._config.quarantine:
            for sample in read_quarantine(Path(file)):
                if sample.tar in numbers:
                    listed[numbers[sample.tar]][sample.offset, sample.member] = sample.reason
        found = {}
        for shard, reasons in listed.items():
            for row, members in enumerate(read_index(self.shards.indices[shard])):
                named = image_or_first(members, self.shards.images)
                if (named.offset, named.name) in reasons:
                    found[RowId(shard, row)] = reasons[named.offset, named.name]
        return found

    def member(self, row: RowId) -> Component:
        """Returns the member that names a sample in messages: its image, or its first member. Reads the index file."""
        return image_or_first(read_sample(self.shards.indices[row.shard], row.row), self.shards.images)

    def _describe(self, row: RowId, reason: str) -> BadSample:
        component = self.member(row)
        return BadSample(location(self.shards.tars[row.shard]), component.offset, component.name, reason)

    def _check(self) -> None:
        """Raises ValueError, with a table, if there are too many. One bad sample is allowed, unless the limit is 0."""
        allowed = math.ceil(round(self._config.max_bad_fraction * self.shards.num_samples, 6))
        if len(self) <= allowed:
            return
        lines = [f"  {self._describe(row, reason)}" for row, reason in list(self._reasons.items())[:LINES_OF_TABLE]]
        if len(self) > LINES_OF_TABLE:
            lines.append(f"  ... and {len(self) - LINES_OF_TABLE:,} more")
        raise ValueError(
            f"{counted(len(self), 'bad sample')} of {self.shards.num_samples:,}, and --data.max-bad-fraction "
            f"{self._config.max_bad_fraction:g} allows {allowed:,}. `shards verify` finds all of them, and with --quarantine "
            "writes index files without them.\n" + "\n".join(lines)
        )

    def _write(self, sample: BadSample, place: str) -> None:
        if self._path is None:
            return
        if self._path.exists():
            listed = ((other.tar, other.offset) for other in read_quarantine(self._path))
            if (sample.tar, sample.offset) in listed:  # by another rank, or before the run was resumed
                return
        with open(self._path, "a+b") as file:  # one write per line: other loaders and ranks may have the file open
            file.seek(max(0, file.tell() - 1))
            is_torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * is_torn + json.dumps({**asdict(sample), "found": place}).encode() + b"\n")
