"""The processes that train together: one a device, started by torchrun; one process alone is a world of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class World:
    """This process's place among those that train together.

    Attributes:
        rank: Of this process, from 0; rank 0 is the one that writes.
        size: Number of processes.
        local_rank: Of this process on its machine.
        local_size: Number of processes on this machine.
        device: That of this process.
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
        """The sum over all ranks, in place; the tensor may be on the device or on the CPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, wish: int) -> int:
        """The greatest of what the ranks wish, the same on each; the device is not waited for."""
        if self.size == 1:
            return wish
        wishes = torch.tensor([wish])
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        return int(wishes.item())

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """What rank 0 gives, on all ranks."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def take_from_main(self, tensors: list[Tensor]) -> None:
        """Sets the tensors to those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.size > 1:
            dist.barrier()


def alone(device: torch.device) -> World:
    """A world of one process."""
    return World(rank=0, size=1, local_rank=0, local_size=1, device=device)


@contextmanager
def join_world(device_name: str) -> Iterator[World]:
    """Joins the processes that torchrun has started, and leaves them afterwards.

    Args:
        device_name: "cuda", "cpu", or "auto" for the GPU if there is one.

    Raises:
        ValueError: There is no such device.
    """
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    device = choose_device(device_name, local_rank)
    world = World(rank, size, local_rank, local_size, device)
    if size == 1:
        yield world
        return
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=_meeting_place(rank, size, local_size),
        rank=rank,
        world_size=size,
        device_id=device if on_gpu else None,
    )
    yield world
    # Not after an error, which others may not have met: NCCL would wait for them, and nobody would read what went wrong.
    dist.destroy_process_group()


def _meeting_place(rank: int, size: int, local_size: int) -> Store:
    """Where the ranks tell each other their addresses: torchrun's store, which is still there when it restarts them.

    Those who are quick would find the addresses of the processes before, and wait for them for half an hour (pytorch issue
    135712), so that each start has names of its own. torchrun counts the starts of each machine by itself: for several machines
    there is no such number.
    """
    store, *_ = next(rendezvous("env://", rank, size))
    if size > local_size:
        return store
    return PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` names, for one of the processes of this machine."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU that this build of torch can use; see 'GPU' in README.md, or use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine finds {torch.cuda.device_count()} GPUs; start no more processes "
            "(--nproc-per-node) than there are"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
