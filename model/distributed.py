"""The processes that train together, one per device, as torchrun starts them."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

GRACE_SECONDS = 5.0  # in which all ranks that are still alive notice a broken connection, one after the other


@dataclass(frozen=True)
class World:
    """This process and the others that train with it.

    Attributes:
        rank: Rank of this process, from 0. Rank 0 writes the output of the run.
        size: Number of processes.
        local_rank: Rank of this process on its machine.
        local_size: Number of processes on this machine.
        device: Device of this process.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place. It may be on the device or on the CPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, number: int) -> int:
        """Returns the maximum over all ranks, without waiting for the device."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers.item())

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Returns the value of rank 0 on all ranks."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Overwrites the tensors with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Waits until all ranks have arrived here."""
        if self.size > 1:
            dist.barrier()


def alone(device: torch.device) -> World:
    """Returns a world of one process."""
    return World(rank=0, size=1, local_rank=0, local_size=1, device=device)


@contextmanager
def join_world(device_name: str) -> Iterator[World]:
    """Joins the processes that torchrun has started, for the duration of the context.

    Args:
        device_name: "cuda", "cpu", or "auto" for the GPU if there is one.

    Raises:
        ValueError: The device does not exist, or the environment is not that of a process of torchrun.
        OSError: Other processes do not answer. On a GPU, NCCL ends the process itself.
    """
    rank, size, local_rank, local_size = _read_environment()
    device = choose_device(device_name, local_rank)
    world = World(rank, size, local_rank, local_size, device)
    if size == 1:
        yield world
        return
    on_gpu = device.type == "cuda"
    store = _rendezvous_store(rank, size, local_size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        device_id=device if on_gpu else None,
    )
    try:
        yield world
    except RuntimeError as error:
        if "gloo" in str(error) and (silent := _silent_ranks(store, world)):
            raise OSError(
                f"no answer from rank {', '.join(map(str, silent))} of {size} processes: it has ended, cannot be reached, or "
                f"stood still for longer than the others wait ({str(error).splitlines()[0][-200:]})"
            ) from error
        raise
    # This is skipped after an error. Other ranks may not have met it, and NCCL would wait for them instead of reporting it.
    dist.destroy_process_group()


def _read_environment() -> tuple[int, int, int, int]:
    """Returns rank, number of processes, and the same on this machine, as torchrun sets them. Without it: 0, 1, 0, 1."""
    way_out = "start the processes with torchrun, or unset it to train in one process"
    rank, size, local_rank, local_size = (
        _read_number(name, default, way_out)
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if rank >= size:
        raise ValueError(f"RANK={rank} is too large for WORLD_SIZE={size}, as ranks begin with 0; {way_out}")
    # Without torchrun, LOCAL_WORLD_SIZE may be missing.
    if "LOCAL_WORLD_SIZE" in os.environ and local_rank >= local_size:
        too_large = f"LOCAL_RANK={local_rank} is too large for LOCAL_WORLD_SIZE={local_size}"
        raise ValueError(f"{too_large}, as ranks begin with 0; {way_out}")
    if size > 1:
        needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if name not in os.environ]:
            raise ValueError(f"WORLD_SIZE={size}, and {', '.join(missing)} not set; {way_out}")
        _read_number("MASTER_PORT", 0, way_out)
    return rank, size, local_rank, local_size


def _read_number(name: str, default: int, way_out: str) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} is not a whole number; {way_out}")
    return int(text)


def _silent_ranks(store: Store, world: World) -> list[int]:
    """Returns the ranks that do not notice that the connection is broken. None if the store has gone, too."""
    try:
        store.set(f"lost-{world.rank}", "")
        time.sleep(GRACE_SECONDS)
        return [rank for rank in range(world.size) if not store.check([f"lost-{rank}"])]
    except (RuntimeError, OSError):
        return []


def _rendezvous_store(rank: int, size: int, local_size: int) -> Store:
    """Returns torchrun's store, through which the ranks exchange their addresses.

    The store survives a restart. A fast rank would find the addresses of the previous processes and wait for them for half an
    hour (pytorch issue 135712), so each start gets its own prefix. torchrun counts starts per machine, so several machines have
    no common number.
    """
    store, *_ = next(rendezvous("env://", rank, size))
    if size > local_size:
        return store
    return PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Returns the device that `--device` names, for one process of this machine."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch finds no GPU that it can use; use --device cpu, or see docs/getting-started.md for drivers"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"process {local_rank} of this machine finds {count} GPU{'s' if count > 1 else ''}; start no more processes "
            "(--nproc-per-node) than there are"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
