"""What made a pipeline stop: a tar that is not what it was, or samples that cannot be used, and which."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipelines.check import why_undecodable
from pipelines.index import read_index
from pipelines.quarantine import RowId
from pipelines.segments import Part
from pipelines.shards import ShardSet, image_or_first, read_image


@dataclass
class TarWatch:
    """Remembers what the tars of a run were like, to tell one that is cut short or replaced from one with a bad sample."""

    _seen: dict[str, os.stat_result] = field(default_factory=dict)

    def check(self, tars: Iterable[str], sizes: Iterable[int], *, times: bool = False) -> None:
        """Compares tars with what they were: `sizes` in bytes, and where `times` is set also when they were last written.

        Raises:
            ValueError: One of them has changed, or is gone.
        """
        for tar, size in zip(tars, sizes, strict=True):
            try:
                now = os.stat(tar)
            except FileNotFoundError:
                raise ValueError(f"{tar}: gone; it was there when the run began") from None
            before = self._seen.setdefault(tar, now)
            if now.st_size != size:
                what = "cut short" if now.st_size < size else "replaced"
                raise ValueError(
                    f"{tar}: {what} while the run was under way: {now.st_size:,} bytes, {size:,} when it began. "
                    "Put the shard back as it was and resume, or begin a run on the new ones"
                )
            if times and (now.st_mtime_ns, now.st_ino) != (before.st_mtime_ns, before.st_ino):
                raise ValueError(
                    f"{tar}: written to while the run was under way, and what is read now is no image any more. "
                    "Put the shard back as it was and resume, or begin a run on the new ones"
                )


class Locator:
    """Finds the sample that the reader calls `tar:offset:member`.

    Args:
        shards: The set.
        parts: What the pipeline reads.
        tars: Local path of the tar of each part.
    """

    def __init__(self, shards: ShardSet, parts: Sequence[Part], tars: Sequence[str]) -> None:
        self._shards = shards
        self._numbers = {tar: part.shard for part, tar in zip(parts, tars, strict=True)}
        self._rows: dict[int, dict[str, int]] = {}  # of the shards asked for, the row of each offset

    def __call__(self, source: str) -> RowId:
        for end, letter in enumerate(source):  # names and paths may have colons themselves
            shard = self._numbers.get(source[:end]) if letter == ":" else None
            row = None if shard is None else self._offsets(shard).get(source[end + 1 :].partition(":")[0])
            if shard is not None and row is not None:
                return RowId(shard, row)
        raise AssertionError(f"the reader gave {source!r}, which is in none of its indices")

    def _offsets(self, shard: int) -> dict[str, int]:
        if shard not in self._rows:
            samples = read_index(self._shards.indices[shard])
            self._rows[shard] = {str(image_or_first(sample).offset): row for row, sample in enumerate(samples)}
        return self._rows[shard]


def undecodable(
    shards: ShardSet, parts: Sequence[Part], tars: Sequence[str], sources: Sequence[str], message: str
) -> dict[RowId, str]:
    """Those of the samples that cannot be decoded, with the reason: tried one by one, completely.

    Args:
        shards: The set.
        parts: What the pipeline reads.
        tars: Local path of the tar of each part.
        sources: The samples of the batch at which the pipeline stopped.
        message: What it said; where all can be decoded, samples that it names are taken to be bad.
    """
    locate = Locator(shards, parts, tars)
    paths = {part.shard: tar for part, tar in zip(parts, tars, strict=True)}
    rows = [locate(source) for source in dict.fromkeys(sources)]
    images = [read_image(paths[shard], read_index(shards.indices[shard])[row]) for shard, row in rows]
    found = {row: reason for row, reason in zip(rows, why_undecodable(images), strict=True) if reason}
    named = (row for row, source in zip(rows, dict.fromkeys(sources), strict=True) if source in message)
    return found or dict.fromkeys(named, "the pipeline cannot decode it")
