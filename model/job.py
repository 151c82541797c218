"""Everything that changes while training, and the step that changes it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from model.distributed import World
from model.ema import EMA
from model.googlenet import googlenet
from model.init_from import InitialWeights
from model.loss import googlenet_loss
from model.optim import build_optimizer, build_scheduler
from pipelines.loader import MEAN, STD, resize_shorter_for
from tools.run.config import Config

# What `Job.sums` adds up over the steps since the last log line, and `NUM_STEPS` of them.
HEADS = ("loss", "main_loss", "aux2_loss", "aux1_loss")
SUMS = (*HEADS, "gradient_norm", "num_steps")


@dataclass
class Job:
    """Everything that changes while training.

    Attributes:
        forward: The model as training calls it: compiled, distributed, or neither. Its weights are those of `model`.
        micro_step: Batches whose gradients the next step has so far.
        sums: `(len(SUMS),)` float32 on the device: of this rank's steps since the last log line, those skipped left out.
        parts: `(len(HEADS),)` float32 on the device: the losses of the step that is being made.
        skipped: `(2,)` float32 on the device: steps skipped for gradients that are not finite, in all and in a row up to now.
    """

    config: Config
    world: World
    model: nn.Module
    forward: Callable[[Tensor], Any]
    ema: EMA
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    autocast_dtype: torch.dtype | None
    classes: tuple[str, ...] | None
    num_classes: int
    steps_per_epoch: int
    transform_input: bool
    sums: Tensor
    parts: Tensor
    skipped: Tensor
    epoch: int = 0
    step: int = 0
    micro_step: int = 0
    best: float = 0.0
    validated: int = 0  # epochs
    scores: dict[str, float] = field(default_factory=dict)  # of the last of them
    seconds: float = 0.0  # since the run began, as of its last saved state

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # As integers: see `restore_statistics`.
        self._statistics = [buffer.view(torch.int32) for buffer in self.model.buffers() if buffer.is_floating_point()]
        self._statistics_before = [torch.empty_like(buffer) for buffer in self._statistics]

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def lr(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    @property
    def arithmetic(self) -> str:
        """Its dtype, for people."""
        return str(self.autocast_dtype or torch.float32).removeprefix("torch.")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def keep_statistics(self) -> None:
        """Notes the statistics of batch normalization as they are before a step."""
        torch._foreach_copy_(self._statistics_before, self._statistics)

    def restore_statistics(self, skip: Tensor) -> None:
        """Goes back to the statistics noted if `skip`, a float scalar on the device, is 1; nothing happens if it is 0.

        They may be infinite or no numbers now, which multiplied by 0 would stay so: hence the arithmetic on their bits.
        """
        chosen = skip.to(torch.int32)
        torch._foreach_mul_(self._statistics, 1 - chosen)
        torch._foreach_mul_(self._statistics_before, chosen)
        torch._foreach_add_(self._statistics, self._statistics_before)

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all ranks, or taken from rank 0; `rank_state` has the rest. Refers to the job's own tensors."""
        return {
            **{name: getattr(self, name).state_dict() for name in STATEFUL},
            **{name: getattr(self, name) for name in NUMBERS},
            "autocast_dtype": str(self.autocast_dtype),
            "global_batch_size": global_batch_size(self.config, self.world),
            "architecture": {
                "num_classes": self.num_classes,
                "aux_logits": self.config.model.aux_logits,
                "transform_input": self.transform_input,
            },
            "preprocessing": {
                "image_size": self.config.image_size,
                "resize_shorter": resize_shorter_for(self.config.image_size),
                "mean": MEAN,
                "std": STD,
            },
        }

    def rank_state(self) -> dict[str, Any]:
        """What each rank has of its own, small and on the CPU; the host waits for the device here."""
        rng = {"cpu": torch.get_rng_state(), "cuda": None}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {"rng": rng, "sums": self.sums.cpu(), "skipped": self.skipped.cpu()}

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: It is of other arithmetic, or of steps on another number of images.
        """
        if state["autocast_dtype"] != str(self.autocast_dtype):
            raise ValueError(
                f"--resume auto: the run was begun with arithmetic in {state['autocast_dtype']}, and on this device it would "
                f"be in {self.autocast_dtype}; --precision sets it"
            )
        images = global_batch_size(self.config, self.world)
        if state["global_batch_size"] != images:
            raise ValueError(
                f"--resume auto: the run was begun with {state['global_batch_size']} images a step, and now there are "
                f"{images}; (processes) x --batch-size x --accumulate-steps has to stay the same"
            )
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        for name in NUMBERS:
            setattr(self, name, state[name])
        self.transform_input = state["architecture"]["transform_input"]  # --init-from, which decided it, is not read again
        for network in (self.model, self.ema.module):
            setattr(network, "transform_input", self.transform_input)  # noqa: B010  (mypy knows no such attribute)
        self.sums.copy_(rank_state["sums"])
        self.skipped.copy_(rank_state["skipped"])
        torch.set_rng_state(rank_state["rng"]["cpu"])
        if self.device.type == "cuda" and rank_state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(rank_state["rng"]["cuda"], self.device)


STATEFUL = ("model", "ema", "optimizer", "scheduler", "scaler")
NUMBERS = ("classes", "epoch", "step", "best", "validated", "scores", "seconds", "steps_per_epoch")


def build_job(
    config: Config,
    world: World,
    *,
    num_classes: int,
    classes: tuple[str, ...] | None,
    autocast_dtype: torch.dtype | None,
    steps_per_epoch: int,
    initial: InitialWeights | None = None,
) -> Job:
    """A fresh model with all that trains it.

    Args:
        config: All settings.
        world: This process and the others.
        num_classes: Length of the logits.
        classes: Their names, where they are known.
        autocast_dtype: Of mixed precision, or None.
        steps_per_epoch: Updates of the weights, for the learning rate's schedule.
        initial: Weights to begin with in place of random ones.

    Raises:
        ValueError: A setting that this device does not have, or initial weights that do not fit.
    """
    assert config.batch_size, "a batch size has to be chosen first"
    device = world.device
    _choose_kernels(config)
    torch.manual_seed(config.seed)  # the same weights on all ranks
    transform_input = config.model.transform_input
    if transform_input is None:
        transform_input = initial is not None and initial.transform_input
    settings = config.model
    model: nn.Module = googlenet(
        num_classes,
        settings.aux_logits,
        transform_input,
        settings.dropout,
        init=settings.init,
        init_std=settings.init_std,
    )
    if initial is not None:
        initial(model, classes)
    if config.sync_batchnorm:
        if device.type != "cuda":
            raise ValueError("--sync-batchnorm: torch has it for GPUs only")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config.optim, global_batch_size(config, world))
    job = Job(
        config=config,
        world=world,
        model=model,
        forward=model,
        ema=EMA(model, config.model.ema_decay),
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optim, epochs=config.epochs, steps_per_epoch=steps_per_epoch),
        scaler=torch.amp.GradScaler(device.type, enabled=autocast_dtype == torch.float16),
        autocast_dtype=autocast_dtype,
        classes=classes,
        num_classes=num_classes,
        steps_per_epoch=steps_per_epoch,
        transform_input=transform_input,
        sums=torch.zeros(len(SUMS), device=device),
        parts=torch.zeros(len(HEADS), device=device),
        skipped=torch.zeros(2, device=device),
    )
    _wrap(job)
    return job


def _choose_kernels(config: Config) -> None:
    """Has torch refuse kernels that do not give the same result each time, where that is asked for."""
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        # It would fill each new tensor, which takes a kernel and decides nothing here.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class _WholeBatches(nn.Module):
    """Runs whole batches through a compiled network, and smaller ones through the network as it is.

    A batch is smaller where bad samples were left out. For each new size torch would compile the network once more in the
    middle of the run, and after eight sizes it would give up compiling.

    Args:
        model: The network.
        mode: Of torch.compile.
        batch_size: Images in a whole batch.
    """

    def __init__(self, model: nn.Module, mode: str, batch_size: int) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.compiled = torch.compile(model, dynamic=False, mode=mode)

    def forward(self, image: Tensor) -> Any:
        return (self.compiled if len(image) == self.batch_size else self.model)(image)


def _wrap(job: Job) -> None:
    """Compiles what training calls, and joins it with the other ranks."""
    config, world = job.config, job.world
    if config.compile != "no":
        job.forward = _WholeBatches(job.model, config.compile, config.batch_size)
    if world.size > 1:
        # Buffers go out from rank 0 at each step, so that its statistics, which are the ones saved, are everyone's.
        job.forward = DistributedDataParallel(
            job.forward, device_ids=[job.device] if job.device.type == "cuda" else None, gradient_as_bucket_view=True
        )
        torch.manual_seed(config.seed + world.rank)  # other dropout on each rank


def global_batch_size(config: Config, world: World) -> int:
    """Images that make one step."""
    return config.batch_size * config.accumulate_steps * world.size


def train_step(job: Job, image: Tensor, target: Tensor) -> bool:
    """Forward and backward for one batch, and the update where it completes the step; the host waits for nothing.

    Gradients that are not finite make the step one that leaves weights, momentum and statistics as they are. The
    schedule goes on, and the average moves on towards these weights.

    Args:
        job: Is changed.
        image: `(N, 3, H, W)` on the device, normalized.
        target: `(N,)` int64 class numbers, or `(N, num_classes)` float32 probabilities.

    Returns:
        Whether the step is complete.
    """
    config, count = job.config, job.config.accumulate_steps
    # cuDNN tries its kernels out once for each shape, which takes longer than a few smaller batches gain by it.
    torch.backends.cudnn.benchmark = len(image) == config.batch_size and not config.deterministic
    if job.micro_step == 0:
        job.keep_statistics()
    job.micro_step += 1
    is_last = job.micro_step == count
    if isinstance(job.forward, DistributedDataParallel):
        job.forward.require_backward_grad_sync = is_last  # as in its `no_sync`; gradients are summed over ranks once a step
    with job.autocast(), record_function("forward"):
        losses = googlenet_loss(
            job.forward(image), target, label_smoothing=config.model.label_smoothing, aux_weight=config.model.aux_weight
        )
    with record_function("backward"):
        job.scaler.scale(losses.total / count).backward()
    job.parts += torch.stack([torch.zeros_like(losses.total) if part is None else part.detach() for part in losses]) / count
    if is_last:
        with record_function("update"):
            _update(job)
    return is_last


def _update(job: Job) -> None:
    """Moves the weights along the gradients, the average along the weights, the schedule by one."""
    job.scaler.unscale_(job.optimizer)
    gradients = [parameter.grad for parameter in job.parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    skip = 1 - norm.isfinite().float()
    if job.config.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(job.parameters, job.config.grad_clip, norm)
    job.optimizer.found_inf = skip  # type: ignore[attr-defined]  # as `scaler.step` does: fused kernels leave all as it is
    job.optimizer.step()
    job.scaler.update()
    job.optimizer.zero_grad()
    job.scheduler.step()
    job.restore_statistics(skip)
    job.ema.update_parameters(job.model)
    values = torch.cat([job.parts, torch.stack([norm, torch.ones_like(norm)])])
    job.sums += torch.where(skip > 0, 0.0, values)
    _count_skipped(job.skipped, skip)
    job.parts.zero_()
    job.micro_step = 0
    job.step += 1


def _count_skipped(counts: Tensor, skip: Tensor) -> None:
    """In all, in a row."""
    counts[0] += skip
    counts[1] = (counts[1] + 1) * skip
