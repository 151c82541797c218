"""Writes a trained network with its preprocessing's last step inside, once its outputs have been compared."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.load_model import Preprocessing, Trained
from tools.export.formats import INPUT, OUTPUT, Format, Run
from tools.predict.inputs import open_inputs
from tools.predict.predict import validation_decoder

MOST_CHECKED, CHECK_BATCH = 64, 16  # images
# What other kernels and another order of additions may change of a probability: so much, and this part of it.
ABSOLUTE, RELATIVE = 1e-5, 1e-3


class DifferentError(Exception):
    """The file does not give what the network gives."""


class Classifier(nn.Module):
    """From images `(N, 3, H, W)` with values in [0, 1] to the probabilities of their classes `(N, num_classes)`, float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.network = trained.model
        self.network.aux1 = self.network.aux2 = None  # nearly half of the weights, which only training uses
        self.register_buffer("mean", torch.tensor(trained.preprocessing.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(trained.preprocessing.std).view(3, 1, 1))
        self.requires_grad_(False).eval()
        # Training's order of the weights in memory is not one that torch.export saves without a warning.
        self.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std).softmax(1)


def export(trained: Trained, output: Path, file_format: Format, check: Sequence[str] = (), split: str = "valid") -> str:
    """Writes the file and gives a line about it.

    Args:
        trained: The network, on the CPU; its auxiliary heads are removed.
        output: The file, which appears whole and checked or not at all.
        file_format: Its format.
        check: Images on which to compare outputs, as for `open_inputs`; drawn ones where none are named.
        split: See `open_inputs`.

    Raises:
        ValueError: There are no images to compare outputs on.
        DifferentError: The file gives something else than the network.
    """
    size = trained.preprocessing.image_size
    pixels, normalized = _stored_images(trained, check, split) if check else _drawn_images(trained.preprocessing)
    temporary = output.with_name(f".{os.getpid()}.tmp.{output.name}")
    try:
        # Two images: an example of one is taken for a promise that there is always one.
        file_format.write(Classifier(trained), torch.rand(2, 3, size, size), metadata(trained), temporary)
        difference = largest_difference(file_format.load(temporary), trained, pixels, normalized)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    megabytes = output.stat().st_size / 1e6
    return (
        f"{output}: {file_format.title}, {megabytes:.1f} MB, {trained.weights} weights of step {trained.step:,}\n"
        f"input:  {INPUT}, float32 (N, 3, {size}, {size}), RGB from 0 to 1\n"
        f"output: {OUTPUT}, float32 (N, {trained.num_classes})\n"
        f"check:  at most {difference:.1e} from the network's on {len(pixels)} {'' if check else 'drawn '}images"
    )


def metadata(trained: Trained) -> dict[str, Any]:
    """What goes into the file beside the network."""
    preprocessing = trained.preprocessing
    return {
        "classes": trained.classes,
        "image_size": preprocessing.image_size,
        "resize_shorter": preprocessing.resize_shorter,
        "interpolation": "bilinear, antialiased",
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "normalization": "inside",
        "weights": trained.weights,
        "epoch": trained.epoch,
        "step": trained.step,
    }


def largest_difference(run: Run, trained: Trained, pixels: Tensor, normalized: Tensor) -> float:
    """Compares what a file gives with what the network gives, in batches of one and of several images.

    Args:
        run: Runs the file.
        trained: The network.
        pixels: `(N, 3, H, W)`, values in [0, 1].
        normalized: The same as the network takes them.

    Raises:
        DifferentError: A probability differs by more than arithmetic explains.
    """
    batches = [batch.contiguous() for batch in (pixels[:1], *pixels[1:].split(CHECK_BATCH)) if len(batch)]
    with torch.inference_mode():
        ours = torch.cat([run(batch) for batch in batches])
        theirs = trained.model(normalized).softmax(1)
    difference = float((ours - theirs).abs().max())
    if not torch.allclose(ours, theirs, RELATIVE, ABSOLUTE):
        raise DifferentError(
            f"not written: the file's probabilities differ from the network's by up to {difference:.3g}, which is more than "
            "arithmetic explains"
        )
    return difference


def _stored_images(trained: Trained, check: Sequence[str], split: str) -> tuple[Tensor, Tensor]:
    """The first images as the file is to be given them, and as the network is: both decoded and resized by validation's graph.

    Raises:
        ValueError: There is not one that can be used.
    """
    sources = open_inputs(check, split, "", trained.classes)
    images = itertools.chain.from_iterable(source.read() for source in sources)
    contents = [image.content for image in itertools.islice(images, MOST_CHECKED) if not image.problem]
    cpu = torch.device("cpu")
    pixels, _ = validation_decoder(trained, MOST_CHECKED, cpu, normalized=False)(contents)
    normalized, _ = validation_decoder(trained, MOST_CHECKED, cpu)(contents)
    if not len(pixels):
        raise ValueError(f"--check {' '.join(check)}: not one of the first {MOST_CHECKED} images can be used")
    return pixels, normalized


def _drawn_images(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """The same of images that are drawn: noise, slopes, stripes and plain colours."""
    size = preprocessing.image_size
    noise = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    slope = torch.linspace(0, 1, size).expand(3, size, size)
    stripes = (torch.arange(size) // 4 % 2).float().expand(3, size, size)
    plain = torch.stack([torch.zeros(3), torch.ones(3), torch.tensor([1.0, 0.5, 0.0])])[:, :, None, None]
    drawn = [slope, slope.mT, stripes, stripes.mT * slope]
    pixels = torch.cat([noise, torch.stack(drawn), plain.expand(-1, -1, size, size)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return pixels, (pixels - mean) / std
