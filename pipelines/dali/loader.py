"""The loader: it says which samples make each batch, has them read, and has DALI decode and augment them."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import record_function

from pipelines.bad_samples.diagnosis import undecodable
from pipelines.bad_samples.quarantine import Quarantine, RowId
from pipelines.dali.graph import DALI_VERSION, ImagePipeline, Settings, describe
from pipelines.dali.to_torch import HandOver
from pipelines.loader import Batch, Loader, check_state
from pipelines.remote.cache import ShardCache, open_cache
from pipelines.shards.extents import Extents
from pipelines.shards.order import Deal, Plan
from pipelines.shards.reader import Bytes, Fetched, Reader
from pipelines.shards.shard_set import ShardSet
from pipelines.shards.tars import CopiedTars, Tars
from pipelines.tuned import PREFETCH

if TYPE_CHECKING:
    from pipelines.config import DataConfig

READ_AHEAD = 2  # batches that are read, or being read, beyond those that DALI works on

CLOSED = "the loader is closed"

# A tiny gray image (PPM), which takes a bad sample's slot in DALI and never leaves the loader: what the others draw at random
# depends on their places in the batch.
PLACEHOLDER = np.frombuffer(b"P6 8 8 255\n" + bytes([128]) * (8 * 8 * 3), np.uint8)


@dataclass(frozen=True)
class _Fed:
    """A batch that DALI works on.

    Attributes:
        fetched: As it was read.
        rows: The sample in each slot.
        images: What DALI was fed.
        labels: Class numbers, int64.
        kept: Slots whose images the batch has; the others hold a placeholder.
    """

    fetched: Fetched
    rows: list[RowId]
    images: list[Bytes]
    labels: NDArray[np.int64]
    kept: list[int]


class DALILoader(Loader):
    """Decodes and augments on `device` while the model computes.

    The order of the split says which samples a batch has (`pipelines/shards/order.py`), and threads read them
    (`pipelines/shards/reader.py`). One DALI pipeline decodes and augments them, for as long as the size of the images stays.
    Reading and decoding are some batches ahead, also across epochs, except for remote shards, which are released between
    epochs.

    A sample that cannot be used is left out: its batch is smaller by one, and everything else is as if it had been good.
    (A batch of training with fewer than two good samples is made up to two with others, so that all ranks take equally many
    steps, and batch normalization has something to average.)

    Args:
        shards: What to read.
        config: Augmentation, and what to do about bad samples.
        deal: Which samples the batches of this rank have.
        image_size: Side of the images, pixels.
        device: "cpu", or a CUDA device with its index.
        dtype: Of the images; float32, or float16 on a GPU.
        num_classes: Labels must be below it.
        num_threads: CPU threads that DALI uses.
        seed: Of the augmentation.
        quarantine: File to write bad samples to, if any.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: "DataConfig",
        deal: Deal,
        *,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype,
        num_classes: int,
        num_threads: int,
        seed: int,
        quarantine: Path | None = None,
    ) -> None:
        self._shards, self._deal, self._num_classes = shards, deal, num_classes
        self._settings = Settings(deal.train, deal.batch_size, image_size, device, dtype, num_threads, seed, config)
        self._bad = Quarantine(shards, config, quarantine)
        self._hand_over = HandOver(device)
        self._held = contextlib.ExitStack()
        self._cache: ShardCache | None = None
        extents = Extents(shards)
        if shards.is_remote:
            self._cache = self._held.enter_context(open_cache(config.cache_dir, config.cache_gigabytes))
            self._tars: Tars = CopiedTars(shards, self._cache, deal, extents)
            self._reader = Reader(shards, extents, self._tars, num_classes, num_threads=1)
        else:
            self._tars = Tars(shards)
            self._reader = Reader(shards, extents, self._tars, num_classes)
        self._pipeline: ImagePipeline | None = None
        self._reading = deque[tuple[Plan, Future[Fetched]]]()
        self._fed = deque[_Fed]()
        self._unusable = ""
        self._epoch = self._batch = self._offset = 0
        self._go_to(0, 0, 0)

    def __len__(self) -> int:
        return self._deal.num_batches(self._offset)

    @property
    def num_bad_samples(self) -> int:
        return len(self._bad)

    def next(self) -> Batch | None:
        self._check_usable()
        try:
            while self._batch < len(self):
                batch = self._take()
                self._batch += 1
                self._is_fresh = False
                if batch is not None:
                    return batch
        except BaseException:  # interrupted, it would have images of one batch and labels of another
            self._unusable = "the loader was stopped by an error; load a state, or make a new one"
            raise
        return None

    def reset(self) -> None:
        self._check_usable()
        if self._is_fresh:
            return
        epoch = self._deal.following_epoch(self._epoch)
        if self._batch < len(self):
            self._go_to(epoch, 0, 0)
        else:  # the batches under way are those of the epoch that begins
            self._epoch, self._batch, self._offset, self._is_fresh = epoch, 0, 0, True

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()  # ends the wait for copies
        self._drop_pipeline()
        self._reading.clear()
        self._fed.clear()
        self._reader.close()
        self._tars.close()
        self._hand_over.close()
        self._held.close()
        self._unusable = CLOSED

    def state_dict(self) -> dict[str, Any]:
        self._check_usable()
        position = self._deal.state(self._epoch, self._batch, self._offset)
        return {"settings": self._fingerprint(), **position, "bad_samples": self._bad.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._unusable == CLOSED:
            raise ValueError(CLOSED)
        check_state(state, self._fingerprint(), is_elastic=self._deal.train)
        self._unusable = ""
        self._bad.load_state_dict(state["bad_samples"])
        self._go_to(*self._deal.position(state["epoch"], state["place"]))

    def _check_usable(self) -> None:
        if self._unusable:
            raise ValueError(self._unusable)

    def _fingerprint(self) -> dict[str, int | str]:
        """What the batches depend on, but for the position."""
        shards, settings, deal = self._shards, self._settings, self._deal
        parts = [
            f"{os.path.basename(tar)} {n} {m}" for tar, n, m in zip(shards.tars, shards.lengths, shards.sizes, strict=True)
        ]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
        return {
            "data set": f"{shards.num_samples:,} samples in {len(shards.tars):,} shards ({digest})",
            "seed": settings.seed,
            "order": str(deal.order),
            "batch size": deal.batch_size,
            "number of ranks": deal.world_size,
            "rank": deal.rank,
            "image size": settings.image_size,
            "number of classes": self._num_classes,
            "label key": shards.label_reader.key,
            "dtype": str(settings.dtype),
            "augmentation": str([settings.config.crop, *settings.config.augment]),
            "size schedule": " ".join(settings.config.size_schedule),
            "kind of device": settings.device.type,
            "version of DALI": DALI_VERSION,
        }

    def _go_to(self, epoch: int, batch: int, offset: int) -> None:
        """Makes this the position."""
        self._epoch, self._batch, self._offset, self._is_fresh = epoch, batch, offset, True
        if self._pipeline is not None and self._pipeline.num_pending:
            self._drop_pipeline()
        self._fed.clear()
        self._tars.forget()  # a tar may have been put back as it was
        for _, future in self._reading:
            future.cancel()
        self._reading.clear()
        self._plans = self._deal.plans(epoch, batch, offset)
        self._is_last_read = False  # whether all of the epoch that is being delivered has been asked for

    def _drop_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def _image_size(self, epoch: int) -> int:
        settings = self._settings
        return settings.config.image_size_of(epoch, settings.image_size) if settings.train else settings.image_size

    def _take(self) -> Batch | None:
        """The next batch; None where nothing is left of it."""
        while True:
            self._keep_busy()
            assert self._pipeline is not None
            try:
                with record_function("dali: run"):
                    images = self._pipeline.images(self._hand_over.stream)
                break
            except RuntimeError as error:
                self._leave_out_what_failed(error)
        fed = self._fed.popleft()
        self._set_aside(fed.fetched.reasons, fed.fetched.rows, fed.fetched.reasons)
        owned = self._hand_over(images.as_tensor(), lambda: self._reader.release(fed.fetched))
        if self._fed:
            self._keep_busy()  # DALI has to have work while the batch is used
        if not fed.kept:
            return None
        image, target = owned.permute(0, 3, 1, 2), torch.from_numpy(fed.labels)  # NHWC seen as NCHW is channels_last
        if len(fed.kept) < len(fed.images):
            is_kept = torch.zeros(len(fed.images), dtype=torch.bool)  # a mask on the CPU, as the host would wait to copy a list
            is_kept[fed.kept] = True
            image, target = image[is_kept], target[is_kept]
        return {"image": image, "target": target.to(self._settings.device, non_blocking=True)}

    def _keep_busy(self) -> None:
        """Has coming batches read, and feeds those that are there to DALI; waits only for the batch that is due."""
        self._read_ahead()
        while self._reading:
            plan, future = self._reading[0]
            if self._fed and not future.done():
                return
            pipeline = self._pipeline_of(plan.epoch)
            if pipeline is None or len(self._fed) >= pipeline.queue_depth:
                return
            try:
                self._feed(pipeline, future.result())
            except (ValueError, OSError):
                if self._fed:
                    return  # it will be an error when that batch is due
                raise
            self._reading.popleft()
            self._read_ahead()

    def _read_ahead(self) -> None:
        depth = (self._settings.config.prefetch or PREFETCH) + READ_AHEAD
        while len(self._reading) + len(self._fed) < depth:
            # Remote shards are let go between two epochs: what is read of the next one has to wait until it begins.
            if self._cache is not None and self._is_last_read:
                if self._batch or self._reading or self._fed:
                    return
                self._is_last_read = False
            plan = next(self._plans, None)
            if plan is None:
                return
            self._is_last_read = plan.is_last
            self._reading.append((plan, self._reader.submit(plan)))

    def _pipeline_of(self, epoch: int) -> ImagePipeline | None:
        """The pipeline for the images of an epoch; None while one for images of another size has batches under way."""
        size = self._image_size(epoch)
        if self._pipeline is not None and self._pipeline.settings.image_size != size:
            if self._fed:
                return None
            self._drop_pipeline()
        if self._pipeline is None:
            self._pipeline = ImagePipeline(dataclasses.replace(self._settings, image_size=size))
        return self._pipeline

    def _feed(self, pipeline: ImagePipeline, fetched: Fetched) -> None:
        fed = self._without_bad(fetched)
        pipeline.feed(fed.images, fetched.plan.epoch, fetched.plan.place)
        self._fed.append(fed)

    def _without_bad(self, fetched: Fetched) -> _Fed:
        """The batch with placeholders for what is bad, as far as that is known."""
        rows, images, labels = list(fetched.rows), list(fetched.images), fetched.labels.copy()
        bad = [slot for slot, row in enumerate(rows) if slot in fetched.reasons or row in self._bad]
        for slot in bad:
            images[slot] = PLACEHOLDER
        missing = max(0, 2 - (len(rows) - len(bad))) if self._settings.train else 0
        if bad[:missing]:
            self._tars.check_content((row.shard, slot in bad) for slot, row in enumerate(rows))
            others = list(itertools.islice(self._others(fetched.plan), missing))
            for slot, (row, image, label) in zip(bad[:missing], itertools.cycle(others), strict=False):
                rows[slot], images[slot], labels[slot] = row, image, label
        kept = [slot for slot in range(len(rows)) if slot not in bad[missing:]]
        return _Fed(fetched, rows, images, labels, kept)

    def _others(self, plan: Plan) -> Iterator[tuple[RowId, Bytes, int]]:
        """Samples that are not known to be bad, from the places behind a batch: which they are does not depend on chance.

        Raises:
            ValueError: There is none.
        """
        order, found = self._deal.order, False
        first, left = (plan.place + self._deal.global_batch_size) % order.num_places, order.num_places
        while left > 0:
            last = min(first + self._deal.batch_size, order.num_places)
            samples = order.samples(plan.epoch, first, last)
            first, left = last % order.num_places, left - len(samples)
            fetched = self._reader.submit(dataclasses.replace(plan, samples=samples, is_last=True)).result()
            for slot, row in enumerate(fetched.rows):
                if slot not in fetched.reasons and row not in self._bad:
                    found = True
                    yield row, fetched.images[slot].copy(), int(fetched.labels[slot])
            self._reader.release(fetched)
        if not found:
            raise ValueError(
                f"there is not one good sample in {self._shards.tars[0]} and the other shards; `shards verify` says why"
            )

    def _leave_out_what_failed(self, error: RuntimeError) -> None:
        """Finds the samples that made the pipeline stop, and feeds a new one all that was under way without them.

        Raises:
            ValueError: It was something else, or there are too many bad samples.
        """
        self._drop_pipeline()
        failed = self._fed[0]
        images = [failed.images[slot].tobytes() for slot in failed.kept]
        reasons = undecodable(images, lambda i: self._stops_alone(failed, failed.kept[i]))
        found = {failed.kept[i]: reason for i, reason in reasons.items()}
        if not found:
            raise ValueError(describe(error)) from error
        self._set_aside(found, failed.rows, {*range(len(failed.rows))} - {*failed.kept} | {*found})
        under_way = [fed.fetched for fed in self._fed]
        self._fed.clear()
        pipeline = self._pipeline_of(under_way[0].plan.epoch)
        assert pipeline is not None
        for fetched in under_way:
            self._feed(pipeline, fetched)

    def _stops_alone(self, failed: _Fed, slot: int) -> bool:
        """Whether a pipeline with nothing but the image in that slot of a batch stops, too."""
        plan = failed.fetched.plan
        pipeline = ImagePipeline(dataclasses.replace(self._settings, batch_size=1, image_size=self._image_size(plan.epoch)))
        try:
            pipeline.feed([failed.images[slot]], plan.epoch, plan.place + slot)
            pipeline.images()
        except RuntimeError:
            return True
        finally:
            pipeline.close()
        return False

    def _set_aside(self, found: Mapping[int, str], rows: Sequence[RowId], bad: Collection[int]) -> None:
        """Takes note of bad samples.

        Args:
            found: For the slots in which they were, what is wrong.
            rows: The samples in all slots.
            bad: All slots whose samples are bad, those too that were known.

        Raises:
            ValueError: It is their tar that is wrong, or there are too many by now.
        """
        new = {rows[slot]: reason for slot, reason in found.items() if rows[slot] not in self._bad}
        if not new:
            return
        self._tars.check_content((row.shard, slot in bad) for slot, row in enumerate(rows))
        split = f"training, epoch {self._epoch + 1}" if self._settings.train else "validation"
        self._bad.add(new, f"{split}, batch {self._batch + 1}, rank {self._deal.rank}")
