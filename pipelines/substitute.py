"""Index files that leave samples out and change nothing else: in a bad sample's row another one stands in for it.

The reader draws rows, whatever is in them, so the order of all others stays as it was. The name in a stand-in's row is marked,
and the loader drops it from its batch.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.check import why_undecodable
from pipelines.index import Sample, read_index, write_index
from pipelines.segments import Part
from pipelines.shards import ShardSet, read_image

# Nothing that a tar could hold as a member's name by accident; new in each process.
MARK = f"stand-in-{secrets.token_hex(8)}:"

BadRows = Mapping[int, Mapping[int, str]]


def index_files(
    shards: ShardSet, tars: Sequence[str], parts: Sequence[Part], bad: BadRows, folder: Path
) -> list[tuple[str, str]]:
    """For each part the tar and the index with which the reader reads it.

    Args:
        shards: The set.
        tars: Local path of the tar of each part.
        parts: Rows to read.
        bad: Bad rows by shard.
        folder: Where index files are written that differ from those of the shards.

    Raises:
        ValueError: There is no good sample in any of these shards.
    """
    files = []
    for number, (part, tar) in enumerate(zip(parts, tars, strict=True)):
        bad_rows = [row for row in bad.get(part.shard, ()) if part.start <= row < part.stop]
        if not bad_rows and part.stop - part.start == shards.lengths[part.shard]:
            files.append((tar, str(shards.indices[part.shard])))
            continue
        rows = read_index(shards.indices[part.shard])[part.start : part.stop]
        if bad_rows:
            place, stand_in = _stand_in(shards, tars, parts, bad, number)
            if place != number:  # none of this part's rows is good
                tar, rows = tars[place], [stand_in] * len(rows)
            for row in bad_rows:
                rows[row - part.start] = stand_in
        index = folder / f"{number}.idx"
        write_index(index, rows)
        files.append((tar, str(index)))
    return files


def _stand_in(shards: ShardSet, tars: Sequence[str], parts: Sequence[Part], bad: BadRows, number: int) -> tuple[int, Sample]:
    """A good sample with its names marked, and the number of its part: that of the number given, where it has one."""
    for place in [*range(number, len(parts)), *range(number)]:
        part = parts[place]
        samples = read_index(shards.indices[part.shard])
        for row in range(part.start, part.stop):
            # What is not known to be bad may be so all the same.
            if row not in bad.get(part.shard, ()) and not why_undecodable([read_image(tars[place], samples[row])])[0]:
                return place, [replace(component, name=MARK + component.name) for component in samples[row]]
    names = ", ".join(shards.tars[part.shard] for part in parts[:5])
    raise ValueError(f"there is not one good sample in {names}; `shards verify` says what is wrong with them")
