"""Turns of a training job in this process: whole, and without what it may have to wait for."""

import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.distributed import alone
from model.job import build_job, train_step
from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.loader import Batch, Loader
from pipelines.meter import WARM_UP_BATCHES, Meter, Rates
from pipelines.mix import mix
from pipelines.shards.order import Deal, InOrder
from pipelines.shards.shard_set import ShardSet
from pipelines.synthetic import SyntheticLoader
from tools.bench.converters import ROOT
from tools.run.config import Config, choose_autocast_dtype, image_dtype, share_threads
from tools.throughput.process import run_measured
from tools.throughput.rounds import TurnError

CACHED_BATCHES = 4
DROP_TRIES, DROP_SECONDS = 10, 0.1

Step = Callable[[Batch], None]


@dataclass(frozen=True)
class Turn:
    """What one turn came to, by the meter that train.py has."""

    images_per_second: float
    wait_percent: float
    launch_bound_percent: float = 0.0


class CachedLoader(SyntheticLoader):
    """The same few batches again and again, as many as there would be of synthetic ones."""

    def __init__(self, batches: Sequence[Batch], num_samples: int) -> None:
        image = batches[0]["image"]
        deal = Deal(InOrder([num_samples], 1), True, len(image), 0, 1)
        super().__init__(deal, image_size=image.shape[-1], device=image.device, dtype=image.dtype, num_classes=1)
        self._batches = itertools.cycle(batches)

    def next(self) -> Batch | None:
        return None if super().next() is None else next(self._batches)


