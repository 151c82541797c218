"""The loaders of `throughput compare` that need other packages, each as its documentation shows; see turn.py.

They run in an interpreter that has these packages and may lack this project's. So this module needs only Python by itself.
`python -m tools.throughput.peer_loaders prepare-NAME TASK` writes the data that a loader reads into the task's folder.
"""

import dataclasses
import functools
import io
import os
import random
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from tools.throughput import turn
from tools.throughput.turn import Batches, Task, read_list

Work = Callable[[str], bytes]
Entry = tuple[str, int]
CHUNK_BYTES = 64 << 20  # the default of MDSWriter


def read_bytes(path: str) -> bytes:
    return Path(path).read_bytes()


def transforms(task: Task, library: Any) -> Callable[[Any], Any]:
    """Composes the crop and flip of a version of torchvision's transforms."""
    if task.split == "train":
        crop = library.RandomResizedCrop(task.image_size, task.scale, task.ratio)
        return library.Compose([crop, library.RandomHorizontalFlip()])
    return library.Compose([library.Resize(task.resize_shorter), library.CenterCrop(task.image_size)])


def pillow_transforms(task: Task) -> Callable[[bytes], Any]:
    """Returns a function from the bytes of a file to a normalized tensor, with Pillow and torchvision."""
    from PIL import Image
    from torchvision import transforms as v1

    transform = v1.Compose([transforms(task, v1), v1.ToTensor(), v1.Normalize(task.mean, task.std)])
    return lambda encoded: transform(Image.open(io.BytesIO(encoded)).convert("RGB"))


class Files:
    """A map-style data set of the image files of a task and their labels. `load` turns the bytes of a file into an image."""

    def __init__(self, task: Task, load: Callable[[bytes], Any] = bytes) -> None:
        self._entries, self._load = read_list(task.list), load

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self._entries[index]
        return self._load(read_bytes(path)), label


def streamed(task: Task, base: type, **options: Any) -> Any:
    """Returns a streaming data set whose images Pillow and torchvision prepare."""
    load = pillow_transforms(task)

    class Images(base):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Any, int]:
            sample = super().__getitem__(index)
            return load(sample["image"]), sample["label"]

    return Images(shuffle=task.split == "train", **options)


def load_with(loader: Callable[..., Iterable[Any]], task: Task, images: Any, **options: Any) -> Generator[Any, None, None]:
    """Yields the batches of a `DataLoader` with a process per thread, epoch after epoch."""
    options |= {"batch_size": task.batch_size, "num_workers": task.threads, "pin_memory": task.device != "cpu"}
    batches = loader(images, persistent_workers=True, **options)
    while True:
        yield from batches


def torchvision(task: Task) -> Batches:
    """`DataLoader` over image files, Pillow, and torchvision."""
    from torch.utils.data import DataLoader

    yield from load_with(DataLoader, task, Files(task, pillow_transforms(task)), shuffle=task.split == "train")


def torchvision_gpu(task: Task) -> Batches:
    """`DataLoader` reads the files. On the GPU, torchvision decodes batches of JPEGs with nvJPEG and transforms each image."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    transform, normalize = transforms(task, v2), v2.Normalize(task.mean, task.std)
    for samples in load_with(DataLoader, task, Files(task), shuffle=task.split == "train", collate_fn=list):
        encoded = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image, _ in samples]
        images = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=task.device)
        batch = torch.stack([transform(image) for image in images]).float().div_(255)
        yield normalize(batch), torch.tensor([label for _, label in samples])


def write_mds(entries: Iterable[Entry], folder: str, work: Work = read_bytes) -> None:
    """Writes Mosaic's shards, of files that `work` reads and changes."""
    from streaming import MDSWriter

    with MDSWriter(columns={"image": "bytes", "label": "int"}, out=folder, size_limit=CHUNK_BYTES) as writer:
        for entry in entries:
            writer.write(read_sample(entry, work))


def mds(task: Task) -> Batches:
    """mosaicml-streaming with Pillow and torchvision."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    images = streamed(task, StreamingDataset, local=task.folder, batch_size=task.batch_size)
    yield from load_with(DataLoader, task, images)


def write_litdata(entries: list[Entry], folder: str, num_workers: int, work: Work = read_bytes) -> None:
    """Writes LitData's chunks, of files that `work` reads and changes."""
    import litdata

    options = {"output_dir": folder, "chunk_bytes": CHUNK_BYTES, "num_workers": num_workers}
    litdata.optimize(fn=functools.partial(read_sample, work=work), inputs=entries, **options)


def read_sample(entry: Entry, work: Work) -> dict[str, Any]:
    return {"image": work(entry[0]), "label": entry[1]}


