"""Turns of a training job in this process: the whole job, and the job without what it may wait for."""

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from model.distributed import alone
from model.job import build_job
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import Batch, Loader
from pipelines.meter import WARM_UP_BATCHES, Meter, Rates
from pipelines.shards.shard_set import ShardSet
from pipelines.synthetic import SyntheticLoader
from tools.run.config import Config
from tools.run.cpu_precision import with_precision
from tools.run.resources import choose_autocast_dtype, image_dtype, share_threads
from tools.throughput.loops import take_step
from tools.throughput.process import run_measured
from tools.throughput.rounds import Turn, TurnError

CACHED_BATCHES = 4
DROP_TRIES, DROP_SECONDS = 10, 0.1


class CachedLoader(SyntheticLoader):
    """Repeats a few batches, as many times as a `SyntheticLoader` repeats its own."""

    def __init__(self, batches: Sequence[Batch], num_samples: int, spec: LoaderSpec) -> None:
        super().__init__(num_samples, spec)
        self._batches = itertools.cycle(batches)

    def next(self) -> Batch | None:
        return None if super().next() is None else next(self._batches)


class JobTurns:
    """A training job on local shards. All turns share one model; each turn opens a new loader.

    So all turns read the same samples, those of the start of the first epoch. The figures of a turn are those of the meter of
    train.py: "images_per_second", "wait_percent" and "launch_bound_percent".

    A turn times a number of steps. The first `WARM_UP_BATCHES` batches of each epoch do not count.
    """

    def __init__(self, config: Config, shards: ShardSet, device: torch.device, steps: int) -> None:
        config = with_precision(config, alone(device))
        self.config, self.device, self._shards = config, device, shards
        self._num_batches = steps * config.accumulate_steps
        self.torch_threads, self.data_threads = share_threads(config.torch_threads, config.data.threads, device, 1)
        torch.set_num_threads(self.torch_threads)
        autocast_dtype = choose_autocast_dtype(config.precision, device)
        self._spec = LoaderSpec(
            split="train",
            batch_size=config.batch_size,
            image_size=config.image_size,
            device=device,
            dtype=image_dtype(autocast_dtype, device),
            num_classes=shards.num_classes(),
            num_threads=self.data_threads,
            seed=config.seed,
        )
        self._job = build_job(
            config,
            alone(device),
            num_classes=shards.num_classes(),
            classes=None,
            autocast_dtype=autocast_dtype,
            steps_per_epoch=max(1, shards.num_samples // (config.batch_size * config.accumulate_steps)),
        )
        self._job.model.train()
        self.dtype = self._job.precision
        with self._open(config.data) as loader:
            self._cached = list(itertools.islice(loader, CACHED_BATCHES))

    def model(self, torch_threads: int | None = None) -> Turn:
        """Trains on one synthetic batch that lies on the device."""
        torch.set_num_threads(torch_threads or self.torch_threads)
        turn = self._run(SyntheticLoader(self._shards.num_samples, self._spec))
        torch.set_num_threads(self.torch_threads)
        return turn

    def cached(self) -> Turn:
        """Trains on a few batches of the job, which stay where the loader has put them."""
        return self._run(CachedLoader(self._cached, self._shards.num_samples, self._spec))

    def job(self, data: DataConfig | None = None, data_threads: int | None = None) -> Turn:
        """Runs the whole job, or the job with other data settings."""
        with self._open(data or self.config.data, data_threads) as loader:
            return self._run(loader)

    def cold(self) -> Turn:
        """Runs the whole job after dropping its shards from the page cache."""
        drop_from_page_cache(self._shards.tars)
        return self.job()

    def loader(self, data_threads: int | None = None) -> Turn:
        """Runs the loader alone."""
        with self._open(self.config.data, data_threads) as loader:
            return self._run(loader, is_training=False)

    def resized(self, size: int, folder: Path) -> DataConfig:
        """Returns settings for as many shards as a turn reads, with images converted to that shorter side, in pixels.

        Makes the shards in the folder if it does not exist.
        """
        data = self.config.data
        if not folder.exists():
            sample = folder.with_name(f"{folder.name}-of")
            sample.mkdir()
            needed = (self._num_batches + WARM_UP_BATCHES) * self.config.batch_size
            num_tars = 1 + sum(samples < needed for samples in itertools.accumulate(self._shards.lengths))
            for number, tar in enumerate(self._shards.tars[:num_tars]):
                (sample / f"{number:06d}.tar").symlink_to(os.path.abspath(tar))
            options = ["--resize", str(size), "--source", "webdataset", "--class-file", data.class_file]
            options += ["--label-key", data.label_key] if data.label_key else []
            options += ["--image-key", data.image_key] if data.image_key else []
            run_measured([sys.executable, "-m", "tools.shards", "convert", sample, folder, *options], sample)
        return dataclasses.replace(
            data, train=str(folder), index_dir="", image_key="", label_key="", class_file="", quarantine=()
        )

    def _open(self, data: DataConfig, data_threads: int | None = None) -> Loader:
        spec = dataclasses.replace(self._spec, num_threads=data_threads or self.data_threads)
        return build_loader(data, spec, shards=self._shards if data.train == self.config.data.train else None)

    def _run(self, loader: Loader, *, is_training: bool = True) -> Turn:
        """Runs epoch after epoch until enough batches count."""
        meter, steady, left = Meter(self.device), Rates(), self._num_batches
        while left:
            for number, batch in enumerate(meter.batches(loader), 1):
                if is_training:
                    take_step(self._job, self.config, batch)
                left -= number > WARM_UP_BATCHES
                if not left or number == len(loader):
                    break
            meter.take()
            steady.add(meter.steady)
        return {
            "images_per_second": steady.images_per_second,
            "wait_percent": steady.data_wait_percent,
            "launch_bound_percent": steady.launch_bound_percent,
        }


def drop_from_page_cache(files: Iterable[Path | str]) -> None:
    """Makes the next reader of the files fetch them from storage. A TurnError says that they stay, as in a RAM disk."""
    for path in files:
        tries = DROP_TRIES
        while not _drop(path):  # a page that is in use stays
            tries -= 1
            if not tries:
                raise TurnError(f"{path} does not leave the page cache")
            time.sleep(DROP_SECONDS)


def _drop(path: Path | str) -> bool:
    """Returns whether a file has left the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages that are not written yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)  # succeeds only for pages in memory
    except BlockingIOError:
        return True
    except OSError as error:
        raise TurnError(f"the system does not tell whether {path} is in the page cache ({error.strerror})") from error
    finally:
        os.close(descriptor)
    return False
