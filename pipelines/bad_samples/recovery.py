"""Replaces the bad samples of a batch before it is decoded, and finds those at which the decoder stopped."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.bad_samples.decoder_check import undecodable
from pipelines.bad_samples.quarantine import Quarantine, RowId
from pipelines.shards.deal import Deal, Plan
from pipelines.shards.reader import Bytes, Fetched, Reader
from pipelines.shards.tars import Tars

# A tiny gray image (PPM) that takes a bad sample's slot while decoding and never leaves the loader. The random draws of the
# other samples depend on their slots, so the slots must not move.
PLACEHOLDER = np.frombuffer(b"P6 8 8 255\n" + bytes([128]) * (8 * 8 * 3), np.uint8)


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
    """

    def __init__(self, quarantine: Quarantine, deal: Deal, reader: Reader, tars: Tars) -> None:
        self._quarantine, self._deal, self._reader, self._tars = quarantine, deal, reader, tars

    def usable(self, fetched: Fetched) -> UsableBatch:
        """Puts placeholders or stand-ins into the slots of the samples that are known to be bad.

        Raises:
            ValueError: A tar changed, or no sample of the split is good.
        """
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

    def record_undecodable(self, batch: UsableBatch, stops_alone: Callable[[int], bool]) -> bool:
        """Records the samples at which the pipeline stopped; returns whether there are any.

        Args:
            batch: The batch at which it stopped.
            stops_alone: Tells whether a pipeline stops at one image alone, by its slot. Called if every image can be decoded.

        Raises:
            ValueError: A tar changed, or there are too many bad samples.
        """
        images = [batch.images[slot].tobytes() for slot in batch.kept]
        reasons = undecodable(images, lambda i: stops_alone(batch.kept[i]))
        found = {batch.kept[i]: reason for i, reason in reasons.items()}
        bad = {*range(len(batch.rows))} - {*batch.kept} | {*found}
        self._record(batch.fetched.plan, batch.rows, found, bad)
        return bool(found)

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
            for slot, row in enumerate(fetched.rows):
                if slot not in fetched.reasons and row not in self._quarantine:
                    is_found = True
                    yield row, fetched.images[slot].copy(), int(fetched.labels[slot])
            self._reader.release(fetched)
        if not is_found:
            tar = self._quarantine.shards.tars[0]
            raise ValueError(f"there is not one good sample in {tar} and the other shards; `shards verify` says why")
