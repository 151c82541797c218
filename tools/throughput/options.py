"""The options of `throughput`. This module imports no torch, so `--help` and mistakes are answered at once."""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from model.config import MAX_IMAGE_SIZE, at_least, at_most
from pipelines.config import DataConfig
from pipelines.mix import MixConfig
from pipelines.remote.object_store import is_url
from tools.cli import check_output
from tools.run.config import MOST_THREADS

Split = Literal["train", "valid"]
Stage = Literal["read", "headers", "decode", "resize", "normalize", "hand-over"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command. The module with the name of the class has its `benchmark`."""

    image_size: int = 224
    """Image side, in pixels."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to measure. auto: the GPU if there is one."""
    json: Path | None = None
    """File for all figures: every turn, medians with their intervals, hardware, versions."""
    plot: Path | None = None
    """PNG file for a chart of the medians with their intervals; needs matplotlib, the extra `plot`."""

    def run(self) -> int:
        """Measures, and publishes the report; returns the exit status. A ValueError says which option cannot be used."""
        for option, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None:
                check_output(option, path)
        if self.plot is not None and self.plot.suffix != ".png":
            raise ValueError(f"--plot {self.plot}: the name has to end in .png")
        if self.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib, which is not installed; pip install -e '.[plot]'")
        self.check()
        report = importlib.import_module(f"tools.throughput.{type(self).__name__.lower()}").benchmark(self)
        report.publish(self.json, self.plot)
        return 1 if report.has_failed else 0

    def check(self) -> None:
        """Raises a ValueError if an option of this command cannot be used, before the imports that take seconds."""
        raise NotImplementedError


@dataclass(frozen=True)
class Compare(Options):
    """Compare this project's loader with others, on the same images and with the same work.

    `train` is a random resized crop, flip and normalization; `valid` is resize, center crop and normalization. Each turn is a
    process of its own that loads images epoch after epoch. Ratios are relative to the baseline, DALI as documented. Peers that
    are not installed are listed and left out.

    The decoder alone decodes whole images in memory on all cores. It is not an upper bound: in `train`, DALI decodes only what
    the crop needs, and other loaders use other decoders. On a GPU, torchvision's GPU decoding takes its place.
    """

    shards: tyro.conf.Positional[str]
    """Local training shards, as --data.train takes them."""
    splits: tuple[Split, ...] = ("train", "valid")
    """Transforms to measure."""
    rounds: int = 6
    """Turns of each loader. Six are the fewest whose median has a 95 % interval."""
    images: int = 2048
    """Images to time per turn, after warm-up. All loaders read the first shards with that many, at least one per thread."""
    batch_size: int = 64
    """Images per batch."""
    threads: int | None = None
    """Threads or processes that decode; by default one per CPU."""
    only: tuple[str, ...] = ()
    """Names of loaders to measure, besides DALI. An unknown name prints the list."""
    peers_python: str = sys.executable
    """Interpreter of an environment with the peers (torchvision, litdata, mosaicml-streaming, spdl, ffcv)."""
    scratch: Path | None = None
    """Folder for the data that loaders prepare, made if necessary; by default the system's folder for temporary files. Nothing
    is left in it."""

    def check(self) -> None:
        if not self.splits:
            raise ValueError("--splits: at least 1 of train and valid is needed")
        refuse_remote(self.shards)
        at_least(self, rounds=1, images=1, batch_size=1, image_size=1, threads=1)
        at_most("--threads", self.threads, MOST_THREADS)
        at_most("--image-size", self.image_size, MAX_IMAGE_SIZE)


@dataclass(frozen=True)
class Loader(Options):
    """Measure the loader alone, and the cost of each of its stages.

    The pipelines that end with each stage take turns. Each turn is a process of its own. Options are those of train.py.
    """

    data: DataConfig = DataConfig()
    splits: tuple[Split, ...] = ("train",)
    """Splits to measure; each needs its --data."""
    stages: tuple[Stage, ...] = STAGES
    """Last stages of the pipelines. A stage costs the difference to the one before it in this list."""
    images: int = 2000
    """Images to time per turn, after warm-up."""
    batch_size: int = 0
    """As --batch-size of train.py."""
    seed: int = 0
    """As --seed of train.py."""
    rounds: int = 6
    """Turns of each pipeline."""

    def check(self) -> None:
        if not (self.splits and self.stages):
            raise ValueError("--splits and --stages: at least 1 of each is needed")
        for split in self.splits:
            if not getattr(self.data, split):
                raise ValueError(f"--data.{split} is needed, the shards to load")
            refuse_remote(getattr(self.data, split), f"--data.{split} ")
        if self.data.backend != "dali":
            raise ValueError(
                f"--data.backend {self.data.backend}: only dali has stages; `throughput compare` measures other loaders"
            )
        refuse_size_schedule(self.data)
        at_least(self, images=1, rounds=1)


@dataclass(frozen=True, kw_only=True)
class Training(Options):
    """Options of the commands that train."""

    aux_logits: Annotated[bool, tyro.conf.arg(name="model.aux-logits")] = True
    """Train GoogLeNet with its two auxiliary heads."""
    arch: Annotated[str, tyro.conf.arg(name="model.arch")] = ""
    """As --model.arch of train.py."""
    options: Annotated[tuple[str, ...], tyro.conf.arg(name="model.options")] = ()
    """As --model.options of train.py."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """As --compile of train.py."""
    torch_threads: int | None = None
    """As --torch-threads of train.py. One thread is disturbed least by other processes."""
    steps: int | None = None
    """Steps to time per turn, after warm-up; by default 20 on a GPU, 2 on a CPU."""
    rounds: int = 5
    """Turns of each competitor."""

    def steps_on(self, device_type: str) -> int:
        """Returns the steps of a turn on a type of device."""
        return self.steps or (20 if device_type == "cuda" else 2)


@dataclass(frozen=True)
class Model(Training):
    """Measure the training step alone, over precisions and batch sizes, on batches that lie on the device.

    A matrix product in the same precision takes turns with the steps. It shows what the device's arithmetic achieves.
    """

    batch_sizes: tuple[int, ...] = ()
    """Images per step; by default 64 128 256 512 on a GPU, 16 32 on a CPU."""
    precisions: tuple[Literal["fp32", "tf32", "bf16", "fp16"], ...] = ()
    """As --precision of train.py. By default tf32 bf16 on a GPU, fp32 on a CPU."""

    def check(self) -> None:
        at_least(self, steps=1, rounds=1)
        if min(self.batch_sizes, default=2) < 2:
            raise ValueError(f"--batch-sizes {' '.join(map(str, self.batch_sizes))}: sizes from 2 on are needed")


@dataclass(frozen=True)
class Train(Training):
    """Measure a training job with and without its data, and try what may make it faster.

    These take turns: the job; the job on shards that are not in the page cache; the job on a few of its batches in memory; the
    model on a synthetic batch; the loader alone. The last line says whether the data limits the job, and which changes helped:
    other numbers of --data.threads, smaller images in the shards, on a GPU other loads of its JPEG decoder. The options are
    those of train.py that affect its speed. --data.valid is not used.
    """

    data: DataConfig = DataConfig()
    mix: MixConfig = MixConfig()
    batch_size: int = 0
    """As --batch-size of train.py."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """As --precision of train.py."""
    accumulate_steps: int = 1
    """As --accumulate-steps of train.py."""
    grad_clip: float | None = None
    """As --grad-clip of train.py."""
    seed: int = 0
    """As --seed of train.py."""

    def check(self) -> None:
        if not self.data.train:
            raise ValueError("--data.train is needed, the shards to train on")
        refuse_remote(self.data.train, "--data.train ")
        refuse_size_schedule(self.data)
        at_least(self, steps=1, rounds=3)


def refuse_remote(shards: str, option: str = "") -> None:
    if is_url(shards):
        raise ValueError(f"{option}{shards}: local shards are needed; `python -m tools.bench.remote` measures buckets")


def refuse_size_schedule(data: DataConfig) -> None:
    if data.size_schedule:
        raise ValueError("--data.size-schedule: only one size is measured, --image-size")
