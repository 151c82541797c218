"""Replaces the bad samples of a batch before it is decoded, and finds those at which the decoder stopped.

decoder_check.py has a decoder of its own, which takes time to import. It is imported when a sample has to be judged.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.bad_samples.quarantine import Quarantine, RowId
from pipelines.shards.deal import Deal, Plan
from pipelines.shards.reader import Bytes, Fetched, Reader
from pipelines.shards.tars import Tars

# A tiny gray image (PPM) that takes a bad sample's slot while decoding and never leaves the loader. The random draws of the
# other samples depend on their slots, so the slots must not move.
PLACEHOLDER = np.frombuffer(b"P6 8 8 255\n" + bytes([128]) * (8 * 8 * 3), np.uint8)
# How images begin that are judged by their headers before they reach a decoder: those at which it could end the process, and
# those of formats with kinds that it misreads. JPEG, PNG and WebP are not among them, so that they cost nothing.
JUDGED = {b"II", b"MM", b"\0\0", b"\xff\x4f", *(f"P{kind}".encode() for kind in "1234567fF")}
MOST_NAMES = 4  # of the samples of a batch, in a message


@dataclass(frozen=True)
class UsableBatch:
    """A batch without its known bad samples, one entry per slot.

    Attributes:
        fetched: The batch as it was read.
        rows: Row IDs of the samples.
        images: Encoded images, uint8 `(size,)`.
        labels: Class numbers, int64 `(N,)`.
        kept: Slots that reach the caller. The others hold a placeholder.
    """

    fetched: Fetched
    rows: list[RowId]
    images: list[Bytes]
    labels: NDArray[np.int64]
    kept: list[int]


class Recovery:
    """Keeps bad samples out of the batches of a rank, and records them in a quarantine.

    A bad sample makes its batch smaller by one and changes nothing else. A training batch with fewer than two good samples is
    filled up to two with stand-ins: all ranks must take equally many steps, and batch normalization needs something to average.

    Args:
        quarantine: The known bad samples of the split.
        deal: This rank's share of the samples.
        reader: Reads stand-ins.
        tars: Tells a changed tar from a bad sample.
        max_pixels: Images may have this many pixels at most.
    """

    def __init__(self, quarantine: Quarantine, deal: Deal, reader: Reader, tars: Tars, max_pixels: int) -> None:
        self._quarantine, self._deal, self._reader, self._tars = quarantine, deal, reader, tars
        self._max_pixels = max_pixels

    def usable(self, fetched: Fetched) -> UsableBatch:
        """Puts placeholders or stand-ins into the slots of the samples that are known to be bad.

        Raises:
            ValueError: A tar changed, or no sample of the split is good.
        """
        self._mark_unusable(fetched)
        rows, images, labels = list(fetched.rows), list(fetched.images), fetched.labels.copy()
        bad = [slot for slot, row in enumerate(rows) if slot in fetched.reasons or row in self._quarantine]
        for slot in bad:
            images[slot] = PLACEHOLDER
        num_missing = max(0, 2 - (len(rows) - len(bad))) if self._deal.train else 0
        replaced, left_out = bad[:num_missing], bad[num_missing:]
        if replaced:
            self._tars.check_content((row.shard, slot in bad) for slot, row in enumerate(rows))
            found = list(itertools.islice(self._stand_ins(fetched.plan), num_missing))
            for slot, (row, image, label) in zip(replaced, itertools.cycle(found), strict=False):
                rows[slot], images[slot], labels[slot] = row, image, label
        kept = [slot for slot in range(len(rows)) if slot not in left_out]
        return UsableBatch(fetched, rows, images, labels, kept)

    def record_unreadable(self, fetched: Fetched) -> None:
        """Records the samples that the reader found to be bad.

        Raises:
            ValueError: A tar changed, or there are too many bad samples.
        """
        self._record(fetched.plan, fetched.rows, fetched.reasons, fetched.reasons)

    def record_undecodable(self, batch: UsableBatch, stops: Callable[[Sequence[Bytes]], bool]) -> bool:
        """Records the samples at which the pipeline stopped; returns whether there are any.

        Args:
            batch: A batch at which it may have stopped.
            stops: Tells whether a pipeline stops at this batch with other images in its slots.

        Raises:
            ValueError: A tar changed, or there are too many bad samples.
        """
        from pipelines.bad_samples.decoder_check import undecodable

        reasons = undecodable(
            [batch.images[slot].tobytes() for slot in batch.kept],
            lambda chosen: stops(_only(batch.images, {batch.kept[i] for i in chosen})),
            self._max_pixels,
            "--data.max-pixels",
        )
        found = {batch.kept[i]: reason for i, reason in reasons.items()}
        bad = {*range(len(batch.rows))} - {*batch.kept} | {*found}
        self._record(batch.fetched.plan, batch.rows, found, bad)
        return bool(found)

    def describe(self, rows: Sequence[RowId]) -> str:
        """Names the first of these samples. Reads index files."""
        members = [(row, self._quarantine.member(row)) for row in rows[:MOST_NAMES]]
        names = [f"{self._quarantine.shards.tars[row.shard]}:{member.offset}:{member.name}" for row, member in members]
        more = f" and {len(rows) - len(names):,} more" if len(rows) > len(names) else ""
        return f"its samples: {', '.join(names)}{more}"

    def _record(self, plan: Plan, rows: list[RowId], found: Mapping[int, str], bad: Collection[int]) -> None:
        """Records bad samples that are new.

        Args:
            plan: Plan of the batch.
            rows: Row IDs of the batch, one per slot.
            found: Slots of bad samples, and what is wrong with each.
            bad: All slots with bad samples, known ones included.
        """
        new = {rows[slot]: reason for slot, reason in found.items() if rows[slot] not in self._quarantine}
        if new:
            self._tars.check_content((row.shard, slot in bad) for slot, row in enumerate(rows))
            split = f"training, epoch {plan.epoch + 1}" if self._deal.train else "validation"
            self._quarantine.add(new, f"{split}, batch {plan.batch + 1}, rank {self._deal.rank}")

    def _mark_unusable(self, fetched: Fetched) -> None:
        """Adds the images that must not reach the decoder to the samples that cannot be used."""
        for slot, image in enumerate(fetched.images):
            if image[:2].tobytes() in JUDGED:
                from pipelines.bad_samples.decoder_check import why_unusable

                reason = why_unusable(image.tobytes(), self._max_pixels, "--data.max-pixels")
                if reason:
                    fetched.reasons.setdefault(slot, reason)

    def _stand_ins(self, plan: Plan) -> Iterator[tuple[RowId, Bytes, int]]:
        """Reads samples not known to be bad from the places after a batch, so that the choice is reproducible.

        Raises:
            ValueError: There is none.
        """
        order, is_found = self._deal.order, False
        first, left = (plan.place + self._deal.global_batch_size) % order.num_places, order.num_places
        while left > 0:
            last = min(first + self._deal.batch_size, order.num_places)
            samples = order.samples(plan.epoch, first, last)
            first, left = last % order.num_places, left - len(samples)
            fetched = self._reader.submit(dataclasses.replace(plan, samples=samples, is_last=True)).result()
            self._mark_unusable(fetched)
            for slot, row in enumerate(fetched.rows):
                if slot not in fetched.reasons and row not in self._quarantine:
                    is_found = True
                    yield row, fetched.images[slot].copy(), int(fetched.labels[slot])
            self._reader.release(fetched)
        if not is_found:
            tar, *others = self._quarantine.shards.tars
            where = f"{tar} and the other shards" if others else tar
            raise ValueError(f"there is not one good sample in {where}; `shards verify` says why")


def _only(images: Sequence[Bytes], slots: Collection[int]) -> list[Bytes]:
    """Returns the images of a batch with placeholders in all other slots. The random draws belong to slots, so none moves."""
    return [image if slot in slots else PLACEHOLDER for slot, image in enumerate(images)]