def litdata(task: Task) -> Batches:
    """LitData with Pillow and torchvision."""
    from litdata import StreamingDataLoader, StreamingDataset

    images = streamed(task, StreamingDataset, input_dir=task.folder)
    yield from load_with(StreamingDataLoader, task, images)


def spdl(task: Task) -> Batches:
    """SPDL: FFmpeg decodes, crops, resizes, and flips in threads; torch normalizes the batch."""
    import spdl.io
    import torch
    from spdl.pipeline import PipelineBuilder

    mean, std = (torch.tensor(values) * 255 for values in (task.mean, task.std))
    entries = read_list(task.list)

    def source() -> Iterator[tuple[str, int]]:
        while True:
            yield from random.sample(entries, len(entries)) if task.split == "train" else entries

    def decode(entry: tuple[str, int]) -> tuple[Any, int]:
        packets = spdl.io.demux_image(entry[0])
        filters = spdl_filters(task, packets.width, packets.height)
        return spdl.io.decode_packets(packets, filter_desc=filters), entry[1]

    def batch(samples: list[tuple[Any, int]]) -> tuple[Any, Any]:
        images = spdl.io.to_torch(spdl.io.convert_frames([frames for frames, _ in samples]))
        normalized = images.float().sub_(mean).div_(std).permute(0, 3, 1, 2)
        return normalized, torch.tensor([label for _, label in samples])

    builder = PipelineBuilder().add_source(source()).pipe(decode, concurrency=task.threads, output_order="input")
    pipeline = builder.aggregate(task.batch_size).pipe(batch).add_sink(3).build(num_threads=task.threads + 1)
    with pipeline.auto_stop():
        yield from pipeline


def spdl_filters(task: Task, width: int, height: int) -> str:
    """Returns FFmpeg's filters for an image; `area` is its antialiased one."""
    size, ending = task.image_size, "format=pix_fmts=rgb24"
    if task.split != "train":
        shorter = min(width, height)
        resized = f"scale={width * task.resize_shorter // shorter}:{height * task.resize_shorter // shorter}:flags=area"
        return f"{resized},crop={size}:{size},{ending}"
    left, top, crop_width, crop_height = random_box(task, width, height)
    flip = "hflip," if random.random() < 0.5 else ""
    return f"crop={crop_width}:{crop_height}:{left}:{top},scale={size}:{size}:flags=area,{flip}{ending}"


def random_box(task: Task, width: int, height: int) -> tuple[int, int, int, int]:
    """Draws left, top, width and height of a random resized crop; the whole image if ten draws do not fit."""
    for _ in range(10):
        area = width * height * random.uniform(*task.scale)
        ratio = task.ratio[0] * (task.ratio[1] / task.ratio[0]) ** random.random()
        crop_width, crop_height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return random.randint(0, width - crop_width), random.randint(0, height - crop_height), crop_width, crop_height
    return 0, 0, width, height


def ffcv(task: Task) -> Batches:
    """FFCV, which compiles its pipeline."""
    from tools.throughput import peer_ffcv

    batches = peer_ffcv.load(task)
    while True:
        yield from batches


def write_ffcv(task: Task, field: str) -> None:
    """Writes FFCV's file, with a class of peer_ffcv.py for the images."""
    from tools.throughput import peer_ffcv

    peer_ffcv.write(task, Files(task), getattr(peer_ffcv, field))


def prepare(name: str, task: Task) -> None:
    """Writes the data that a loader reads. The task's folder appears once it is complete."""
    unfinished = f"{task.folder}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # from an earlier failure
    PREPARE[name](dataclasses.replace(task, folder=unfinished))
    os.rename(unfinished, task.folder)


LOADERS: dict[str, Callable[[Task], Batches]] = {
    "torchvision": torchvision,
    "torchvision-gpu": torchvision_gpu,
    "mds": mds,
    "litdata": litdata,
    "spdl": spdl,
    "ffcv": ffcv,
    "ffcv-encoded": ffcv,
}
PREPARE: dict[str, Callable[[Task], None]] = {
    "mds": lambda task: write_mds(read_list(task.list), task.folder),
    "litdata": lambda task: write_litdata(read_list(task.list), task.folder, task.threads),
    "ffcv": lambda task: write_ffcv(task, "Original"),
    "ffcv-encoded": lambda task: write_ffcv(task, "Encoded"),
}

if __name__ == "__main__":
    if sys.argv[1].startswith("prepare-"):
        prepare(sys.argv[1].removeprefix("prepare-"), turn.read_task(sys.argv[2]))
    else:
        turn.main(LOADERS)
