"""What a trained network makes of images, one batch after the other."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from model.load_model import Trained
from pipelines.dali.validation_decoder import ValidationDecoder
from tools.predict.inputs import Encoded, Source


@dataclass(frozen=True)
class Likely:
    """A class of an image, and its probability."""

    number: int
    name: str | None
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What the network makes of one image.

    Attributes:
        image: The image.
        classes: The likeliest first; none, where the image cannot be used.
        complaint: What is wrong with the image, or empty.
    """

    image: Encoded
    classes: tuple[Likely, ...]
    complaint: str

    def as_json(self) -> str:
        """One line."""
        label = self.image.label
        fields = {
            **self.image.place,
            **({} if label is None else {"label": {"class": label.number, "name": label.name}}),
            "predictions": [{"class": c.number, "name": c.name, "probability": c.probability} for c in self.classes],
        }
        return json.dumps(fields)

    def as_text(self) -> str:
        """A line for the image, and one for each class."""
        label = self.image.label
        shown = "" if label is None else f"  (label: {_shown(label.number, label.name)})"
        lines = [f"  {100 * c.probability:5.1f} %  {_shown(c.number, c.name)}" for c in self.classes]
        return "\n".join([f"{self.image.name}{shown}", *lines])


def predict(
    trained: Trained, sources: Iterable[Source], *, top: int, batch_size: int, device: torch.device, num_threads: int | None
) -> Iterator[Prediction]:
    """A prediction for each image, in order; there is never more than a batch of images in memory.

    Args:
        trained: The network, on `device`.
        sources: Where the images are.
        top: How many classes of each image; all, where there are fewer.
        batch_size: Images that are decoded and looked at together.
        device: Where to compute.
        num_threads: CPU threads that decode; by default one a CPU, 16 at the most.

    Raises:
        OSError: Shards cannot be read.
    """
    decoder = validation_decoder(trained, batch_size, device, num_threads)
    model = trained.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = itertools.chain.from_iterable(source.read() for source in sources)
    while batch := list(itertools.islice(images, batch_size)):
        readable = [image for image in batch if not image.problem]
        pixels, undecodable = decoder([image.content for image in readable])
        with torch.inference_mode():
            probabilities, numbers = model(pixels).softmax(1).topk(min(top, trained.num_classes))
        likeliest = iter(zip(numbers.tolist(), probabilities.tolist(), strict=True))
        problems = iter([undecodable.get(i, "") for i in range(len(readable))])
        for image in batch:
            problem = image.problem or next(problems)
            classes = () if problem else _likely(trained, *next(likeliest))
            yield Prediction(image, classes, problem or image.note)


def validation_decoder(
    trained: Trained, batch_size: int, device: torch.device, num_threads: int | None = None, *, normalized: bool = True
) -> ValidationDecoder:
    """What makes images ready for the network; not normalized they are values in [0, 1]."""
    settings = asdict(trained.preprocessing)
    if not normalized:
        settings |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    threads = num_threads or min(len(os.sched_getaffinity(0)), 16)
    return ValidationDecoder(**settings, batch_size=batch_size, device=device, num_threads=threads)


def _likely(trained: Trained, numbers: Sequence[int], probabilities: Sequence[float]) -> tuple[Likely, ...]:
    return tuple(
        Likely(number, trained.class_name(number), probability)
        for number, probability in zip(numbers, probabilities, strict=True)
    )


def _shown(number: int, name: str | None) -> str:
    return f"class {number}" if name is None else name
