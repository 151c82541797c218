"""Every setting of a training run; its fields are the flags of train.py, their docstrings the help."""

import dataclasses
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from model.distributed import World
from model.googlenet import Init
from model.optim import OptimConfig
from pipelines.config import DataConfig
from pipelines.mix import MixConfig
from pipelines.tuned import SETTINGS, cores_of_a_process, foreign, read_tuned, with_tuned

log = logging.getLogger("train")

CPU_BATCH_SIZE = 64
# Where the batch size is left open. Smaller batches leave a large GPU waiting for the CPU that launches its kernels.
GPU_BATCH_SIZES = (32, 64, 128, 256)
# What the backward pass needs of the forward pass for an image of 224 pixels in float32 is 48 MB (torch's saved_tensors_hooks).
BYTES_OF_IMAGE = 64e6
FEWEST_STEPS = 50  # an epoch: a set too small for these trains with smaller batches
LARGEST_STEP = 1024  # images of all devices: with more the default learning rate, in proportion, would need a longer warm-up


@dataclass(frozen=True)
class ModelConfig:
    """The network, its loss and its average."""

    aux_logits: bool = True
    """Train with the two auxiliary heads; they are not used afterwards."""
    aux_weight: float = 0.3
    """Weight of each auxiliary head's loss."""
    dropout: float = 0.2
    """Probability of dropping a feature before the last layer."""
    label_smoothing: float = 0.1
    """Part of a target's probability that is spread over all classes."""
    ema_decay: float = 0.999
    """How much of the averaged weights stays at each step; the average looks back on about 1 / (1 - decay) steps."""
    init: Init = "he"
    """Of the weights: He's (convolutions); as torch does it; or a truncated normal of --model.init-std."""
    init_std: float = 0.01
    """Standard deviation of --model.init truncated-normal, and of He's linear layers."""
    transform_input: bool | None = None
    """Scale the input as torchvision's published weights need it. By default as --init-from needs it; from nothing, no."""

    def __post_init__(self) -> None:
        for name in ("dropout", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"--model.{name.replace('_', '-')} {value}: a number from 0 to below 1 is needed")
        if not 0 < self.init_std < math.inf:
            raise ValueError(f"--model.init-std {self.init_std}: a positive number is needed")
        if not 0 <= self.aux_weight < math.inf:
            raise ValueError(f"--model.aux-weight {self.aux_weight}: a number from 0 on is needed")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves its state, besides at the end of each epoch; one that is resumed repeats what came after that."""

    every_steps: int | None = None
    """Steps between two saves."""
    every_minutes: float | None = None
    """Minutes between two saves."""
    keep: int = 3
    """How many of the newest states stay; where the newest cannot be read, a resumed run takes the one before."""

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"--checkpoint.every-steps {self.every_steps}: at least 1 is needed")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(f"--checkpoint.every-minutes {self.every_minutes}: a positive number is needed")
        if self.keep < 1:
            raise ValueError(f"--checkpoint.keep {self.keep}: at least 1 is needed")


@dataclass(frozen=True)
class Config:
    """Train GoogLeNet on WebDataset shards. Without --data.train: the embedded demo, with images that it draws itself."""

    recipe: Literal["demo", "paper", "imagenet", "finetune"] | None = None
    """A complete set of settings, see docs/recipes.md; every flag given beside it overrides."""
    data: DataConfig = field(default_factory=DataConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    epochs: int = 30
    """Passes over the training shards."""
    batch_size: int = 0
    """Images that each device takes at once. 0 chooses: 64 on a CPU; on a GPU 32 to 256, as its memory, the number of GPUs and
    the number of training samples allow."""
    accumulate_steps: int = 1
    """Batches whose gradients are added up for one step."""
    image_size: int = 224
    """Side of the images that the network sees, pixels; at least 32."""
    init_from: Path | None = None
    """Checkpoint, or torchvision's state dict, whose weights training begins with; its heads only for as many classes."""
    init_from_partial: bool = False
    """Take from --init-from what fits, and begin with the rest anew, in place of refusing what does not fit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Of the arithmetic. auto: on a GPU bf16, or fp16 with loss scaling where the GPU has no bf16; on a CPU fp32."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """torch.compile's mode for the training step; reduce-overhead runs it as CUDA graphs."""
    deterministic: bool = False
    """Use only kernels that give the same result each time; a step that needs another ends the run with torch's message. By
    default cuDNN tries several kernels for each layer and keeps the fastest."""
    sync_batchnorm: bool = False
    """Normalize over the batches of all GPUs together, which wait for each other in each layer; for small batches."""
    grad_clip: float | None = None
    """Greatest norm of the gradients; longer ones are scaled down to it."""
    max_nonfinite_steps: int = 25
    """Steps in a row with gradients that are not finite, each of them skipped, after which a log line ends the run."""
    torch_threads: int | None = None
    """CPU threads for the arithmetic; by default shared out with the data threads, see docs/performance.md."""
    seed: int = 0
    """Of the initial weights, the order of the samples, augmentation and dropout."""
    run_dir: Path | None = None
    """Folder for what the run writes; by default runs/DATE-TIME-PROCESS."""
    resume: Literal["no", "auto"] = "no"
    """auto: go on with the run in --run-dir where it last saved its state, or begin it where there is none."""
    log_every: int = 20
    """Steps between two log lines."""
    profile: int | None = None
    """Write a trace of so many steps, from the eleventh on, to trace.json in the run's folder, and what took
    longest in them to profile.txt."""
    evaluate: Path | None = None
    """Do not train: score this checkpoint, raw and averaged weights, on --data.valid."""
    json: bool = False
    """With --evaluate: print the scores as JSON."""

    def __post_init__(self) -> None:
        least = {"epochs": 1, "accumulate_steps": 1, "image_size": 32, "max_nonfinite_steps": 1}
        least |= {"log_every": 1, "torch_threads": 1, "seed": 0, "profile": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least {minimum} is needed")
        # Batch normalization needs two values a channel, and 32 pixels are one in the last feature map.
        if self.batch_size != 0 and self.batch_size < 2:
            raise ValueError(f"--batch-size {self.batch_size}: at least 2 is needed, or 0 to have it chosen")
        if self.compile in ("reduce-overhead", "max-autotune") and self.accumulate_steps > 1:
            raise ValueError(
                f"--compile {self.compile}: its CUDA graphs reuse the memory of gradients; "
                "--compile default goes with --accumulate-steps"
            )
        if self.compile != "no" and self.sync_batchnorm:
            raise ValueError(
                "--sync-batchnorm: no --compile goes with it, as a GPU whose batch has bad samples runs uncompiled, and the "
                "others would wait for it in other layers"
            )
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"--grad-clip {self.grad_clip}: a positive number is needed")
        if self.resume == "auto" and self.run_dir is None:
            raise ValueError("--resume auto needs --run-dir, the folder of the run to go on with")
        if self.init_from_partial and self.init_from is None:
            raise ValueError("--init-from-partial needs --init-from")
        if self.json and self.evaluate is None:
            raise ValueError("--json needs --evaluate")