class JobTurns:
    """The job of a configuration on local shards, its model made once, its loader anew for each turn.

    So all turns read the same samples, those with which the first epoch begins.

    Args:
        config: That of train.py.
        shards: Of its training split.
        device: Where to train.
        steps: That count in a turn; the first `WARM_UP_BATCHES` batches of each epoch do not.

    Attributes:
        device: The same.
        steps: The same; may be changed between turns.
        most_seconds: After so many a turn ends with fewer steps, with one at least; may be changed, too.
        arithmetic: Its dtype, for people.
        torch_threads: As train.py shares them out.
        data_threads: The same for the loader.
    """

    def __init__(self, config: Config, shards: ShardSet, device: torch.device, steps: int) -> None:
        self.config, self._shards, self.device = config, shards, device
        self.steps, self.most_seconds = steps, math.inf
        self.torch_threads, self.data_threads = share_threads(config, device, 1)
        torch.set_num_threads(self.torch_threads)
        autocast_dtype = choose_autocast_dtype(config.precision, device)
        self._dtype = image_dtype(autocast_dtype, device)
        self._num_classes = shards.num_classes()
        self._job = build_job(
            config,
            alone(device),
            num_classes=self._num_classes,
            classes=None,
            autocast_dtype=autocast_dtype,
            steps_per_epoch=max(1, shards.num_samples // (config.batch_size * config.accumulate_steps)),
        )
        self._job.model.train()
        self.arithmetic = self._job.arithmetic
        with self._open(config.data) as loader:
            self._cached = list(itertools.islice(loader, CACHED_BATCHES))

    def model(self, torch_threads: int | None = None) -> Turn:
        """The job on one synthetic batch that lies on the device."""
        torch.set_num_threads(torch_threads or self.torch_threads)
        loader = SyntheticLoader(
            Deal(InOrder(self._shards.lengths, 1), True, self.config.batch_size, 0, 1),
            image_size=self.config.image_size,
            device=self.device,
            dtype=self._dtype,
            num_classes=self._num_classes,
        )
        turn = self._run(loader, self._step)
        torch.set_num_threads(self.torch_threads)
        return turn

    def cached(self) -> Turn:
        """The job on a few batches of its own, which stay where the loader has put them."""
        return self._run(CachedLoader(self._cached, self._shards.num_samples), self._step)

    def job(self, data: DataConfig | None = None, data_threads: int | None = None, images: int | None = None) -> Turn:
        """The job as it is, or with other data, or with steps on so many images of each batch alone; all count in the rate."""
        with self._open(data or self.config.data, data_threads) as loader:
            return self._run(loader, lambda batch: self._step(batch, images))

    def cold(self) -> Turn:
        """The job as it is after its shards have left the page cache.

        Raises:
            TurnError: They do not leave it.
        """
        drop_from_page_cache(self._shards.tars)
        return self.job()

    def loader(self, data_threads: int | None = None, data: DataConfig | None = None) -> Turn:
        """The loader alone."""
        with self._open(data or self.config.data, data_threads) as loader:
            return self._run(loader, lambda batch: None)

    def step_seconds(self, images: int) -> float:
        """What a step on so many images of a batch takes, on a CPU; the better of two, after one that finds memory."""
        seconds = []
        for batch in itertools.islice(itertools.cycle(self._cached), 3):
            clock = time.perf_counter()
            self._step(batch, images)
            seconds.append(time.perf_counter() - clock)
        return min(seconds[1:])

    def resized(self, size: int, folder: Path) -> DataConfig:
        """The settings for some of the shards, as many as a turn reads, with the images converted to that shorter side.

        Args:
            size: Pixels.
            folder: For the converted shards, which are made when it is not there.

        Raises:
            TurnError: The conversion failed.
        """
        data = self.config.data
        if not folder.exists():
            sample = folder.with_name(f"{folder.name}-of")
            sample.mkdir()
            for number, tar in enumerate(self._enough_tars()):
                (sample / f"{number:06d}.tar").symlink_to(os.path.abspath(tar))
            options = ["--resize", str(size), "--source", "webdataset", "--class-file", data.class_file]
            options += ["--label-key", data.label_key] if data.label_key else []
            run_measured([sys.executable, "-m", "tools.shards", "convert", sample, folder, *options], ROOT, sample, {})
        return dataclasses.replace(data, train=str(folder), index_dir="", label_key="", class_file="", quarantine=())

    def _num_batches(self) -> int:
        return self.steps * self.config.accumulate_steps

    def _enough_tars(self) -> Iterable[Path | str]:
        wanted = (self._num_batches() + WARM_UP_BATCHES) * self.config.batch_size
        before = [0, *itertools.accumulate(self._shards.lengths)]
        return [tar for tar, count in zip(self._shards.tars, before, strict=False) if count < wanted]

    def _open(self, data: DataConfig, data_threads: int | None = None) -> Loader:
        return build_loader(
            data,
            "train",
            shards=self._shards if data.train == self.config.data.train else None,
            batch_size=self.config.batch_size,
            image_size=self.config.image_size,
            device=self.device,
            dtype=self._dtype,
            num_classes=self._num_classes,
            num_threads=data_threads or self.data_threads,
            seed=self.config.seed,
        )

    def _step(self, batch: Batch, images: int | None = None) -> None:
        config, job = self.config, self._job
        options = {"num_classes": self._num_classes, "step": job.step, "seed": config.seed}
        train_step(job, *mix(config.mix, batch["image"][:images], batch["target"][:images], **options))

    def _run(self, loader: Loader, step: Step) -> Turn:
        """Epoch after epoch until enough batches count."""
        meter, steady, left = Meter(self.device), Rates(), self._num_batches()
        end = time.monotonic() + self.most_seconds
        while left:
            for number, batch in enumerate(meter.batches(loader), 1):
                step(batch)
                left -= number > WARM_UP_BATCHES
                if number > WARM_UP_BATCHES and time.monotonic() > end:
                    left = 0
                if not left or number == len(loader):
                    break
            meter.take()
            steady.add(meter.steady)
        return Turn(steady.images_per_second, steady.data_wait_percent, steady.launch_bound_percent)


def drop_from_page_cache(files: Iterable[Path | str]) -> None:
    """Makes the next reader of files fetch them from storage.

    Raises:
        TurnError: They stay, as they do in a file system in memory, or it cannot be told.
    """
    for path in files:
        for _ in range(DROP_TRIES):
            if _drop(path):
                break
            time.sleep(DROP_SECONDS)
        else:
            raise TurnError(f"not measured: {path} does not leave the page cache")


def _drop(path: Path | str) -> bool:
    """Whether a file has left the page cache; a page that somebody is using stays."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # what is not written yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)  # succeeds only for what is in memory
    except BlockingIOError:
        return True
    except OSError as error:
        raise TurnError(f"not measured: whether {path} is in the page cache cannot be told ({error.strerror})") from error
    finally:
        os.close(descriptor)
    return False
