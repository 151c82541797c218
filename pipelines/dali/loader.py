"""The DALI loader: feeds the batches of a rank to a DALI pipeline, and hands the images over to torch."""

import contextlib
import dataclasses
import hashlib
import os
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import record_function

from pipelines.bad_samples.quarantine import Quarantine
from pipelines.bad_samples.recovery import Recovery, UsableBatch
from pipelines.bad_samples.silence import decoders_silenced
from pipelines.dali.graph import DALI_VERSION
from pipelines.dali.image_pipeline import ImagePipeline, describe
from pipelines.dali.read_ahead import ReadAhead
from pipelines.dali.to_torch import HandOver
from pipelines.loader import Batch, Loader
from pipelines.shards.deal import Deal, Plan
from pipelines.shards.reader import Bytes
from pipelines.shards.shard_set import ShardSet
from pipelines.spec import LoaderSpec
from pipelines.watchdog import Watchdog

if TYPE_CHECKING:
    from pipelines.config import DataConfig

CLOSED = "the loader is closed"


class DALILoader(Loader):
    """Decodes and augments on the device while the model computes.

    `ReadAhead` reads the encoded batches, `Recovery` removes bad samples, and an `ImagePipeline` decodes and augments. A new
    image size needs a new pipeline. Reading and decoding run some batches ahead, even into the next epoch. Remote shards are
    the exception: they are released between epochs.

    Args:
        shards: Shards of the split.
        config: Names the augmentation, and what to do about bad samples.
        spec: Describes the batches; `num_classes` must be set.
        deal: This rank's share of the samples.

    Raises:
        ValueError: A quarantine file cannot be read, or lists too many samples.
    """

    def __init__(self, shards: ShardSet, config: "DataConfig", spec: LoaderSpec, deal: Deal) -> None:
        super().__init__(deal, _settings(shards, config, spec, deal))
        assert spec.num_classes is not None
        self._config, self._spec = config, spec
        self._quarantine = Quarantine(shards, config, spec.quarantine)
        self._source = ReadAhead(shards, config, deal, spec.num_classes, spec.prefetch(config))
        self._recovery = Recovery(self._quarantine, deal, self._source.reader, self._source.tars, config.max_pixels)
        self._watchdog = Watchdog(config.timeout, "--data.timeout")
        self._hand_over = HandOver(spec.device)
        self._pipeline: ImagePipeline | None = None
        self._decoding = deque[UsableBatch]()
        self._unusable = ""  # why the loader cannot be used; empty if it can

    @property
    def num_bad_samples(self) -> int:
        return len(self._quarantine)

    def next(self) -> Batch | None:
        self._check_usable()
        try:
            while self._batch < len(self):
                batch = self._take()
                self._batch += 1
                self._is_fresh = False
                if batch is not None:
                    return batch
        except BaseException:  # images and labels may no longer belong together
            self._unusable = "the loader was stopped by an error; load a state, or make a new one"
            raise
        return None

    def reset(self) -> None:
        self._check_usable()
        if self._is_fresh or self._batch < len(self):
            super().reset()
        else:  # the batches in progress already belong to the next epoch
            super()._go_to(self._deal.following_epoch(self._epoch), 0, 0)
            self._source.begin_epoch()

    def close(self) -> None:
        self._drop_pipeline()
        self._decoding.clear()
        with self._watchdog.waiting("closing the loader", lambda: "a read, or work on the GPU, is blocked"):
            self._source.close()
            self._hand_over.close()
        self._watchdog.close()
        self._unusable = CLOSED

    def state_dict(self) -> dict[str, Any]:
        self._check_usable()
        return {**super().state_dict(), "bad_samples": self._quarantine.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._unusable == CLOSED:
            raise ValueError(CLOSED)
        super().load_state_dict(state)
        self._quarantine.load_state_dict(state["bad_samples"])
        self._unusable = ""

    def _check_usable(self) -> None:
        if self._unusable:
            raise ValueError(self._unusable)

    def _go_to(self, epoch: int, batch: int, offset: int) -> None:
        super()._go_to(epoch, batch, offset)
        if self._pipeline is not None and self._pipeline.num_pending:
            self._drop_pipeline()
        self._decoding.clear()
        self._source.go_to(epoch, batch, offset)

    def _drop_pipeline(self) -> None:
        if self._pipeline is not None:
            with self._watchdog.waiting("ending a pipeline", lambda: "a decoder or an augmentation is blocked"):
                self._pipeline.close()
            self._pipeline = None

    def _take(self) -> Batch | None:
        """Returns the next batch, or None if none of its samples is good."""
        while True:
            self._keep_busy()
            assert self._pipeline is not None
            try:
                with record_function("dali: run"), self._watching("decoding", self._decoding[0].fetched.plan):
                    images = self._pipeline.images(self._hand_over.stream)
                break
            except RuntimeError as error:
                self._recover(error)
        batch = self._decoding.popleft()
        self._recovery.record_unreadable(batch.fetched)
        owned = self._hand_over(images, lambda: self._source.reader.release(batch.fetched))
        if self._decoding:
            self._keep_busy()  # DALI must have work while the caller uses the batch
        if not batch.kept:
            return None
        image, target = owned.permute(0, 3, 1, 2), torch.from_numpy(batch.labels)  # NHWC seen as NCHW is channels_last
        if len(batch.kept) < len(batch.images):
            is_kept = torch.zeros(len(batch.images), dtype=torch.bool)  # on the CPU: copying a list would make the host wait
            is_kept[batch.kept] = True
            image, target = image[is_kept], target[is_kept]
        return {"image": image, "target": target.to(self._spec.device, non_blocking=True)}

    def _keep_busy(self) -> None:
        """Requests the coming batches, and feeds DALI with those already read. Waits only for the batch that is due."""
        while (plan := self._source.next_plan(len(self._decoding))) is not None:
            if self._decoding and not self._source.is_ready():
                return
            pipeline = self._pipeline_for(plan.epoch)
            if pipeline is None or len(self._decoding) >= pipeline.queue_depth:
                return
            try:
                with contextlib.nullcontext() if self._source.copies else self._watching("reading", plan):
                    batch = self._recovery.usable(self._source.next_batch())
                self._feed(pipeline, batch)
            except (ValueError, OSError):
                if self._decoding:
                    return  # reported when that batch is due
                raise
            self._source.advance()

    def _watching(self, what: str, plan: Plan) -> contextlib.AbstractContextManager[None]:
        """Watches what is done with a batch, which may block."""
        split = f"training, epoch {plan.epoch + 1}" if self._spec.is_train else "validation"
        what = f"{what} batch {plan.batch + 1} of {split}, on rank {self._spec.rank}"
        return self._watchdog.waiting(what, lambda: self._recovery.describe(self._source.rows(plan)))

    def _feed(self, pipeline: ImagePipeline, batch: UsableBatch) -> None:
        pipeline.feed(batch.images, batch.fetched.plan.epoch, batch.fetched.plan.place)
        self._decoding.append(batch)

    def _pipeline_for(self, epoch: int) -> ImagePipeline | None:
        """Returns the pipeline for the image size of an epoch, or None while another size is being decoded."""
        spec = self._spec_for(epoch)
        if self._pipeline is not None and self._pipeline.spec.image_size != spec.image_size:
            if self._decoding:
                return None
            self._drop_pipeline()
        if self._pipeline is None:
            self._pipeline = ImagePipeline(self._config, spec)
        return self._pipeline

    def _spec_for(self, epoch: int) -> LoaderSpec:
        if not self._spec.is_train:
            return self._spec
        return dataclasses.replace(self._spec, image_size=self._config.image_size_of(epoch, self._spec.image_size))

    def _recover(self, error: RuntimeError) -> None:
        """Finds the samples that stopped the pipeline, and feeds the batches in progress to a new pipeline without them.

        Raises:
            ValueError: Something else stopped it, a tar changed, or there are too many bad samples.
        """
        self._drop_pipeline()
        # DALI does not say at which of the batches in progress it stopped.
        searches = (self._search(one) for one in self._decoding)
        if not any(searches):
            raise ValueError(describe(error)) from error
        under_way = [batch.fetched for batch in self._decoding]
        self._decoding.clear()
        pipeline = self._pipeline_for(under_way[0].plan.epoch)
        assert pipeline is not None
        for fetched in under_way:
            self._feed(pipeline, self._recovery.usable(fetched))

    def _search(self, batch: UsableBatch) -> bool:
        """Records the samples of a batch at which the pipeline stopped; returns whether there are any."""
        plan = batch.fetched.plan
        with self._watching("searching for bad samples in", plan):
            return self._recovery.record_undecodable(batch, partial(self._stops_at, plan))

    def _stops_at(self, plan: Plan, images: Sequence[Bytes]) -> bool:
        """Whether a pipeline stops at a batch with these images in its slots."""
        spec = self._spec_for(plan.epoch)
        pipeline = ImagePipeline(self._config, spec)
        with contextlib.closing(pipeline), decoders_silenced(), self._watching("decoding parts of", plan):
            pipeline.feed(images, plan.epoch, plan.place)
            try:
                pipeline.images()
            except RuntimeError:
                return True
        return False


def _settings(shards: ShardSet, config: "DataConfig", spec: LoaderSpec, deal: Deal) -> dict[str, int | str]:
    """Returns the settings that the batches depend on."""
    parts = [f"{os.path.basename(tar)} {n} {m}" for tar, n, m in zip(shards.tars, shards.lengths, shards.sizes, strict=True)]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return {
        "data set": f"{shards.num_samples:,} samples in {len(shards.tars):,} shards ({digest})",
        **spec.settings(),
        "order": str(deal.order),
        "number of classes": spec.num_classes or 0,
        "label key": shards.label_reader.key,
        "dtype": str(spec.dtype),
        "augmentation": str([config.crop, *config.augment]),
        "size schedule": " ".join(config.size_schedule),
        "kind of device": spec.device.type,
        "version of DALI": DALI_VERSION,
    }
