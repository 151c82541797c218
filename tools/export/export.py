"""Exports a trained network, normalization included, after comparing the outputs of the file with those of the network."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.googlenet import GoogLeNet
from model.load_model import Preprocessing, TrainedModel
from pipelines.printable import counted
from tools.export.formats import INPUT, OUTPUT, Format, Run
from tools.predict.inputs import open_inputs
from tools.predict.predict import validation_decoder

InputType = Literal["float32", "uint8"]
MAX_CHECKED, CHECK_BATCH = 64, 16  # images
# Other kernels and another order of summation may change a probability by this much.
ABSOLUTE, RELATIVE = 1e-5, 1e-3


class MismatchError(Exception):
    """The outputs of the file differ from those of the network."""


class Classifier(nn.Module):
    """Maps images `(N, 3, H, W)`, float32 in [0, 1] or uint8, to class probabilities `(N, num_classes)`, float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.network = trained.model
        if isinstance(self.network, GoogLeNet):
            self.network.aux1 = self.network.aux2 = None  # nearly half of the weights, used only in training
        self.register_buffer("mean", torch.tensor(trained.preprocessing.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(trained.preprocessing.std).view(3, 1, 1))
        self.requires_grad_(False).eval()
        # torch.export warns when it saves weights in training's memory format.
        self.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return self.network((images - self.mean) / self.std).softmax(1)


def export(
    trained: TrainedModel,
    output: Path,
    file_format: Format,
    check: Sequence[str] = (),
    split: str = "valid",
    dtype: InputType = "float32",
) -> str:
    """Writes the file if its outputs agree with the network's, and returns a summary.

    Args:
        trained: The network, on the CPU; its auxiliary heads are removed.
        output: File to write; it appears complete and checked, or not at all.
        file_format: Format of the file.
        check: Images for the comparison, as for `open_inputs`; synthetic images if empty.
        split: Split of `check`, see `open_inputs`.
        dtype: Type of the file's input: "float32" from 0 to 1, or "uint8" from 0 to 255.

    Raises:
        ValueError: `check` has no usable images, or the network's outputs are not numbers.
        MismatchError: The outputs differ.
    """
    size = trained.preprocessing.image_size
    pixels, normalized = _stored_images(trained, check, split) if check else _synthetic_images(trained.preprocessing)
    example = torch.rand(2, 3, size, size)  # of two images, because torch.export treats a batch size of one as fixed
    if dtype == "uint8":
        pixels, example = _as_uint8(pixels), _as_uint8(example)
        normalized = _normalized(pixels / 255, trained.preprocessing)
    with torch.inference_mode():
        expected = trained.model(normalized).softmax(1)
    if not expected.isfinite().all():
        raise ValueError(f"{trained.path}: the network's results are not numbers; name a checkpoint of an earlier step")
    temporary = _temporary_for(output)
    try:
        file_format.write(Classifier(trained), example, metadata(trained, dtype), temporary)
        difference = largest_difference(file_format.load(temporary), pixels, expected)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(output)
    except OSError as error:
        raise OSError(f"{output}: could not be written ({error.strerror or error}); nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)
    megabytes, images = output.stat().st_size / 1e6, counted(len(pixels), "image" if check else "synthetic image")
    return (
        f"{output}: {file_format.title}, {megabytes:.1f} MB, {trained.weights} weights of step {trained.step:,}\n"
        f"weights: {trained.why}\n"
        f"input:  {INPUT}, {dtype} (N, 3, {size}, {size}), RGB from 0 to {255 if dtype == 'uint8' else 1}\n"
        f"output: {OUTPUT}, float32 (N, {trained.num_classes})\n"
        f"check:  at most {difference:.1e} from the network's on {images}"
    )


def _temporary_for(output: Path) -> Path:
    """Creates the file that becomes the output, before the work that fills it. An export that was killed leaves it to the next.

    Raises:
        ValueError: The folder does not take a file of this name.
    """
    temporary = output.with_name(f".tmp.{output.name}")
    try:
        temporary.touch()
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written ({error.strerror})") from error
    return temporary


def metadata(trained: TrainedModel, dtype: InputType) -> dict[str, Any]:
    """Returns the metadata to store beside the network."""
    return {
        "classes": trained.classes,
        "input": dtype,
        **asdict(trained.preprocessing),
        "interpolation": "bilinear, antialiased",
        "normalization": "inside",
        "weights": trained.weights,
        "epoch": trained.epoch,
        "step": trained.step,
    }


def largest_difference(run: Run, pixels: Tensor, expected: Tensor) -> float:
    """Compares the outputs of the file with the network's, on one image and on batches of several.

    Args:
        run: Runs the file.
        pixels: Input of the file, `(N, 3, H, W)`.
        expected: The network's probabilities, `(N, num_classes)`.

    Raises:
        MismatchError: A probability differs by more than rounding explains.
    """
    batches = [batch.contiguous() for batch in (pixels[:1], *pixels[1:].split(CHECK_BATCH)) if len(batch)]
    with torch.inference_mode():
        actual = torch.cat([run(batch) for batch in batches])
    difference = float((actual - expected).abs().max())
    if not torch.allclose(actual, expected, RELATIVE, ABSOLUTE):
        raise MismatchError(
            f"its probabilities would differ from the network's by up to {difference:.3g}, which is more than rounding explains"
            "; try the other format"
        )
    return difference


def _stored_images(trained: TrainedModel, check: Sequence[str], split: str) -> tuple[Tensor, Tensor]:
    """Decodes the first images for the file and for the network, both with the validation graph.

    Raises:
        ValueError: None of them is usable.
    """
    images = [*itertools.islice(open_inputs(check, split, "", trained.classes), MAX_CHECKED)]
    contents = [image.content for image in images if not image.problem]
    cpu = torch.device("cpu")
    pixels, undecodable = validation_decoder(trained, MAX_CHECKED, cpu, normalized=False)(contents)
    normalized, _ = validation_decoder(trained, MAX_CHECKED, cpu)(contents)
    if not len(pixels):
        first = f"{images[0].name}: {images[0].problem or undecodable[0]}"
        raise ValueError(f"--check {' '.join(check)}: none of the first {MAX_CHECKED} images can be used ({first})")
    return pixels, normalized


def _synthetic_images(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Generates noise, gradients, stripes and plain colors for the file and, normalized, for the network."""
    size = preprocessing.image_size
    noise = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    gradient = torch.linspace(0, 1, size).expand(3, size, size)
    stripes = (torch.arange(size) // 4 % 2).float().expand(3, size, size)
    patterns = torch.stack([gradient, gradient.mT, stripes, stripes.mT * gradient])
    plain = torch.stack([torch.zeros(3), torch.ones(3), torch.tensor([1.0, 0.5, 0.0])])[:, :, None, None]
    pixels = torch.cat([noise, patterns, plain.expand(-1, -1, size, size)])
    return pixels, _normalized(pixels, preprocessing)


def _normalized(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (pixels - mean) / std


def _as_uint8(pixels: Tensor) -> Tensor:
    return (255 * pixels).round().to(torch.uint8)
