"""The command line of `throughput`."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import tyro

from pipelines import DataConfig
from pipelines.mix import MixConfig
from tools import command

DESCRIPTION = """How fast things are here, against their peers and against what they cannot be faster than.

All competitors take turns in one run, on the same data and the same machine; what counts are the ratios.

Exit status: 0 done; 1 failed on the way, or a competitor did; 2 a mistake in the command or its input, said in one line; 130
interrupted."""


class Report(Protocol):
    """What a measurement found out: a table as text, and all figures as JSON."""

    def as_json(self) -> str: ...


def require_folder(json: Path | None) -> None:
    """Whether figures can be written to a file, before they are measured.

    Raises:
        ValueError: There is no folder for it, or it is one.
    """
    if json is not None and not json.parent.is_dir():
        raise ValueError(f"--json {json}: there is no folder {json.parent}; make it first")
    if json is not None and json.is_dir():
        raise ValueError(f"--json {json}: this is a folder; name a file in it")


def publish(report: Report, json: Path | None) -> None:
    """Prints the table and writes the figures."""
    print(report, flush=True)
    if json is not None:
        json.write_text(report.as_json() + "\n")


def _as_seen_from_here(program: str) -> str:
    """A path to it that holds in other folders too, where competitors run; a bare name is found on PATH."""
    return os.path.abspath(program) if os.sep in program else program


@dataclass(frozen=True)
class Convert:
    """Measure the conversion of images to shards.

    Three groups: `copied` writes the images as they are, against tar; `checked` decodes each of them first, against the decoder
    alone; `resized` writes smaller JPEGs, against decoding, resizing and encoding alone. Files are read from the page cache.
    Peers that are not installed are named and left out.
    """

    src: tyro.conf.Positional[Path]
    """Folder with one folder a class."""
    rounds: int = 5
    """Turns of each competitor."""
    images: int | None = None
    """So many images, repeated where SRC has fewer; by default those that there are."""
    scratch: Path | None = None
    """Folder for what the competitors write, left empty; by default the system's for temporary files."""
    resize: int = 256
    """Shorter side in pixels of the group `resized`."""
    quality: int = 90
    """Quality of its JPEGs, 1 to 100."""
    json: Path | None = None
    """File to write all figures to: every turn, medians with their intervals, hardware, versions."""
    only: tuple[str, ...] = ()
    """Names of competitors or of groups; a name that is not there gets the list of those that are."""
    peers_python: str = sys.executable
    """Interpreter of an environment in which peers are installed (litdata, mosaicml-streaming, img2dataset, opencv)."""

    def run(self) -> int:
        require_folder(self.json)
        import tempfile

        from tools.throughput.convert import benchmark

        report = benchmark(
            self.src,
            rounds=self.rounds,
            images=self.images,
            scratch=self.scratch or Path(tempfile.gettempdir()),
            resize=self.resize,
            quality=self.quality,
            only=self.only,
            peers_python=_as_seen_from_here(self.peers_python),
        )
        publish(report, self.json)
        return 1 if any(result.error for result in report.results) else 0


@dataclass(frozen=True)
class Compare:
    """Measure this project's loader against others, on the CPU, with the same images and the same work.

    `train` is a random resized crop, flip and normalization; `valid` resizes, crops the centre and normalizes. Each turn is a
    process of its own, which gives images epoch after epoch. Ratios are to DALI as its documentation has it. Peers that are
    not installed are named and left out.

    The decoder alone, beside them, decodes whole images in memory on all cores. It is no bound: in `train` DALI decodes no more
    of an image than the crop needs, and others have other decoders.
    """

    shards: tyro.conf.Positional[str]
    """Training shards, as --data.train takes them; local ones."""
    splits: tuple[Literal["train", "valid"], ...] = ("train", "valid")
    """What is done to the images."""
    rounds: int = 6
    """Turns of each loader; six are the fewest whose median has an interval of 95 %."""
    images: int = 2048
    """That a loader gives in a turn, once it is warm. All read the first shards that hold so many, one a thread at least."""
    batch_size: int = 64
    """Images a batch."""
    image_size: int = 224
    """Side of the images, pixels."""
    threads: int | None = None
    """Threads or processes that decode; by default one a CPU."""
    only: tuple[str, ...] = ()
    """Names of loaders; a name that is not there gets the list of those that are. DALI is always there."""
    peers_python: str = sys.executable
    """Interpreter of an environment in which peers are installed (torchvision, litdata, mosaicml-streaming, spdl)."""
    scratch: Path | None = None
    """Folder for what the loaders need to have written, made if need be; by default the system's for temporary files.
    Nothing is left in it."""
    json: Path | None = None
    """File to write all figures to: every turn, medians with their intervals, hardware, versions."""

    def run(self) -> int:
        require_folder(self.json)
        import tempfile

        from tools.throughput.compare import benchmark

        report = benchmark(
            self.shards,
            splits=self.splits,
            rounds=self.rounds,
            images=self.images,
            batch_size=self.batch_size,
            image_size=self.image_size,
            threads=len(os.sched_getaffinity(0)) if self.threads is None else self.threads,
            only=self.only,
            peers_python=_as_seen_from_here(self.peers_python),
            scratch=self.scratch or Path(tempfile.gettempdir()),
        )
        publish(report, self.json)
        return 1 if any(result.error for result in report.results) else 0


