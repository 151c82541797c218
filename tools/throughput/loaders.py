"""The loaders of `throughput compare` that this project's interpreter runs; see turn.py.

Each imports what it needs itself, because imports count for the time to the first batch. So plain DALI does not pay for the
imports of this project's loader.
"""

import functools
import io
from typing import Any, Literal

import torch

from pipelines.shards.members import IMAGE_EXTENSIONS
from tools.throughput import turn
from tools.throughput.turn import Batches, Task

SHUFFLE_BUFFER = 2048  # samples from which DALI's reader draws; shards are shuffled already
IMAGES = ";".join(IMAGE_EXTENSIONS)  # alternatives, for DALI and webdataset


def ours(task: Task, backend: Literal["dali", "pillow"] = "dali") -> Batches:
    """This project's loader."""
    from pipelines.augment import RandomResizedCrop
    from pipelines.build import LoaderSpec, build_loader
    from pipelines.config import DataConfig
    from pipelines.shards.shard_set import open_shards

    pattern = f"{{{','.join(task.tars)}}}" if len(task.tars) > 1 else task.tars[0]
    spec = LoaderSpec(
        split="train" if task.split == "train" else "valid",
        batch_size=task.batch_size,
        image_size=task.image_size,
        device=torch.device(task.device),
        num_threads=task.threads,
    )
    config = DataConfig(backend=backend, crop=RandomResizedCrop(scale=task.scale, ratio=task.ratio))
    with build_loader(config, spec, shards=open_shards(pattern, task.split)) as loader:
        while True:
            for batch in loader:
                yield batch["image"], batch["target"]


def dali(task: Task) -> Batches:
    """DALI as documented, with its iterator for PyTorch and a shuffle buffer of 2,048 samples.

    On a GPU it is the ResNet-50 example of DALI's repository (docs/examples/use_cases/pytorch/resnet50/main.py), with its hints
    for ImageNet, but with the crop sizes of all loaders here.
    """
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    size, train, is_cuda = task.image_size, task.split == "train", task.device != "cpu"
    shuffle = {"random_shuffle": True, "initial_fill": SHUFFLE_BUFFER} if train else {}
    mean, std = ([255 * value for value in values] for values in (task.mean, task.std))
    color: dict[str, Any] = {"dtype": types.FLOAT, "output_layout": "CHW", "mean": mean, "std": std}
    decoding: dict[str, Any] = {"output_type": types.RGB, "device": "mixed" if is_cuda else "cpu"}
    resizing: dict[str, Any] = {"interp_type": types.INTERP_LINEAR, "antialias": True}
    memory = {"device_memory_padding": 211025920, "host_memory_padding": 140544512} if is_cuda else {}
    hints = {"preallocate_width_hint": 5980, "preallocate_height_hint": 6430} if is_cuda else {}

    @pipeline_def(batch_size=task.batch_size, num_threads=task.threads, device_id=torch.device(task.device).index)
    def pipeline() -> tuple[Any, Any]:
        encoded, label = fn.readers.webdataset(
            paths=list(task.tars),
            index_paths=list(task.indices),
            ext=[IMAGES, "cls"],
            case_sensitive_extensions=False,
            name="reader",
            **shuffle,
        )
        if train:
            crop = {"random_area": list(task.scale), "random_aspect_ratio": list(task.ratio)}
            images = fn.decoders.image_random_crop(encoded, **decoding, **memory, **hints, **crop)
            images = fn.resize(images, size=[size, size], **resizing)
            return fn.crop_mirror_normalize(images, mirror=fn.random.coin_flip(), **color), fn.pad(label)
        images = fn.resize(fn.decoders.image(encoded, **decoding), resize_shorter=task.resize_shorter, **resizing)
        return fn.crop_mirror_normalize(images, crop=[size, size], **color), fn.pad(label)

    iterator = DALIGenericIterator(pipeline(), ["image", "label"], reader_name="reader", auto_reset=True)
    while True:
        for [batch] in iterator:
            yield batch["image"], batch["label"]


def webdataset(task: Task) -> Batches:
    """Webdataset with Pillow. Its `WebLoader` has a process per thread, but at most one per tar."""
    import numpy as np
    import webdataset as wds  # type: ignore[import-untyped]
    from PIL import Image, ImageOps

    from pipelines.augment import RandomResizedCrop
    from pipelines.pillow import normalized, random_resized_crop, resized_center_crop

    train, crop = task.split == "train", RandomResizedCrop(scale=task.scale, ratio=task.ratio)

    @functools.cache
    def generator() -> np.random.Generator:
        return np.random.default_rng()  # made on first use, so that each process has its own

    def transformed(encoded: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        if not train:
            return normalized(resized_center_crop(image, task.image_size))
        cropped = random_resized_crop(image, task.image_size, crop, generator())
        return normalized(ImageOps.mirror(cropped) if generator().random() < 0.5 else cropped)

    samples = wds.WebDataset(list(task.tars), shardshuffle=100 if train else False, empty_check=False)
    samples = samples.shuffle(1000 if train else 0).to_tuple(IMAGES, "cls")
    samples = samples.map_tuple(transformed, int).batched(task.batch_size, partial=True)
    processes, pin = min(task.threads, len(task.tars)), task.device != "cpu"
    loader = wds.WebLoader(samples, batch_size=None, num_workers=processes, persistent_workers=True, pin_memory=pin)
    while True:
        yield from loader


if __name__ == "__main__":
    turn.main({"ours": ours, "pillow": functools.partial(ours, backend="pillow"), "dali": dali, "webdataset": webdataset})
