"""Index files that leave samples out and change nothing else: in a bad sample's row another one stands in for it.

The reader draws rows, whatever is in them, so the order of all others stays as it was. The name in a stand-in's row is marked,
and the loader drops it from its batch.
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.check import why_undecodable
from pipelines.files import replace_text
from pipelines.index import Sample, format_line, join_lines, parse_line, read_lines
from pipelines.segments import Part
from pipelines.shards import ShardSet, read_image, read_label

# Nothing that a tar could hold as a member's name by accident; new in each process.
MARK = f"stand-in-{secrets.token_hex(8)}:"

BadRows = Mapping[int, Mapping[int, str]]


def index_files(
    shards: ShardSet, tars: Sequence[str], parts: Sequence[Part], bad: BadRows, num_classes: int, folder: Path
) -> list[tuple[str, str]]:
    """For each part the tar and the index with which the reader reads it.

    Args:
        shards: The set.
        tars: Local path of the tar of each part.
        parts: Rows to read.
        bad: Bad rows by shard.
        num_classes: Labels of stand-ins are below it.
        folder: Where index files are written that differ from those of the shards.

    Raises:
        ValueError: There is no good sample to be had.
    """
    files = []
    for number, (part, tar) in enumerate(zip(parts, tars, strict=True)):
        bad_rows = [row for row in bad.get(part.shard, ()) if part.start <= row < part.stop]
        if not bad_rows and part.stop - part.start == shards.lengths[part.shard]:
            files.append((tar, str(shards.indices[part.shard])))
            continue
        lines = read_lines(shards.indices[part.shard], part.start, part.stop)
        if bad_rows:
            place, stand_in = _stand_in(shards, [(tar, part), *_others(shards, tars, parts, number)], bad, num_classes)
            if place != tar:  # none of this part's rows is good
                tar, lines = place, [stand_in] * len(lines)
            for row in bad_rows:
                lines[row - part.start] = stand_in
        index = folder / f"{number}.idx"
        replace_text(index, join_lines(lines))
        files.append((tar, str(index)))
    return files


def _others(shards: ShardSet, tars: Sequence[str], parts: Sequence[Part], number: int) -> Iterator[tuple[str, Part]]:
    """Where else a stand-in may be found: in the other parts, and then in all shards that are here."""
    yield from ((tar, part) for i, (tar, part) in enumerate(zip(tars, parts, strict=True)) if i != number)
    if not shards.is_remote:
        yield from ((tar, Part(i, 0, shards.lengths[i])) for i, tar in enumerate(shards.tars))


def _stand_in(shards: ShardSet, places: Iterable[tuple[str, Part]], bad: BadRows, num_classes: int) -> tuple[str, str]:
    """The tar of the first good sample, and its line in an index, its names marked."""
    for tar, part in places:
        index = shards.indices[part.shard]
        for row, line in enumerate(read_lines(index, part.start, part.stop), part.start):
            sample = list(parse_line(index, line))
            # What is not known to be bad may be so all the same.
            if row not in bad.get(part.shard, ()) and _is_good(shards, tar, sample, num_classes):
                return tar, format_line([replace(component, name=MARK + component.name) for component in sample])
    raise ValueError(f"there is not one good sample in {shards.tars[0]} and the other shards; `shards verify` says why")


def _is_good(shards: ShardSet, tar: str, sample: Sample, num_classes: int) -> bool:
    try:
        with open(tar, "rb") as file:
            label = read_label(file, sample, tar, shards.label_reader)
    except ValueError:
        return False
    return label < num_classes and not why_undecodable([read_image(tar, sample)])[0]
