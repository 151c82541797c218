"""What made a pipeline stop: a tar that is not what it was, or samples that cannot be used, and which."""

import errno
import os
import resource
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from pipelines.check import why_undecodable
from pipelines.index import read_index
from pipelines.quarantine import RowId
from pipelines.segments import Part
from pipelines.shards import ShardSet, image_or_first

WAY_OUT = "Put the shard back as it was and resume, or begin a run on the new ones"


def check_open_files(message: str) -> None:
    """Whether it was for the limit of open files that a pipeline stopped, which is in its message then.

    Raises:
        ValueError: It was; names the way out.
    """
    for line in message.splitlines():
        if os.strerror(errno.EMFILE) in line:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            raise ValueError(
                f"{line.rpartition('failed: ')[2]}; this process may have {limit:,} files open: raise that with `ulimit -n`, "
                "or lower --data.segment-samples, as all shards of a segment are open"
            )


class TarWatch:
    """Remembers what the tars of a run were like, to tell one that is cut short or replaced from one with a bad sample.

    Args:
        tars: Local ones.
    """

    def __init__(self, tars: Iterable[str]) -> None:
        self._before = {tar: os.stat(tar) for tar in tars}

    def check_sizes(self, tars: Iterable[str], sizes: Iterable[int]) -> None:
        """Compares tars with the sizes that they had, in bytes.

        Raises:
            ValueError: One of them has changed, or is gone.
        """
        for tar, size in zip(tars, sizes, strict=True):
            try:
                now = os.stat(tar).st_size
            except FileNotFoundError:
                raise ValueError(f"{tar}: gone; it was there when the run began") from None
            if now != size:
                what = "cut short" if now < size else "replaced"
                raise ValueError(f"{tar}: {what} while the run was under way: {now:,} bytes, {size:,} when it began. {WAY_OUT}")

    def check_content(self, samples: Iterable[tuple[str, bool]]) -> None:
        """Looks for tars that have been written to since, and of whose samples not one can be decoded.

        Args:
            samples: The tar of each sample of a batch, and whether the sample is bad.

        Raises:
            ValueError: There is one: it is the tar then, not the samples.
        """
        verdicts = defaultdict(list)
        for tar, is_bad in samples:
            verdicts[tar].append(is_bad)
        for tar, bad in verdicts.items():
            now, before = os.stat(tar), self._before.get(tar)
            changed = before is not None and (now.st_mtime_ns, now.st_ino) != (before.st_mtime_ns, before.st_ino)
            if changed and all(bad):
                raise ValueError(f"{tar}: written to while the run was under way, and what is read now is no image. {WAY_OUT}")


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
        self._rows: dict[int, dict[str, list[int]]] = {}  # of the shards asked for, the rows with each offset

    def __call__(self, source: str) -> list[RowId]:
        """Its rows: an index may list a sample several times."""
        for end, letter in enumerate(source):  # names and paths may have colons themselves
            shard = self._numbers.get(source[:end]) if letter == ":" else None
            rows = None if shard is None else self._offsets(shard).get(source[end + 1 :].partition(":")[0])
            if shard is not None and rows is not None:
                return [RowId(shard, row) for row in rows]
        raise AssertionError(f"the reader gave {source!r}, which is in none of its indices")

    def _offsets(self, shard: int) -> dict[str, list[int]]:
        if shard not in self._rows:
            rows: dict[str, list[int]] = defaultdict(list)
            for row, sample in enumerate(read_index(self._shards.indices[shard])):
                rows[str(image_or_first(sample).offset)].append(row)
            self._rows[shard] = rows
        return self._rows[shard]


def undecodable(images: Sequence[bytes], sources: Sequence[str], message: str, alone: Callable[[int], bool]) -> dict[int, str]:
    """Which of the images at which a pipeline stopped cannot be decoded, and why; tried one by one, completely.

    Args:
        images: The encoded images.
        sources: `tar:offset:member` of each.
        message: What the pipeline said. Where all can be decoded, samples that it names are taken to be bad.
        alone: Whether a pipeline with nothing but the image of that number stops, too; asked where nothing else tells.
    """
    found = {i: reason for i, reason in enumerate(why_undecodable(images)) if reason}
    named = [i for i, source in enumerate(sources) if source in message]
    return found or dict.fromkeys(named or filter(alone, range(len(images))), "the pipeline cannot decode it")
