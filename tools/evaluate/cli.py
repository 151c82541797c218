"""The command line of `evaluate`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model.config import Arch, at_least, at_most, check_arch
from pipelines.config import DataConfig
from tools.cli import log_to, run_command
from tools.parse import parse
from tools.run.config import MOST_THREADS


@dataclass(frozen=True)
class Evaluate:
    """Score a checkpoint on validation shards: raw and averaged weights, in total and class by class.

    Several GPUs share the shards under torchrun: torchrun --nproc-per-node=4 --no-python evaluate CHECKPOINT SHARDS.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """The best.pt or last.pt of a run."""
    shards: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SHARDS")]
    """Validation shards: a glob, a brace pattern, or a folder, local or at a URL (s3://, gs://)."""
    arch: str = ""
    """Factory of the checkpoint's network, as --model.arch of train.py. By default, GoogLeNet."""
    options: tuple[str, ...] = ()
    """Other arguments of the factory, as --model.options of train.py."""
    json: bool = False
    """Print the scores as one JSON object."""
    index_dir: str = DataConfig.index_dir
    """Folder of index files, as --data.index-dir of train.py."""
    image_key: str = DataConfig.image_key
    """Extension of the image in each sample, as --data.image-key of train.py."""
    label_key: str = DataConfig.label_key
    """Key of the label in each sample's .json, as --data.label-key of train.py."""
    class_file: str = DataConfig.class_file
    """File of class names, as --data.class-file of train.py."""
    cache_dir: str = DataConfig.cache_dir
    """Folder for copies of remote shards. By default, a temporary one."""
    cache_gigabytes: float = DataConfig.cache_gigabytes
    """Capacity of that folder, in 10^9 bytes."""
    on_error: Literal["skip", "stop"] = DataConfig.on_error
    """Whether to skip and count unusable samples, or to stop at the first one."""
    max_bad_fraction: float = DataConfig.max_bad_fraction
    """Share of unusable samples that ends the evaluation, as --data.max-bad-fraction of train.py."""
    quarantine: tuple[str, ...] = DataConfig.quarantine
    """Files or run folders that list unusable samples, which are then skipped from the start."""
    batch_size: int = 0
    """Images per batch and device. 0: 16 to 64 on a CPU, 16 to 256 per GPU, by memory, number of GPUs, and samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on. auto: the GPU if there is one."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Numeric precision, as --precision of train.py. auto: on a CPU with bf16 instructions, the precision of training."""
    threads: int | None = None
    """CPU threads for decoding. By default, torch and the loader share the cores."""
    torch_threads: int | None = None
    """CPU threads of torch."""

    def run(self) -> int:
        at_least(self, batch_size=0, torch_threads=1)
        check_arch("", self.arch, self.options)
        at_most("--threads", self.threads, MOST_THREADS)
        at_most("--torch-threads", self.torch_threads, MOST_THREADS)
        names = (
            *("index_dir", "image_key", "label_key", "class_file", "cache_dir", "cache_gigabytes"),
            *("on_error", "max_bad_fraction", "quarantine", "threads"),
        )
        try:
            data = DataConfig(valid=self.shards, **{name: getattr(self, name) for name in names})
        except ValueError as error:  # it names the flags of train.py
            raise ValueError(str(error).replace("--data.", "--")) from None
        log_to(sys.stderr)
        from tools.evaluate.evaluate import evaluate_checkpoint

        evaluate_checkpoint(
            self.checkpoint,
            data,
            arch=Arch(self.arch, self.options),
            batch_size=self.batch_size,
            device=self.device,
            precision=self.precision,
            torch_threads=self.torch_threads,
            as_json=self.json,
        )
        return 0


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(lambda: parse(lambda words: tyro.cli(Evaluate, prog="evaluate", args=words), arguments).run())
