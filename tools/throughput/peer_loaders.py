"""The loaders of `throughput compare` that need packages of their own, each as its documentation has it; see `turn.py`.

Run by an interpreter that has those packages and need not have this project's: of the project it imports only what needs
nothing but Python. `python -m tools.throughput.peer_loaders prepare-NAME TASK` writes what the loader reads, into the task's
folder.
"""

import dataclasses
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.bench.peer_writers import read_list
from tools.throughput import turn
from tools.throughput.turn import Batches, Task


def transforms(task: Task) -> Callable[[Any], Any]:
    """torchvision's, for Pillow's images."""
    from torchvision import transforms as v1  # type: ignore[import-not-found]

    ending = [v1.ToTensor(), v1.Normalize(task.mean, task.std)]
    if task.split == "train":
        return v1.Compose([v1.RandomResizedCrop(task.image_size, task.scale, task.ratio), v1.RandomHorizontalFlip(), *ending])
    return v1.Compose([v1.Resize(task.resize_shorter), v1.CenterCrop(task.image_size), *ending])


def workers(task: Task) -> dict[str, Any]:
    """What a `DataLoader` is told of its processes."""
    return {"num_workers": task.threads, "persistent_workers": True, "pin_memory": task.device != "cpu"}


def torchvision(task: Task) -> Batches:
    """`DataLoader` over image files, Pillow and torchvision, a process for each thread."""
    from torch.utils.data import DataLoader, Dataset
    from torchvision.datasets.folder import pil_loader  # type: ignore[import-not-found]

    class Images(Dataset[Any]):
        def __init__(self) -> None:
            self.entries, self.transform = read_list(task.list), transforms(task)

        def __len__(self) -> int:
            return len(self.entries)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            path, label = self.entries[index]
            return self.transform(pil_loader(path)), label

    loader = DataLoader(Images(), task.batch_size, shuffle=task.split == "train", **workers(task))
    while True:
        yield from loader


def torchvision_gpu(task: Task) -> Batches:
    """`DataLoader` reads the files; torchvision decodes a batch of JPEGs with nvJPEG, and transforms each image, on the GPU."""
    import torch
    from torch.utils.data import DataLoader, Dataset
    from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-not-found]
    from torchvision.transforms import v2  # type: ignore[import-not-found]

    class Files(Dataset[Any]):
        def __init__(self) -> None:
            self.entries = read_list(task.list)

        def __len__(self) -> int:
            return len(self.entries)

        def __getitem__(self, index: int) -> tuple[bytes, int]:
            path, label = self.entries[index]
            return Path(path).read_bytes(), label

    if task.split == "train":
        shaping = [v2.RandomResizedCrop(task.image_size, task.scale, task.ratio), v2.RandomHorizontalFlip()]
    else:
        shaping = [v2.Resize(task.resize_shorter), v2.CenterCrop(task.image_size)]
    transform, normalize = v2.Compose(shaping), v2.Normalize(task.mean, task.std)
    loader = DataLoader(Files(), task.batch_size, shuffle=task.split == "train", collate_fn=list, **workers(task))
    while True:
        for samples in loader:
            files = [torch.frombuffer(bytearray(encoded), dtype=torch.uint8) for encoded, _ in samples]
            images = decode_jpeg(files, mode=ImageReadMode.RGB, device=task.device)
            batch = torch.stack([transform(image) for image in images]).float().div_(255)
            yield normalize(batch), torch.tensor([label for _, label in samples])


def prepare_mds(task: Task) -> None:
    """Mosaic's shards."""
    from streaming import MDSWriter  # type: ignore[import-not-found]

    with MDSWriter(columns={"image": "bytes", "label": "int"}, out=task.folder, size_limit=64 << 20) as writer:
        for path, label in read_list(task.list):
            writer.write({"image": Path(path).read_bytes(), "label": label})


def mds(task: Task) -> Batches:
    """mosaicml-streaming with Pillow and torchvision."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> tuple[Any, int]:
            sample = super().__getitem__(at)
            return decoded(sample["image"], transform), sample["label"]

    transform = transforms(task)
    images = Images(local=task.folder, shuffle=task.split == "train", batch_size=task.batch_size)
    loader: Any = DataLoader(images, task.batch_size, **workers(task))
    while True:
        yield from loader


def prepare_litdata(task: Task) -> None:
    """LitData's chunks."""
    import litdata  # type: ignore[import-not-found]

    litdata.optimize(
        fn=litdata_sample, inputs=read_list(task.list), output_dir=task.folder, chunk_bytes=64 << 20, num_workers=task.threads
    )


