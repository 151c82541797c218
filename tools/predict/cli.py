"""The command line of `python -m tools.predict`."""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tools.cli import run_command

EPILOG = """Exit status: 0 at least one image was predicted; 1 not one was, or something failed on the way; 2 a mistake in the
command or its input, said in one line; 130 interrupted. Images that cannot be used are named on the standard error, with the
reason, and passed over."""

MOST = 1024  # of threads, for one: DALI ends the process over numbers that no machine has


@dataclass(frozen=True)
class Predict:
    """Say what a trained network makes of images: the likeliest classes of each, with their probabilities.

    Images are decoded and resized as in validation, and come out in the order in which they go in.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """best.pt or last.pt of a run."""
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGES ...")]
    """Image files, or a quoted glob of them; folders, of which all images at any depth are taken; shards, as a folder, a
    tar, a glob or a brace pattern, here or at a URL."""
    top: int = 5
    """How many classes of each image."""
    weights: Literal["ema", "raw"] = "ema"
    """ema: averaged over the steps of training. raw: those of the last step."""
    json: bool = False
    """Print one JSON object a line; docs/after-training.md has its keys."""
    split: str = "valid"
    """Of shards in a folder with several splits."""
    label_key: str = ""
    """Key of the label in each sample's .json, a.b for nested ones. Without it the label is the sample's .cls, if any."""
    batch_size: int = 32
    """Images that are decoded and looked at together."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes the GPU if there is one."""
    threads: int | None = None
    """CPU threads that decode; by default one a CPU, 16 at the most."""

    def run(self) -> int:
        self._check()
        from model.distributed import choose_device
        from model.load_model import load_trained
        from tools.predict.inputs import open_inputs
        from tools.predict.predict import predict

        device = choose_device(self.device)
        trained = load_trained(self.checkpoint, self.weights, device)
        sources = open_inputs(self.images, self.split, self.label_key, trained.classes)
        count = 0
        for prediction in predict(
            trained, sources, top=self.top, batch_size=self.batch_size, device=device, num_threads=self.threads
        ):
            if prediction.complaint:
                print(f"{prediction.image.name}: {prediction.complaint}", file=sys.stderr)
            if prediction.classes:
                print(prediction.as_json() if self.json else prediction.as_text(), flush=True)
                count += 1
        if not count:
            print("error: not one image could be predicted", file=sys.stderr)
        return 0 if count else 1

    def _check(self) -> None:
        if not self.images:
            raise ValueError("name images, folders or shards after the checkpoint")
        for name in ("top", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST:
                raise ValueError(f"--{name.replace('_', '-')} {value}: a number from 1 to {MOST} is needed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit statuses are listed by `--help`."""
    description = f"{inspect.getdoc(Predict)}\n\n{EPILOG}"
    run_command(
        lambda: tyro.cli(Predict, prog="python -m tools.predict", description=description, args=arguments).run(),
    )