def choose_batch_size(config: Config, world: World, num_samples: int) -> Config:
    """The configuration with a batch size, the same on all ranks, where it leaves the choice open.

    Args:
        config: Of the run.
        world: This process and the others.
        num_samples: Of the split that is trained on, or scored.
    """
    if config.batch_size:
        return config
    batch_size = min(world.gather(default_batch_size(config, world.device, num_samples, world.size)))
    if world.device.type == "cuda":
        log.info("--batch-size %d, chosen for %s", batch_size, torch.cuda.get_device_name(world.device))
    return dataclasses.replace(config, batch_size=batch_size)


def default_batch_size(config: Config, device: torch.device, num_samples: int, world_size: int) -> int:
    """The largest batch size of `GPU_BATCH_SIZES` for a GPU: its memory has to hold it, and an epoch needs enough steps."""
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    size = max(config.image_size, *(config.data.image_size_of(epoch, config.image_size) for epoch in range(config.epochs)))
    room = torch.cuda.get_device_properties(device).total_memory / 2 / (BYTES_OF_IMAGE * (size / 224) ** 2)
    in_a_step = min(num_samples / FEWEST_STEPS, LARGEST_STEP)
    most = min(room, in_a_step / (world_size * config.accumulate_steps))
    return max(size for size in GPU_BATCH_SIZES if size <= most or size == GPU_BATCH_SIZES[0])


def share_threads(config: Config, device: torch.device, local_world_size: int) -> tuple[int, int]:
    """CPU threads for torch and for the loader of one process; what the user has set stays."""
    cores = cores_of_a_process(local_world_size)
    if device.type == "cuda":
        # One core launches the kernels, another reads shards; a GPU that waits for either stands still.
        torch_threads, loader_threads = min(cores, torch.get_num_threads()), max(1, min(cores - 2, 16))
    else:
        # Arithmetic is far more work than decoding. On 2 cores both do best with all of them: the table in docs/performance.md.
        # torch's threads wait for each other, the longer the more there are: on larger machines it leaves some to the loader.
        loader_threads = min(cores, max(2, cores // 8))
        torch_threads = cores - cores // 8
    return config.torch_threads or torch_threads, config.data.threads or loader_threads


def apply_tuned(config: Config, device: torch.device, local_world_size: int, *, is_main: bool = True) -> Config:
    """The configuration with what `--data.tuned` says, where that is given; says so in the log.

    Args:
        config: Of the run.
        device: Of this process.
        local_world_size: Processes that share this machine.
        is_main: Whether this one says it.

    Raises:
        ValueError: The file cannot be used, or is of another kind of device.
    """
    path, data = config.data.tuned, with_tuned(config.data, device)
    if path and is_main:
        tuned = read_tuned(path)
        given = [f"--data.{name.replace('_', '-')}" for name in SETTINGS if getattr(config.data, name) is not None]
        log.info("tuned by %s: %s%s", path, tuned, f"; given, and not taken from it: {', '.join(given)}" if given else "")
        if difference := foreign(tuned, device, local_world_size):
            log.warning("--data.tuned %s was found %s; tune again here with `throughput tune`", path, difference)
    return dataclasses.replace(config, data=data)


def choose_autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of automatic mixed precision, or None for float32 throughout; sets what float32 means on a GPU."""
    if precision in ("fp16", "tf32") and device.type == "cpu":
        raise ValueError(f"--precision {precision} needs a GPU; on a CPU use bf16 or fp32")
    # By the older of torch's two interfaces: inductor asks for it by that one, and torch does not mix them.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if precision == "auto":
        if device.type == "cpu":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def image_dtype(autocast_dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of the loader's images. On a GPU with mixed precision float16 halves the memory that they take."""
    return torch.float16 if autocast_dtype and device.type == "cuda" else torch.float32
