"""Settings that change only the speed of the loader: the prefetch depth, the load of the hardware decoder, and the threads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nvidia.dali import backend

from tests.helpers.loader_contract import make_loader, same, saved, take

CPU = torch.device("cpu")


def first_batches(shards: Path, **data: Any) -> list[Any]:
    with make_loader(shards, "dali", "train", CPU, data=data) as loader:
        return take(loader, 16)


@pytest.mark.parametrize("prefetch", [1, 2, 4, 9])
def test_prefetch_changes_no_batch(shards: Path, prefetch: int) -> None:
    """The batches span several epochs, each of which has fewer batches than the longest queue holds."""
    assert same(first_batches(shards, prefetch=prefetch), first_batches(shards))


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (None, 3), (3, None)])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_resumed_with_another_depth(shards: Path, split: str, before: int | None, after: int | None) -> None:
    with make_loader(shards, "dali", split, CPU, data={"prefetch": before}) as loader:
        batches, states = [], []
        for _ in range(12):
            states.append(saved(loader.state_dict()))
            batches += take(loader, 1)
    for position in range(10):
        with make_loader(shards, "dali", split, CPU, data={"prefetch": after}) as resumed:
            resumed.load_state_dict(states[position])
            assert same(take(resumed, 2), batches[position : position + 2]), position


def test_on_a_cpu_dali_works_on_a_batch_more_than_its_default(shards: Path) -> None:
    for prefetch, depth in ((None, 3), (5, 5)):
        with make_loader(shards, "dali", "train", CPU, data={"prefetch": prefetch}) as loader:
            take(loader, 1)
            assert loader._pipeline.queue_depth == depth  # type: ignore[attr-defined]


def test_a_cpu_has_no_hardware_decoder(shards: Path) -> None:
    assert same(first_batches(shards, hw_decoder_load=0.3125), first_batches(shards))
    for decoder in ("Image", "ImageRandomCrop"):  # the default that --help states
        schema = backend.GetSchema(f"decoders__{decoder}")
        assert float(schema.GetArgumentDefaultValueString("hw_decoder_load")) == pytest.approx(0.65)


def test_threads_of_the_caller_come_first(shards: Path) -> None:
    for threads, num_threads, expected in ((None, None, 4), (3, None, 3), (3, 1, 1)):
        with make_loader(shards, "dali", "train", CPU, data={"threads": threads}, num_threads=num_threads) as loader:
            take(loader, 1)
            assert len(loader._pipeline._parts) == expected  # type: ignore[attr-defined]
