"""On a CPU, batches are made in memory that is used again, by threads that are not more than the settings say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import Loader


def make(shards: Path, batch_size: int = 4) -> Loader:
    spec = LoaderSpec(split="train", batch_size=batch_size, image_size=32, device=torch.device("cpu"), num_threads=2)
    return build_loader(DataConfig(train=str(shards)), spec)


def test_memory_is_used_again(shards: Path) -> None:
    with make(shards) as loader:
        places = [batch["image"].data_ptr() for batch in loader]
    assert len(places) > 10
    assert len(set(places)) < 6


@pytest.mark.parametrize("part", ["batch", "image", "array"])
def test_what_is_held_does_not_change(shards: Path, part: str) -> None:
    """A part of a batch, or an array that shares its memory, holds the memory as the batch does."""
    choose = {"batch": lambda image: image, "image": lambda image: image[1:2], "array": lambda image: image.numpy()}[part]
    held, copies = [], []
    with make(shards) as loader:
        for batch in loader:
            held.append(choose(batch["image"]))
            copies.append(torch.as_tensor(held[-1]).clone())
            del batch
    assert len(held) > 10
    assert all(torch.equal(torch.as_tensor(one), copy) for one, copy in zip(held, copies, strict=True))


def test_batches_stay_after_the_loader_is_closed(shards: Path) -> None:
    loader = make(shards)
    batches = [batch["image"] for batch in loader]
    copies = [batch.clone() for batch in batches]
    loader.close()
    del loader
    with make(shards) as other:
        for _ in other:
            pass
    assert all(torch.equal(one, copy) for one, copy in zip(batches, copies, strict=True))


@pytest.mark.parametrize("augment", ["HorizontalFlip()", "ColorJitter(brightness=0.4)"])
def test_the_threads_of_a_loader_start_none_of_torch(shards: Path, augment: str) -> None:
    """Each thread that resizes or normalizes large images would have its own threads for that."""
    script = f"""
import os, sys, torch
from pipelines.augment import ColorJitter, HorizontalFlip
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
torch.set_num_threads(int(sys.argv[1]))
before = len(os.listdir("/proc/self/task"))
spec = LoaderSpec(split="train", batch_size=4, image_size=256, device=torch.device("cpu"), num_threads=2)
with build_loader(DataConfig(train={str(shards)!r}, augment=({augment},)), spec) as loader:
    for _ in loader:
        pass
    print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())
"""
    counts = []
    for torch_threads in (1, 4):
        command = [sys.executable, "-c", script, str(torch_threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        threads, of_torch = done.stdout.split()
        assert of_torch == str(torch_threads)
        counts.append(threads)
    assert counts[0] == counts[1]