@dataclass(frozen=True)
class Plan:
    """Measure the planning of a conversion, with names that are made up."""

    images: int = 1_281_167
    """So many; ImageNet's by default."""
    classes: int = 1000
    """In so many classes."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        from tools.throughput.plan import measure_plan

        cost = measure_plan(self.images, self.classes)
        print(cost.as_json() if self.json else cost)
        return 0


@dataclass(frozen=True)
class Remote:
    """Measure training from a bucket against training from the disk.

    The bucket is the folder, served on this machine with a given time for each request, as a distant store has it.
    """

    shards: tyro.conf.Positional[Path]
    """Folder of shards with a training split, as `shards convert` writes it."""
    latency: float = 30.0
    """Milliseconds until each request is answered."""
    segment_samples: int = 1024
    """As --data.segment-samples: small, so that a small set has several."""
    batch_size: int = 64
    """Images a batch."""
    image_size: int = 224
    """Side of the images, pixels."""
    threads: int = 2
    """CPU threads that decode."""
    rounds: int = 5
    """Turns of each competitor."""
    json: Path | None = None
    """File to write all figures to."""

    def run(self) -> int:
        require_folder(self.json)
        from tools.throughput.remote import benchmark

        report = benchmark(
            self.shards,
            latency_seconds=self.latency / 1000,
            segment_samples=self.segment_samples,
            batch_size=self.batch_size,
            image_size=self.image_size,
            threads=self.threads,
            rounds=self.rounds,
        )
        publish(report, self.json)
        return 0


@dataclass(frozen=True)
class Step:
    """Measure the trainer's step against the barest loop that does the same arithmetic.

    Both take the same batch, which lies in memory: what the trainer takes longer is its bookkeeping.
    """

    batch_size: int = 64
    """Images a step."""
    image_size: int = 224
    """Side of the images, pixels."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As --device of train.py."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """As --precision of train.py."""
    torch_threads: int | None = None
    """CPU threads for the arithmetic; by default torch's own choice. With 1, other processes disturb least."""
    steps: int = 20
    """Steps of a turn."""
    rounds: int = 10
    """Turns of each loop."""
    json: Path | None = None
    """File to write all figures to."""

    def run(self) -> int:
        require_folder(self.json)
        if self.steps < 1 or self.rounds < 1:
            raise ValueError(f"--steps {self.steps} --rounds {self.rounds}: at least 1 of each is needed")
        from tools.throughput.step import benchmark
        from training.config import Config

        config = Config(
            epochs=1000,  # the schedule goes on all the time
            batch_size=self.batch_size,
            image_size=self.image_size,
            device=self.device,
            precision=self.precision,
            torch_threads=self.torch_threads,
        )
        report = benchmark(config, steps=self.steps, rounds=self.rounds)
        publish(report, self.json)
        return 0


@dataclass(frozen=True)
class Network:
    """What of the network its speed depends on."""

    aux_logits: bool = True
    """Train with the two auxiliary heads."""


