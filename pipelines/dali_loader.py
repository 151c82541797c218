"""The loader: epochs, positions and bad samples, around pipelines that each read a segment."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import record_function

from pipelines.cache import ShardCache, open_cache
from pipelines.dali import DALI_VERSION, SegmentPipeline, Settings, Sources, describe, texts
from pipelines.diagnose import Locator, TarWatch, check_open_files, undecodable
from pipelines.handover import HandOver
from pipelines.index import read_sample
from pipelines.labels import LabelReader
from pipelines.loader import Batch, Loader, check_state
from pipelines.quarantine import Quarantine, RowId
from pipelines.segments import Part, Segment, plan_epoch
from pipelines.shards import ShardSet, read_image
from pipelines.substitute import MARK, index_files
from pipelines.usable import unusable

if TYPE_CHECKING:
    from pipelines import DataConfig


T = TypeVar("T")

# Large enough that changing pipelines costs nothing, small enough that a pipeline is made, and a stopped one understood, within
# seconds. Of remote shards the copies of a segment have to be on the disk, and should be of two.
SEGMENT_SAMPLES, REMOTE_SEGMENT_SAMPLES = 262_144, 16_384

CLOSED = "the loader is closed"


class DALILoader(Loader):
    """Decodes and augments on `device` while the model computes.

    An epoch is read in segments (`pipelines/segments.py`), each by a pipeline of its own; the next one is made ready while one
    runs. An epoch of training has as many whole batches as the smallest rank's share allows. An epoch of validation has each
    sample of the rank's share once, in the order of the shards; its last batch may be smaller, and a rank without samples has
    no batch.

    A sample that cannot be used is left out: its batch is smaller by one, and everything else is as if it had been good.
    (A batch of training with fewer than two good samples is made up to two with others, so that all ranks take equally many
    steps, and batch normalization has something to average.)

    Args:
        shards: What to read.
        config: Augmentation, shuffling, and what to do about bad samples.
        train: Shuffle and augment; otherwise resize and crop the centre.
        batch_size: Samples a batch, on this rank.
        image_size: Side of the images, pixels.
        device: "cpu", or a CUDA device with its index.
        dtype: Of the images; float32, or float16 on a GPU.
        num_classes: Labels must be below it.
        num_threads: CPU threads that DALI uses.
        seed: Of shuffling and augmentation.
        rank: Which share of the samples.
        world_size: How many shares there are.
        quarantine: File to write bad samples to, if any.

    Raises:
        ValueError: Training on fewer samples than make one batch on every rank.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: "DataConfig",
        *,
        train: bool,
        batch_size: int,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype,
        num_classes: int,
        num_threads: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        quarantine: Path | None = None,
    ) -> None:
        self._shards, self._num_classes, self._world_size = shards, num_classes, world_size
        segment_samples = config.segment_samples or (REMOTE_SEGMENT_SAMPLES if shards.is_remote else SEGMENT_SAMPLES)
        self._settings = Settings(
            *(train, batch_size, image_size, device, dtype, num_threads, seed, rank),
            *(segment_samples, shards.label_reader.extension, config),
        )
        self._bad = Quarantine(shards, config, quarantine)
        self._hand_over = HandOver(device)
        self._watch = TarWatch([] if shards.is_remote else shards.tars)
        self._held = contextlib.ExitStack()
        self._cache: ShardCache | None = None
        if shards.is_remote:
            self._cache = self._held.enter_context(open_cache(config.cache_dir, config.cache_gigabytes))
        self._upcoming: tuple[Segment, concurrent.futures.Future[SegmentPipeline]] | None = None
        self._current: SegmentPipeline | None = None
        self._sources: Sources | None = None
        self._segments: list[Segment] = []
        self._unusable = ""
        try:
            self._go_to(0, 0)
        except Exception:
            self._held.close()
            raise

    def __len__(self) -> int:
        return sum(segment.num_batches for segment in self._segments)

    @property
    def num_bad_samples(self) -> int:
        return len(self._bad)

    def next(self) -> Batch | None:
        self._check_usable()
        try:
            while self._delivered < len(self):
                batch = self._read()
                self._delivered += 1
                self._is_fresh = False
                if batch is not None:
                    return batch
        except Exception:
            self._unusable = "the loader was stopped by an error; load a state, or make a new one"
            raise
        self._set_current(None)  # lets go of the shards, which others may be waiting for
        return None

    def reset(self) -> None:
        self._check_usable()
        if not self._is_fresh:
            self._go_to(self._following_epoch(), 0)

    def _check_usable(self) -> None:
        if self._unusable:
            raise ValueError(self._unusable)

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
        self._prepare(None)
        self._set_current(None)
        self._hand_over.close()
        self._held.close()
        self._sources, self._segments = None, []
        self._unusable = CLOSED

    def state_dict(self) -> dict[str, Any]:
        self._check_usable()
        epoch, batch = self._epoch, self._delivered
        if batch == len(self):
            epoch, batch = self._following_epoch(), 0
        checkpoint = self._current.checkpoint if self._current and not self._current.is_done else b""
        return {
            "settings": self._fingerprint(),
            "epoch": epoch,
            "batch": batch,
            "pipeline": torch.tensor(list(zlib.compress(checkpoint)), dtype=torch.uint8),
            "bad_samples": self._bad.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._unusable == CLOSED:
            raise ValueError(CLOSED)
        check_state(state, self._fingerprint())
        self._prepare(None)  # it was made with what was bad before
        self._unusable = ""
        self._bad.load_state_dict(state["bad_samples"])
        self._go_to(state["epoch"], state["batch"], zlib.decompress(bytes(state["pipeline"].tolist())))

    def _fingerprint(self) -> dict[str, int | str]:
        """What the batches depend on, but for the position."""
        shards, settings = self._shards, self._settings
        parts = [
            f"{os.path.basename(tar)} {n} {m}" for tar, n, m in zip(shards.tars, shards.lengths, shards.sizes, strict=True)
        ]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
        return {
            "data set": f"{shards.num_samples:,} samples in {len(shards.tars):,} shards ({digest})",
            "seed": settings.seed,
            "batch size": settings.batch_size,
            "number of ranks": self._world_size,
            "rank": settings.rank,
            "image size": settings.image_size,
            "number of classes": self._num_classes,
            "label key": shards.label_reader.key,
            "dtype": str(settings.dtype),
            "augmentation": str([settings.config.crop, *settings.config.augment]),
            "size schedule": " ".join(settings.config.size_schedule),
            "shuffle buffer": settings.config.shuffle_buffer,
            "segment length": min(settings.segment_samples, shards.num_samples),
            "kind of device": settings.device.type,
            "version of DALI": DALI_VERSION,
        }

    def _settings_of(self, epoch: int) -> Settings:
        settings = self._settings
        if not settings.train:
            return settings
        return dataclasses.replace(settings, image_size=settings.config.image_size_of(epoch, settings.image_size))

    def _following_epoch(self) -> int:
        return self._epoch + 1 if self._settings.train else 0

    def _plan(self, epoch: int) -> list[Segment]:
        settings = self._settings
        return plan_epoch(
            self._shards.lengths,
            train=settings.train,
            epoch=epoch,
            batch_size=settings.batch_size,
            segment_samples=settings.segment_samples,
            seed=settings.seed,
            rank=settings.rank,
            world_size=self._world_size,
        )

    def _go_to(self, epoch: int, batch: int, checkpoint: bytes = b"") -> None:
        """Makes this the position; the checkpoint is the pipeline's, where the batch is not the first of a segment."""
        self._epoch, self._delivered, self._is_fresh = epoch, batch, True
        self._segments = self._plan(epoch)
        self._set_current(None)
        self._sources = None
        if not self._segments:
            return
        segment = self._segment()
        if batch != segment.first_batch:
            self._set_current(self._open(segment, batch - segment.first_batch, checkpoint))
        elif self._cache is not None:
            self._cache.prefetch(self._remote(segment))

    def _set_current(self, pipeline: SegmentPipeline | None) -> None:
        if self._current is not None:
            self._current.close()
        self._current = pipeline
        if pipeline is not None and self._cache is not None:
            self._cache.prefetch(self._remote(self._following(pipeline.segment)))

    def _segment(self) -> Segment:
        """The segment with the next batch."""
        return next(segment for segment in self._segments if segment.end_batch > self._delivered)

    def _following(self, segment: Segment) -> Segment:
        """The segment after this one, at the end of an epoch the first of the next."""
        number = segment.number + 1
        return self._segments[number] if number < len(self._segments) else self._plan(self._following_epoch())[0]

    def _prepare(self, segment: Segment | None) -> None:
        """Has a segment's pipeline made by another thread, unless that is under way; drops one made for another segment."""
        if self._upcoming is not None:
            if self._upcoming[0] == segment:
                return
            dropped, self._upcoming = self._upcoming[1], None
            concurrent.futures.wait([dropped])
            if dropped.exception() is None:
                dropped.result().close()
        if segment is not None:
            self._upcoming = segment, _in_thread(lambda: self._open(segment))

    def _open(self, segment: Segment, delivered: int = 0, checkpoint: bytes = b"") -> SegmentPipeline:
        with contextlib.ExitStack() as held:
            with self._files(segment, held.enter_context(self._tars(segment))) as files:
                pipeline = SegmentPipeline(self._settings_of(segment.epoch), segment, files, delivered, checkpoint)
            pipeline.held = held.pop_all()  # from here on they are let go with the pipeline
            return pipeline

    @contextlib.contextmanager
    def _tars(self, segment: Segment) -> Iterator[list[str]]:
        """Local path of the tar of each part; of a remote one that of its copy, which stays there until the block ends."""
        if self._cache is None:
            yield [self._shards.tars[part.shard] for part in segment.parts]
            return
        with self._cache.hold(self._remote(segment)) as copies:
            yield list(map(str, copies))

    def _remote(self, segment: Segment) -> list[tuple[str, int]]:
        """URL and bytes of the tar of each part."""
        return [(self._shards.tars[part.shard], self._shards.sizes[part.shard]) for part in segment.parts]

    @contextlib.contextmanager
    def _files(self, segment: Segment, tars: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
        """The tar and the index of each part, for as long as a pipeline is made: the reader reads an index but once."""
        shards = self._shards
        self._watch.check_sizes(tars, [shards.sizes[part.shard] for part in segment.parts])
        with tempfile.TemporaryDirectory(prefix="googlenet-dali-") as folder:
            yield index_files(shards, tars, segment.parts, self._bad.by_shard, self._num_classes, Path(folder))

    def _read(self) -> Batch | None:
        """The next batch, once all that is bad in it has been left out; None where nothing is left of it."""
        while True:
            try:
                pipeline = self._advance()
                with record_function("dali: run"):
                    outputs = pipeline.run(self._hand_over.stream)
            except RuntimeError as error:
                self._leave_out_what_failed(error)
                continue
            images, labels, sources, reasons = self._unpack(*outputs)
            if reasons:
                with self._tars(pipeline.segment) as tars:
                    locate = Locator(self._shards, pipeline.segment.parts, tars)
                found = {row: reason for i, reason in reasons.items() for row in locate(sources[i])}
                self._leave_out(found, pipeline.segment, *pipeline.before)
                continue
            self._make_ready_what_follows(pipeline)
            return self._batch(images, labels, sources)

    def _make_ready_what_follows(self, pipeline: SegmentPipeline) -> None:
        if self._cache is not None:  # to hold two segments at once would be to wait for room and to keep it from others
            return
        if self._upcoming is None and 2 * pipeline.delivered >= pipeline.segment.num_batches:
            self._prepare(self._following(pipeline.segment))
        if pipeline.is_idle and self._upcoming is not None:
            prepared = self._upcoming[1]
            if prepared.done() and prepared.exception() is None:
                prepared.result().start()  # so that the threads have work while the last batches are used

    def _advance(self) -> SegmentPipeline:
        """The pipeline with the next batch."""
        if self._current is None or self._current.is_done:
            self._set_current(None)
            self._sources = None
            segment = self._segment()
            prepared, self._upcoming = self._upcoming, None
            if prepared is not None and prepared[0] == segment and prepared[1].exception() is None:
                self._set_current(prepared[1].result())
            else:  # what kept it from being made in advance need not do so now
                self._set_current(self._open(segment))
        assert self._current is not None
        return self._current

    def _leave_out_what_failed(self, error: RuntimeError) -> None:
        """Finds the samples that made a pipeline stop, and makes it anew without them, at the same position.

        Raises:
            ValueError: It was something else, or there are too many bad samples.
        """
        check_open_files(str(error))
        stopped, segment = self._current, self._segment()
        self._set_current(None)
        self._prepare(None)
        with self._tars(segment) as tars:
            self._watch.check_sizes(tars, [self._shards.sizes[part.shard] for part in segment.parts])
            if stopped is None:  # it could not even be made
                lacking = unusable(self._shards, self._settings.label_extension)
                found = {RowId(sample.shard, sample.row): sample.reason for sample in lacking}
            else:
                found = self._undecodable(stopped, tars, str(error))
        # A second failure in one batch: what the first has shown is known by now.
        found = {row: reason for row, reason in found.items() if row not in self._bad}
        if not found:
            raise ValueError(describe(error)) from error
        self._leave_out(found, segment, *((stopped.delivered, stopped.checkpoint) if stopped else (0, b"")))

    def _leave_out(self, found: Mapping[RowId, str], segment: Segment, delivered: int, checkpoint: bytes) -> None:
        """Sets samples aside, and goes on at that position of the segment without them."""
        self._set_current(None)
        self._prepare(None)
        self._bad.add(found, self._place())
        self._set_current(self._open(segment, delivered, checkpoint))

    def _undecodable(self, stopped: SegmentPipeline, tars: Sequence[str], message: str) -> dict[RowId, str]:
        """The samples because of which a pipeline stopped, and what is wrong with them."""
        segment = stopped.segment
        if self._sources is None or self._sources.segment != segment:
            with self._files(segment, tars) as files:
                self._sources = Sources(self._settings, segment, files)
        sources = [source for source in dict.fromkeys(self._sources.batch(stopped.delivered)) if MARK not in source]
        locate = Locator(self._shards, segment.parts, tars)
        rows = [locate(source) for source in sources]
        paths = {part.shard: tar for part, tar in zip(segment.parts, tars, strict=True)}
        images = [read_image(paths[row.shard], read_sample(self._shards.indices[row.shard], row.row)) for row, *_ in rows]

        def stops_alone(i: int) -> bool:
            shard, row = rows[i][0]
            alone = Segment(segment.epoch, segment.number, 0, 1, (Part(shard, row, row + 1),))
            try:
                with self._files(alone, [paths[shard]]) as files:
                    SegmentPipeline(dataclasses.replace(stopped.settings, batch_size=1), alone, files).run()
            except RuntimeError:
                return True
            return False

        reasons = undecodable(images, sources, message, stops_alone)
        self._watch.check_content((paths[row.shard], i in reasons) for i, (row, *_) in enumerate(rows))
        return {row: reason for i, reason in reasons.items() for row in rows[i]}

    def _place(self) -> str:
        split = f"training, epoch {self._epoch + 1}" if self._settings.train else "validation"
        return f"{split}, batch {self._delivered + 1}, rank {self._settings.rank}"

    def _unpack(self, image: Any, text: Any, source: Any) -> tuple[Tensor, NDArray[np.int64], list[str], dict[int, str]]:
        """Images, labels, sources, and what is wrong with labels, out of a pipeline's outputs, up to the end of the epoch."""
        batch_size = self._settings.batch_size
        num_left = sum(segment.num_samples for segment in self._segments) - self._delivered * batch_size
        count = min(batch_size, num_left)
        labels, reasons = parse_labels(np.asarray(text)[:count], self._shards.label_reader, self._num_classes)
        # NHWC seen as NCHW is channels_last.
        return self._hand_over(image)[:count].permute(0, 3, 1, 2), labels, texts(np.asarray(source)[:count]), reasons

    def _batch(self, images: Tensor, labels: NDArray[np.int64], sources: Sequence[str]) -> Batch | None:
        """The batch without the stand-ins; None where nothing is left of it."""
        target = torch.from_numpy(labels)
        kept = [i for i, source in enumerate(sources) if MARK not in source]
        if self._settings.train:
            stand_ins = (i for i in range(len(sources)) if i not in kept)
            kept += itertools.islice(stand_ins, max(0, 2 - len(kept)))
        if not kept:
            return None
        if len(kept) < len(sources):
            images, target = images[kept], target[kept]
        return {"image": images, "target": target.to(self._settings.device, non_blocking=True)}


def _in_thread(function: Callable[[], T]) -> concurrent.futures.Future[T]:
    """What the function gives, by a thread of its own, which the process waits for when it ends: DALI must not be cut off."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


def parse_labels(text: NDArray[np.uint8], reader: LabelReader, num_classes: int) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Class numbers, int64 `(N,)`, from the bytes of labels, uint8 `(N, longest)` padded with zeros.

    Returns:
        The numbers, and for each that is none, or not below `num_classes`, what is wrong.
    """
    labels, reasons = np.zeros(len(text), np.int64), {}
    for i, padded in enumerate(text):
        try:
            labels[i] = reader.parse(padded.tobytes().rstrip(b"\0"), "")
        except ValueError as error:
            reasons[i] = str(error).removeprefix(": ")
        if labels[i] >= num_classes:
            reasons[i] = f"class {labels[i]} is out of range; there are {num_classes} classes, from 0 on"
    return labels, reasons