def litdata_sample(entry: tuple[str, int]) -> dict[str, Any]:
    path, label = entry
    return {"image": Path(path).read_bytes(), "label": label}


def litdata(task: Task) -> Batches:
    """LitData with Pillow and torchvision, a process for each thread."""
    from litdata import StreamingDataLoader, StreamingDataset

    transform = transforms(task)

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Any, int]:
            sample = super().__getitem__(index)
            return decoded(sample["image"], transform), sample["label"]

    images = Images(task.folder, shuffle=task.split == "train")
    loader = StreamingDataLoader(images, batch_size=task.batch_size, **workers(task))
    while True:
        yield from loader


def decoded(encoded: bytes, transform: Callable[[Any], Any]) -> Any:
    """An image, out of the bytes of its file."""
    import io

    from PIL import Image

    return transform(Image.open(io.BytesIO(encoded)).convert("RGB"))


def spdl(task: Task) -> Batches:
    """SPDL: FFmpeg decodes, crops, resizes and flips in threads; torch normalizes the batch."""
    import spdl.io  # type: ignore[import-not-found]
    import torch
    from spdl.pipeline import PipelineBuilder  # type: ignore[import-not-found]

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

    pipeline = (
        PipelineBuilder()
        .add_source(source())
        .pipe(decode, concurrency=task.threads, output_order="input")
        .aggregate(task.batch_size)
        .pipe(batch)
        .add_sink(3)
        .build(num_threads=task.threads + 1)
    )
    with pipeline.auto_stop():
        yield from pipeline


def spdl_filters(task: Task, width: int, height: int) -> str:
    """What FFmpeg is to do with an image; `area` is its antialiased filter."""
    size, ending = task.image_size, "format=pix_fmts=rgb24"
    if task.split != "train":
        shorter = min(width, height)
        resized = f"scale={width * task.resize_shorter // shorter}:{height * task.resize_shorter // shorter}:flags=area"
        return f"{resized},crop={size}:{size},{ending}"
    left, top, crop_width, crop_height = random_box(task, width, height)
    flip = "hflip," if random.random() < 0.5 else ""
    return f"crop={crop_width}:{crop_height}:{left}:{top},scale={size}:{size}:flags=area,{flip}{ending}"


def random_box(task: Task, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random resized crop; of all of the image where ten draws do not fit."""
    for _ in range(10):
        area = width * height * random.uniform(*task.scale)
        ratio = task.ratio[0] * (task.ratio[1] / task.ratio[0]) ** random.random()
        crop_width, crop_height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return random.randint(0, width - crop_width), random.randint(0, height - crop_height), crop_width, crop_height
    return 0, 0, width, height


def prepare_ffcv(task: Task) -> None:
    """FFCV's file, with JPEGs as they are."""
    from tools.throughput import peer_ffcv

    peer_ffcv.write(task, peer_ffcv.Original)


def prepare_ffcv_encoded(task: Task) -> None:
    """FFCV's file, as its own writer makes it."""
    from tools.throughput import peer_ffcv

    peer_ffcv.write(task, peer_ffcv.Encoded)


def ffcv(task: Task) -> Batches:
    """FFCV, which compiles its pipeline."""
    from tools.throughput import peer_ffcv

    yield from peer_ffcv.load(task)


def prepare(name: str, task: Task) -> None:
    """Writes what a loader reads; the task's folder appears when all is written."""
    unfinished = f"{task.folder}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # where it failed before
    PREPARE[name](dataclasses.replace(task, folder=unfinished))
    os.rename(unfinished, task.folder)


LOADERS = {
    "torchvision": torchvision,
    "torchvision-gpu": torchvision_gpu,
    "mds": mds,
    "litdata": litdata,
    "spdl": spdl,
    "ffcv": ffcv,
    "ffcv-encoded": ffcv,
}
PREPARE = {"mds": prepare_mds, "litdata": prepare_litdata, "ffcv": prepare_ffcv, "ffcv-encoded": prepare_ffcv_encoded}

if __name__ == "__main__":
    if sys.argv[1].startswith("prepare-"):
        prepare(sys.argv[1].removeprefix("prepare-"), turn.read_task(sys.argv[2]))
    else:
        turn.main(LOADERS)
