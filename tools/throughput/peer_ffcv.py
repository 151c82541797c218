"""FFCV for `throughput compare`: the file that it reads, and its loader. Imported where `peer_loaders.py` runs."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found]
from ffcv.fields.decoders import (  # type: ignore[import-not-found]
    CenterCropRGBImageDecoder,
    IntDecoder,
    RandomResizedCropRGBImageDecoder,
)
from ffcv.fields.rgb_image import IMAGE_MODES  # type: ignore[import-not-found]
from ffcv.loader import Loader, OrderOption  # type: ignore[import-not-found]
from ffcv.transforms import (  # type: ignore[import-not-found]
    NormalizeImage,
    RandomHorizontalFlip,
    Squeeze,
    ToTensor,
    ToTorchImage,
)
from ffcv.writer import DatasetWriter  # type: ignore[import-not-found]
from PIL import Image

from tools.bench.peer_writers import read_list
from tools.throughput.turn import Batches, Task

FILE = "images.beton"
QUALITY = 90  # its own default, and that of its ImageNet recipes (libffcv/ffcv-imagenet, write_imagenet.sh)


class Encoded(RGBImageField):  # type: ignore[misc]
    """Images out of the bytes of their files, encoded anew, as FFCV does by itself."""

    def __init__(self) -> None:
        super().__init__(write_mode="jpg", jpeg_quality=QUALITY)

    def encode(self, destination: Any, encoded: bytes, malloc: Any) -> None:
        with Image.open(io.BytesIO(encoded)) as image:
            super().encode(destination, np.asarray(image.convert("RGB")), malloc)


class Original(Encoded):
    """JPEGs as they are, and other files encoded: the same bytes as everybody else has."""

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


class Files:
    """Bytes and class number of each image."""

    def __init__(self, task: Task) -> None:
        self._entries = read_list(task.list)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        path, label = self._entries[index]
        return Path(path).read_bytes(), label


def write(task: Task, field: type[Encoded]) -> None:
    """The file that the loader reads, into the task's folder."""
    Path(task.folder).mkdir()
    fields = {"image": field(), "label": IntField()}
    DatasetWriter(str(Path(task.folder) / FILE), fields, num_workers=task.threads).from_indexed_dataset(Files(task))


def load(task: Task) -> Batches:
    """As its ImageNet recipe has it, but normalized on the CPU, into float32."""
    size, train = (task.image_size, task.image_size), task.split == "train"
    mean, std = (255 * np.array(values) for values in (task.mean, task.std))
    if train:
        pixels = [RandomResizedCropRGBImageDecoder(size, tuple(task.scale), tuple(task.ratio)), RandomHorizontalFlip()]
    else:
        pixels = [CenterCropRGBImageDecoder(size, ratio=task.image_size / task.resize_shorter)]
    loader = Loader(
        str(Path(task.folder) / FILE),
        batch_size=task.batch_size,
        num_workers=task.threads,
        order=OrderOption.RANDOM if train else OrderOption.SEQUENTIAL,
        os_cache=True,
        drop_last=False,
        pipelines={
            "image": [*pixels, NormalizeImage(mean, std, np.float32), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor(), Squeeze(1)],
        },
        custom_fields={"image": RGBImageField},
    )
    while True:
        yield from loader
