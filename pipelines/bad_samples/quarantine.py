"""Bad samples: which there are, how many are too many, and the file that later runs and `shards verify` read."""

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.remote.object_store import is_url
from pipelines.shards.index import read_index, read_sample
from pipelines.shards.shard_set import ShardSet, image_or_first

if TYPE_CHECKING:
    from pipelines.config import DataConfig

log = logging.getLogger(__name__)

FILE_NAME = "quarantine.jsonl"
LINES_OF_TABLE = 20


class RowId(NamedTuple):
    """A sample: the number of its shard in the set, and of its row in the shard's index."""

    shard: int
    row: int


@dataclass(frozen=True)
class BadSample:
    """A sample that training cannot use.

    Attributes:
        tar: Absolute path or URL of its shard.
        offset: Where its image's bytes begin in the tar; those of its first member, where it has no image.
        member: Name of that member.
        reason: What is wrong with it.
    """

    tar: str
    offset: int
    member: str
    reason: str

    def __str__(self) -> str:
        return f"{self.tar}:{self.offset}:{self.member}: {self.reason}"


def location(tar: str) -> str:
    """A shard as the file names it: a URL as it is, a path made absolute."""
    return tar if is_url(tar) else os.path.abspath(tar)


def read_quarantine(path: Path) -> list[BadSample]:
    """The samples that a `quarantine.jsonl` lists; of a run's folder, the one in it, or none where the run had no bad sample.

    Raises:
        ValueError: There is no such file or folder, or a line of it is not of that form.
    """
    if path.is_dir():
        path /= FILE_NAME
        if not path.exists():
            return []
    if not path.exists():
        raise ValueError(f"{path}: no such file; a run writes {FILE_NAME} into its folder once it meets a bad sample")
    samples = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            fields = json.loads(line)
            samples.append(
                BadSample(str(fields["tar"]), int(fields["offset"]), str(fields["member"]), str(fields.get("reason", "")))
            )
        except json.JSONDecodeError as error:
            if line.endswith("}"):
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
            continue  # its run was killed while it wrote it
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: an object with "tar", "offset" and "member" is needed ({error})'
            ) from error
    return samples


class Quarantine:
    """Knows the bad samples of a split, warns of each once, writes them down, and stops the run when they are too many.

    Args:
        shards: Of the split.
        config: What to do about bad samples, and files that list known ones.
        path: The file to add new ones to, if any.
    """

    def __init__(self, shards: ShardSet, config: "DataConfig", path: Path | None = None) -> None:
        self._shards, self._config, self._path = shards, config, path
        self._by_shard: dict[int, dict[int, str]] = defaultdict(dict)  # shard, row: what is wrong
        self._take_known()
        self._check()

    def __len__(self) -> int:
        return sum(map(len, self._by_shard.values()))

    def __contains__(self, row: RowId) -> bool:
        return row.row in self._by_shard.get(row.shard, {})

    def add(self, found: Mapping[RowId, str], place: str) -> None:
        """Takes samples that were just found bad, and why; `place` says where in training.

        Raises:
            ValueError: Bad samples are not to be skipped, or there are too many by now.
        """
        for (shard, row), reason in found.items():
            sample = self._describe(RowId(shard, row), reason)
            if self._config.on_error == "stop":
                raise ValueError(f"{sample} ({place}); --data.on-error skip goes on without such samples")
            self._by_shard[shard][row] = reason
            log.warning("left out a bad sample (%s): %s", place, sample)
            self._write(sample, place)
        self._check()

    def state_dict(self) -> dict[str, Any]:
        rows = [RowId(shard, row) for shard, bad in sorted(self._by_shard.items()) for row in sorted(bad)]
        return {"rows": [list(row) for row in rows], "reasons": [self._by_shard[shard][row] for shard, row in rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._by_shard.clear()
        self._take_known()
        for (shard, row), reason in zip(state["rows"], state["reasons"], strict=True):
            self._by_shard[shard][row] = reason

    def _take_known(self) -> None:
        """Takes those samples of earlier runs that are in these shards."""
        shards = {location(tar): number for number, tar in enumerate(self._shards.tars)}
        reasons: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)
        for file in self._config.quarantine:
            for sample in read_quarantine(Path(file)):
                if sample.tar in shards:
                    reasons[shards[sample.tar]][sample.offset, sample.member] = sample.reason
        for shard, known in reasons.items():
            for row, members in enumerate(read_index(self._shards.indices[shard])):
                named = image_or_first(members)
                if (named.offset, named.name) in known:
                    self._by_shard[shard][row] = known[named.offset, named.name]

    def _describe(self, row: RowId, reason: str) -> BadSample:
        component = image_or_first(read_sample(self._shards.indices[row.shard], row.row))
        return BadSample(location(self._shards.tars[row.shard]), component.offset, component.name, reason)

    def _check(self) -> None:
        """Raises ValueError, with a table, where there are too many; one is never too many, unless none is allowed."""
        allowed = math.ceil(round(self._config.max_bad_fraction * self._shards.num_samples, 6))
        if len(self) <= allowed:
            return
        rows = [RowId(shard, row) for shard, bad in self._by_shard.items() for row in bad]
        lines = [f"  {self._describe(row, self._by_shard[row.shard][row.row])}" for row in rows[:LINES_OF_TABLE]]
        if len(rows) > LINES_OF_TABLE:
            lines.append(f"  ... and {len(rows) - LINES_OF_TABLE:,} more")
        raise ValueError(
            f"{len(rows):,} bad samples of {self._shards.num_samples:,}, and --data.max-bad-fraction "
            f"{self._config.max_bad_fraction:g} allows {allowed:,}. `shards verify` finds all there are, and with --quarantine "
            "writes index files without them.\n" + "\n".join(lines)
        )

    def _write(self, sample: BadSample, place: str) -> None:
        if self._path is None:
            return
        if self._path.exists():
            listed = ((other.tar, other.offset) for other in read_quarantine(self._path))
            if (sample.tar, sample.offset) in listed:  # by another rank, or before the run was resumed
                return
        with open(self._path, "a+b") as file:  # one write of one line: other loaders and ranks may have the file open
            file.seek(max(0, file.tell() - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + json.dumps({**asdict(sample), "found": place}).encode() + b"\n")