@dataclass(frozen=True)
class Model:
    """Measure the training step alone, over precisions and batch sizes, on batches that lie on the device.

    A matrix product in the same precision, which takes turns with the steps, says what the device's arithmetic can do.
    """

    batch_sizes: tuple[int, ...] = (16, 32, 64)
    """Images a step."""
    precisions: tuple[Literal["fp32", "tf32", "bf16", "fp16"], ...] = ("fp32", "bf16")
    """As --precision of train.py; tf32 and fp16 need a GPU."""
    image_size: int = 224
    """Side of the images, pixels."""
    model: Network = Network()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As --device of train.py."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """As --compile of train.py."""
    torch_threads: int | None = None
    """CPU threads for the arithmetic; by default torch's own choice."""
    steps: int = 20
    """Steps of a turn."""
    rounds: int = 5
    """Turns of each precision with each batch size."""
    json: Path | None = None
    """File to write all figures to: every turn, medians with their intervals, hardware, versions."""

    def run(self) -> int:
        require_folder(self.json)
        if self.steps < 1 or self.rounds < 1:
            raise ValueError(f"--steps {self.steps} --rounds {self.rounds}: at least 1 of each is needed")
        if min(self.batch_sizes, default=0) < 2:
            raise ValueError(f"--batch-sizes {' '.join(map(str, self.batch_sizes))}: sizes from 2 on are needed")
        from tools.throughput.model import benchmark
        from training.config import Config, ModelConfig

        config = Config(
            epochs=1000,  # the schedule goes on all the time
            image_size=self.image_size,
            model=ModelConfig(aux_logits=self.model.aux_logits),
            device=self.device,
            compile=self.compile,
            torch_threads=self.torch_threads,
        )
        batch_sizes, precisions = dict.fromkeys(self.batch_sizes), dict.fromkeys(self.precisions)
        report = benchmark(config, batch_sizes=[*batch_sizes], precisions=[*precisions], steps=self.steps, rounds=self.rounds)
        publish(report, self.json)
        return 0


@dataclass(frozen=True)
class Train:
    """Measure a training job beside the same job without its data, and try what may make it faster.

    Job, model alone, loader alone take turns: the job whole; on shards that have left the page cache; on a few of its batches,
    held in memory; on a synthetic batch. The last line says whether data holds it up, and which of the remedies tried helped:
    other numbers of --data.threads, smaller images in the shards. Options are those of train.py, but for those that its speed
    does not depend on. --data.valid is not used.
    """

    data: DataConfig = DataConfig()
    mix: MixConfig = MixConfig()
    model: Network = Network()
    batch_size: int = 64
    """As --batch-size of train.py."""
    accumulate_steps: int = 1
    """As --accumulate-steps of train.py."""
    image_size: int = 224
    """As --image-size of train.py."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As --device of train.py."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """As --precision of train.py."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """As --compile of train.py."""
    grad_clip: float | None = None
    """As --grad-clip of train.py."""
    torch_threads: int | None = None
    """As --torch-threads of train.py."""
    seed: int = 0
    """As --seed of train.py."""
    steps: int = 20
    """Steps of a turn, after those that warm up."""
    rounds: int = 5
    """Turns of each; at least 3, as fewer say nothing of the noise."""
    json: Path | None = None
    """File to write all figures to: every turn, medians with their intervals, hardware, versions."""

    def run(self) -> int:
        require_folder(self.json)
        if not self.data.train:
            raise ValueError("--data.train is needed, the shards to train on")
        if self.data.size_schedule:
            raise ValueError("--data.size-schedule: one size is measured, that of --image-size")
        if self.steps < 1 or self.rounds < 3:
            raise ValueError(f"--steps {self.steps} --rounds {self.rounds}: at least 1 step and 3 rounds are needed")
        from tools.throughput.train import benchmark
        from training.config import Config, ModelConfig

        config = Config(
            epochs=1000,  # the schedule goes on all the time
            data=self.data,
            mix=self.mix,
            model=ModelConfig(aux_logits=self.model.aux_logits),
            batch_size=self.batch_size,
            accumulate_steps=self.accumulate_steps,
            image_size=self.image_size,
            device=self.device,
            precision=self.precision,
            compile=self.compile,
            grad_clip=self.grad_clip,
            torch_threads=self.torch_threads,
            seed=self.seed,
        )
        report = benchmark(config, steps=self.steps, rounds=self.rounds)
        publish(report, self.json)
        return 0


COMMANDS: dict[str, Callable[..., Compare | Convert | Model | Plan | Remote | Step | Train]] = {
    "compare": Compare,
    "convert": Convert,
    "model": Model,
    "plan": Plan,
    "remote": Remote,
    "step": Step,
    "train": Train,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit statuses are listed by `throughput --help`."""
    command.run(
        lambda: tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="throughput", description=DESCRIPTION, args=arguments).run()
    )
