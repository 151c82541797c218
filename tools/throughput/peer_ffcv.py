"""FFCV for `throughput compare`: its file and its loader. Only peer_loaders.py imports this module."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from ffcv import fields, loader, transforms  # type: ignore[import-not-found]
from ffcv.fields import decoders  # type: ignore[import-not-found]
from ffcv.fields.rgb_image import IMAGE_MODES  # type: ignore[import-not-found]
from ffcv.writer import DatasetWriter  # type: ignore[import-not-found]
from PIL import Image

from tools.throughput.turn import Task

FILE = "images.beton"
QUALITY = 90  # FFCV's default, also in its ImageNet recipes (libffcv/ffcv-imagenet, write_imagenet.sh)


class Encoded(fields.RGBImageField):  # type: ignore[misc]
    """Images from the bytes of their files, encoded anew by FFCV."""

    def __init__(self) -> None:
        super().__init__(write_mode="jpg", jpeg_quality=QUALITY)

    def encode(self, destination: Any, encoded: bytes, malloc: Any) -> None:
        with Image.open(io.BytesIO(encoded)) as image:
            super().encode(destination, np.asarray(image.convert("RGB")), malloc)


class Original(Encoded):
    """JPEGs as they are, so that all loaders have the same bytes. Other files are encoded."""

    def encode(self, destination: Any, encoded: bytes, malloc: Any) -> None:
        with Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
            is_readable = image.format == "JPEG" and image.mode in ("RGB", "L")  # libjpeg-turbo turns no CMYK into RGB
        if not is_readable:
            super().encode(destination, encoded, malloc)
            return
        destination["mode"], destination["width"], destination["height"] = IMAGE_MODES["jpg"], width, height
        destination["data_ptr"], storage = malloc(len(encoded))
        storage[:] = np.frombuffer(encoded, np.uint8)


def write(task: Task, files: Any, field: type[Encoded]) -> None:
    """Writes the file that the loader reads into the task's folder."""
    Path(task.folder).mkdir()
    columns = {"image": field(), "label": fields.IntField()}
    DatasetWriter(str(Path(task.folder) / FILE), columns, num_workers=task.threads).from_indexed_dataset(files)


def load(task: Task) -> Any:
    """Returns a loader like that of FFCV's ImageNet recipe, except that it normalizes on the CPU, to float32."""
    size, train = (task.image_size, task.image_size), task.split == "train"
    mean, std = (255 * np.array(values) for values in (task.mean, task.std))
    if train:
        crop = decoders.RandomResizedCropRGBImageDecoder(size, tuple(task.scale), tuple(task.ratio))
        pixels = [crop, transforms.RandomHorizontalFlip()]
    else:
        pixels = [decoders.CenterCropRGBImageDecoder(size, ratio=task.image_size / task.resize_shorter)]
    pixels += [transforms.NormalizeImage(mean, std, np.float32), transforms.ToTensor(), transforms.ToTorchImage()]
    return loader.Loader(
        str(Path(task.folder) / FILE),
        batch_size=task.batch_size,
        num_workers=task.threads,
        order=loader.OrderOption.RANDOM if train else loader.OrderOption.SEQUENTIAL,
        os_cache=True,
        drop_last=False,
        pipelines={"image": pixels, "label": [decoders.IntDecoder(), transforms.ToTensor(), transforms.Squeeze(1)]},
        custom_fields={"image": fields.RGBImageField},
    )
