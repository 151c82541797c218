"""Defaults that depend on the machine and the size of the data set: precision, batch size, threads, and the schedule."""

import dataclasses
import logging

import torch

from model.distributed import World
from model.job import NEED_GPU
from pipelines.machine import num_cpus
from tools.run.config import Config

log = logging.getLogger("train")

CPU_BATCH_SIZE = 64
BATCH_SIZES = (16, 32, 64, 128, 256)
# With smaller batches, a large GPU waits for the CPU that launches its kernels. For small data sets, many steps matter more.
SMALLEST_OF_LARGE_SET = 32
# The backward pass keeps 48 MB of activations for a float32 image of 224 pixels (torch's saved_tensors_hooks).
BYTES_OF_IMAGE = 64e6
FEWEST_STEPS = 50  # per epoch: smaller data sets train with smaller batches
LARGEST_STEP = 1024  # images on all devices: above it, the scaled default learning rate would need a longer warm-up


def choose_autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Returns the dtype of automatic mixed precision, or `None` for float32; sets TF32 for the float32 of a GPU."""
    if precision in NEED_GPU and device.type == "cpu":
        raise ValueError(f"--precision {precision} needs a GPU; on a CPU use bf16 or fp32")
    # torch has two interfaces for this and refuses to mix them. Inductor reads the older one.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if precision == "auto":
        if device.type == "cpu":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def image_dtype(autocast_dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Returns the dtype of the loader's images: float16 for mixed precision on a GPU, which halves their memory."""
    return torch.float16 if autocast_dtype and device.type == "cuda" else torch.float32


def choose_batch_size(batch_size: int, world: World, *, image_size: int, num_samples: int, accumulate_steps: int = 1) -> int:
    """Returns the batch size of each rank: the one that is set, or else the smallest default of all ranks.

    Args:
        batch_size: The batch size that is set, or 0.
        world: This process and the others.
        image_size: The largest image side of the run, in pixels.
        num_samples: Samples of the split.
        accumulate_steps: Batches per optimizer step on each rank.
    """
    if batch_size:
        return batch_size
    batches_per_step = world.size * accumulate_steps
    chosen = min(world.gather(default_batch_size(world.device, image_size, num_samples, batches_per_step)))
    if world.device.type == "cuda":
        log.info("--batch-size %d, chosen for %s", chosen, torch.cuda.get_device_name(world.device))
    return chosen


def with_defaults(config: Config, world: World, num_samples: int) -> Config:
    """Returns the settings of a run with those chosen that are left open, for this machine and these training samples."""
    config = with_batch_size(config, world, num_samples)
    return config.choose(max(1, num_samples // config.global_batch_size(world.size)))


def with_batch_size(config: Config, world: World, num_samples: int) -> Config:
    """Returns the settings of a run with the batch size of `choose_batch_size`."""
    batch_size = choose_batch_size(
        config.batch_size,
        world,
        image_size=config.largest_image_size,
        num_samples=num_samples,
        accumulate_steps=config.accumulate_steps,
    )
    return dataclasses.replace(config, batch_size=batch_size)


def default_batch_size(device: torch.device, image_size: int, num_samples: int, batches_per_step: int) -> int:
    """Returns the largest batch size that fits into the GPU's memory and leaves an epoch enough steps."""
    most: float = CPU_BATCH_SIZE
    if device.type == "cuda":
        fits = torch.cuda.get_device_properties(device).total_memory / 2 / (BYTES_OF_IMAGE * (image_size / 224) ** 2)
        most = max(min(fits, LARGEST_STEP / batches_per_step), SMALLEST_OF_LARGE_SET)
    smallest = BATCH_SIZES[0] if num_samples < FEWEST_STEPS * SMALLEST_OF_LARGE_SET else SMALLEST_OF_LARGE_SET
    most = min(most, num_samples / FEWEST_STEPS / batches_per_step)
    return max(size for size in BATCH_SIZES if size <= most or size == smallest)


def share_threads(
    torch_threads: int | None, loader_threads: int | None, device: torch.device, local_world_size: int
) -> tuple[int, int]:
    """Returns the CPU threads of torch and of the loader in one process. Numbers that are set are kept.

    Args:
        torch_threads: The number that is set for torch, or `None`.
        loader_threads: The number that is set for the loader, or `None`.
        device: Device that the process trains on.
        local_world_size: Processes that share this machine.
    """
    cores = max(1, num_cpus() // local_world_size)
    if device.type == "cuda":
        # One core launches kernels, and another reads shards. A GPU that waits for either stands still.
        for_torch, for_loader = min(cores, torch.get_num_threads()), max(1, min(cores - 2, 16))
    else:
        # Training takes far more time than decoding. On 2 cores both do best with all cores (table in docs/performance.md).
        # On larger machines torch leaves some cores to the loader, because more threads wait longer for each other.
        for_torch, for_loader = cores - cores // 8, min(cores, max(2, cores // 8))
    return torch_threads or for_torch, loader_threads or for_loader
