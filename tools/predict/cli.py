"""The command line of `predict`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model.config import Arch, check_arch
from pipelines.bad_samples.limits import MAX_PIXELS, check_max_pixels
from pipelines.printable import printable
from tools.cli import run_command
from tools.parse import parse

MAX_VALUE = 1024  # DALI ends the process if, for example, the number of threads exceeds what a machine can have


@dataclass(frozen=True)
class Predict:
    """Classify images with a trained network: print the most probable classes of each image.

    Images are decoded and resized as in validation. The output keeps the order of the input. Unusable images are skipped, and
    reported on standard error with the reason.

    Exit status: 0 if at least one image was predicted; 1 if none was, or if an error occurred; 2 for a mistake in the command
    or its input; 130 if interrupted.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """The best.pt or last.pt of a run."""
    images: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGES ...", help_behavior_hint="(required)")
    ]
    """Image files or a quoted glob; folders, searched recursively; shards: a folder, tar, glob or brace pattern, or its URL."""
    top: int = 5
    """Number of classes to print per image."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """auto: those that scored better in validation. ema: averaged over the training steps. raw: from the last step."""
    arch: str = ""
    """Factory of the checkpoint's network, as --model.arch of train.py. By default, GoogLeNet."""
    options: tuple[str, ...] = ()
    """Other arguments of the factory, as --model.options of train.py."""
    json: bool = False
    """Print one JSON object per line; docs/after-training.md lists its keys."""
    split: str = "valid"
    """Split to read from a folder of shards that holds several."""
    image_key: str = ""
    """Extension of the image in each sample of shards, such as input.jpg. By default any extension of an image."""
    label_key: str = ""
    """Key of the label in each sample's .json, a.b for nested keys. By default, the label is read from .cls if there is one."""
    batch_size: int = 32
    """Images per batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on. auto: the GPU if there is one."""
    threads: int | None = None
    """CPU threads for decoding. Default: one per CPU, at most 16."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels, as their header states them. Default: Pillow's limit."""

    def run(self) -> int:
        self._check()
        from model.distributed import choose_device
        from model.load_model import load_model
        from tools.considerate import considerate_threads
        from tools.predict.inputs import open_inputs
        from tools.predict.predict import predict

        device = choose_device(self.device)
        trained = load_model(self.checkpoint, self.weights, device, Arch(self.arch, self.options))
        images = open_inputs(self.images, self.split, self.label_key, trained.classes, self.image_key)
        print(f"weights: {trained.weights} ({trained.why})", file=sys.stderr)
        count = 0
        predictions = predict(
            trained,
            images,
            top=self.top,
            batch_size=self.batch_size,
            device=device,
            num_threads=self.threads,
            max_pixels=self.max_pixels,
        )
        with considerate_threads(device):
            for prediction in predictions:
                if prediction.problem:
                    print(printable(f"{prediction.image.name}: {prediction.problem}"), file=sys.stderr)
                if prediction.scores:
                    print(prediction.as_json() if self.json else prediction.as_text(), flush=True)
                    count += 1
        if not count:
            print("error: no image could be predicted", file=sys.stderr)
        return 0 if count else 1

    def _check(self) -> None:
        if not self.images:
            raise ValueError("name images, folders or shards after the checkpoint")
        check_arch("", self.arch, self.options)
        check_max_pixels(self.max_pixels)
        for name in ("top", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_VALUE:
                raise ValueError(f"--{name.replace('_', '-')} {value}: a number from 1 to {MAX_VALUE} is needed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. `--help` lists the exit statuses."""
    run_command(lambda: parse(lambda words: tyro.cli(Predict, prog="predict", args=words), arguments).run())
