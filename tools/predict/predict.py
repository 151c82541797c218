"""Classifies images in batches."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch

from model.load_model import TrainedModel
from pipelines.bad_samples.limits import MAX_PIXELS, TIMEOUT_SECONDS
from pipelines.dali.validation_decoder import ValidationDecoder
from pipelines.printable import printable
from pipelines.watchdog import Watchdog
from tools.predict.inputs import EncodedImage

MOST_NAMES = 4  # of the images of a batch, in a message


class ClassScore(NamedTuple):
    """A class (its name is None if unknown) and its probability."""

    number: int
    name: str | None
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The result for one image.

    Attributes:
        image: The image.
        scores: The most probable classes, best first; empty if the image is unusable.
        problem: The problem with the image or its label; empty if there is none.
    """

    image: EncodedImage
    scores: Sequence[ClassScore]
    problem: str

    def as_json(self) -> str:
        """Formats the prediction as a JSON object on one line."""
        fields: dict[str, object] = {**self.image.place}
        if self.image.label is not None:
            number, name = self.image.label
            fields["label"] = {"class": number, "name": name}
        fields["predictions"] = [{"class": s.number, "name": s.name, "probability": s.probability} for s in self.scores]
        return json.dumps(fields)

    def as_text(self) -> str:
        """Formats the prediction as one line for the image and one for each class."""
        label = "" if self.image.label is None else f"  (label: {_class_text(*self.image.label)})"
        lines = [f"  {100 * s.probability:5.1f} %  {_class_text(s.number, s.name)}" for s in self.scores]
        return "\n".join(map(printable, [f"{self.image.name}{label}", *lines]))


def predict(
    trained: TrainedModel,
    images: Iterator[EncodedImage],
    *,
    top: int,
    batch_size: int,
    device: torch.device,
    num_threads: int | None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Prediction]:
    """Classifies images in order. At most one batch of images is in memory.

    Args:
        trained: The network, on `device`.
        images: Images to classify.
        top: Number of classes to return per image; all if the network has fewer.
        batch_size: Images per batch.
        device: Device to compute on.
        num_threads: CPU threads for decoding; one per CPU by default, at most 16.
        max_pixels: Images with more pixels are not decoded.

    Raises:
        OSError: A shard cannot be read.
    """
    decoder = validation_decoder(trained, batch_size, device, num_threads, max_pixels)
    watchdog = Watchdog(TIMEOUT_SECONDS)
    model = trained.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    while batch := list(itertools.islice(images, batch_size)):
        readable = [image for image in batch if not image.problem]
        with watchdog.waiting("decoding a batch", partial(_named, readable)):
            pixels, undecodable = decoder([image.content for image in readable])
        with torch.inference_mode():
            probabilities, numbers = model(pixels).softmax(1).topk(min(top, trained.num_classes))
        rows = zip(numbers.tolist(), probabilities.tolist(), strict=True)
        problems = iter([undecodable.get(i, "") for i in range(len(readable))])
        for image in batch:
            problem = image.problem or next(problems)
            best: Iterable[tuple[int, float]] = () if problem else zip(*next(rows), strict=True)
            scores = [ClassScore(number, trained.class_name(number), probability) for number, probability in best]
            if scores and math.isnan(scores[0].probability):  # of which topk makes the largest
                problem, scores = "the network's result is not a number; use a checkpoint of an earlier step", []
            yield Prediction(image, scores, problem or image.warning)


def validation_decoder(
    trained: TrainedModel,
    batch_size: int,
    device: torch.device,
    num_threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
    *,
    normalized: bool = True,
) -> ValidationDecoder:
    """Builds the decoder for a network's input. If `normalized` is false, its pixels are in [0, 1] instead."""
    settings = asdict(trained.preprocessing)
    if not normalized:
        settings |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return ValidationDecoder(**settings, batch_size=batch_size, device=device, num_threads=num_threads, max_pixels=max_pixels)


def _named(images: Sequence[EncodedImage]) -> str:
    more = f" and {len(images) - MOST_NAMES:,} more" if len(images) > MOST_NAMES else ""
    return f"its images: {', '.join(image.name for image in images[:MOST_NAMES])}{more}"


def _class_text(number: int, name: str | None) -> str:
    return f"class {number}" if name is None else name
