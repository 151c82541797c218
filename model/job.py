"""Everything that changes during training: the network, its average, the optimizer, and the counters."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.config import StepConfig
from model.distributed import World
from model.ema import EMA
from model.factory import build_network, check_network, last_layers
from model.fit import difference, load_tensors
from model.googlenet import GoogLeNet
from model.init_from import InitialWeights
from model.optim import build_optimizer, build_scheduler

WAY_OUT = "start in another --run-dir"  # from a checkpoint that cannot be resumed

# `Job.sums` adds these up over the steps since the last log line.
HEADS = ("loss", "main_loss", "aux2_loss", "aux1_loss")
SUMS = (*HEADS, "gradient_norm", "num_steps")

PRECISIONS = {"None": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}  # by dtype, as --precision has them

NEED_GPU = ("fp16", "tf32")  # precisions that torch has for GPUs only

# A checkpoint holds these attributes of a job: the first by their state dicts, the second by value.
STATEFUL = ("model", "ema", "optimizer", "scheduler", "scaler")
NUMBERS = ("classes", "epoch", "step", "best", "validated", "scores", "seconds", "steps_per_epoch")


@dataclass
class Job:
    """Everything that changes during training. `train_step` in train.py changes it.

    Attributes:
        forward: The model as training calls it: plain, compiled, or distributed. It shares the weights of `model`.
        classes: Class names by number, if they are known.
        class_weights: `(num_classes,)` on the device: weights of the classes in the loss, or `None` for equal ones.
        num_classes: Length of the logits.
        preprocessing: Image sizes and normalization, which a checkpoint keeps for prediction.
        sums: `(len(SUMS),)` float32 on the device: sums over this rank's steps since the last log line, without skipped steps.
        parts: `(len(HEADS),)` float32 on the device: the losses of the current step.
        skipped: `(2,)` float32 on the device: steps skipped for non-finite gradients, in total and in a row.
        epoch: The current epoch, from 1.
        step: Completed optimizer steps.
        micro_step: Batches accumulated for the next step.
        best: The best top-1 score so far, in percent.
        validated: Epochs that have been validated.
        scores: Scores of the last validation.
        seconds: Duration of the run up to its last checkpoint.
    """

    config: StepConfig
    world: World
    model: nn.Module
    forward: Callable[[Tensor], Any]
    ema: EMA
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    autocast_dtype: torch.dtype | None
    classes: tuple[str, ...] | None
    class_weights: Tensor | None
    num_classes: int
    steps_per_epoch: int
    transform_input: bool
    preprocessing: dict[str, Any]
    sums: Tensor = field(init=False)
    parts: Tensor = field(init=False)
    skipped: Tensor = field(init=False)
    epoch: int = 0
    step: int = 0
    micro_step: int = 0
    best: float = 0.0
    validated: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.sums, self.parts, self.skipped = (torch.zeros(n, device=self.device) for n in (len(SUMS), len(HEADS), 2))
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # Integer views: see `restore_statistics`.
        self._statistics = [buffer.view(torch.int32) for buffer in self.model.buffers() if buffer.is_floating_point()]
        self._statistics_before = [torch.empty_like(buffer) for buffer in self._statistics]

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def lr(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    @property
    def precision(self) -> str:
        """The dtype of the arithmetic, for log lines."""
        return str(self.autocast_dtype or torch.float32).removeprefix("torch.")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def keep_statistics(self) -> None:
        """Copies the batch normalization statistics before a step."""
        if self._statistics:  # a network without batch normalization may have none, and torch refuses empty lists
            torch._foreach_copy_(self._statistics_before, self._statistics)

    def restore_statistics(self, skip: Tensor) -> None:
        """Restores the copied statistics if `skip`, a float scalar on the device, is 1; changes nothing if it is 0.

        The current statistics may be infinite or NaN, and multiplying those by 0 gives NaN. Hence the integer arithmetic on
        their bits.
        """
        if not self._statistics:
            return
        chosen = skip.to(torch.int32)
        torch._foreach_mul_(self._statistics, 1 - chosen)
        torch._foreach_mul_(self._statistics_before, chosen)
        torch._foreach_add_(self._statistics, self._statistics_before)

    def count_step(self, norm: Tensor, skip: Tensor) -> None:
        """Counts a completed step.

        Args:
            norm: The norm of the gradients, a scalar on the device.
            skip: 1 if the step was skipped, otherwise 0; a float scalar on the device.
        """
        values = torch.cat([self.parts, torch.stack([norm, torch.ones_like(norm)])])
        self.sums += torch.where(skip > 0, 0.0, values)
        self.skipped[0] += skip
        self.skipped[1] = (self.skipped[1] + 1) * skip
        self.parts.zero_()
        self.micro_step = 0
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that all ranks share. It refers to the job's own tensors. `rank_state` has the rest."""
        return {
            **{name: getattr(self, name).state_dict() for name in STATEFUL},
            **{name: getattr(self, name) for name in NUMBERS},
            "autocast_dtype": str(self.autocast_dtype),
            "global_batch_size": self.config.global_batch_size(self.world.size),
            "architecture": self._architecture(),
            "preprocessing": self.preprocessing,
        }

    def _architecture(self) -> dict[str, Any]:
        """Returns what `load_model` needs to build the network."""
        config = self.config.model
        if config.arch:
            return {"num_classes": self.num_classes, "factory": config.arch, "options": [*config.options]}
        return {"num_classes": self.num_classes, "aux_logits": config.aux_logits, "transform_input": self.transform_input}

    def rank_state(self) -> dict[str, Any]:
        """Returns the state of this rank alone, on the CPU. The host waits for the device here."""
        rng = {"cpu": torch.get_rng_state(), "cuda": None}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {"rng": rng, "sums": self.sums.cpu(), "skipped": self.skipped.cpu()}

    def load_state_dict(self, state: dict[str, Any], rank_state: dict[str, Any]) -> None:
        """Restores a state.

        Raises:
            ValueError: The precision differs, or the state is not one of this network.
        """
        before = _precision(state["autocast_dtype"], state["config"].get("precision"))
        now = _precision(str(self.autocast_dtype), self.config.precision)
        if before != now:
            way_out = f"set --precision {before}"
            if self.device.type == "cpu" and before in NEED_GPU:
                way_out = f"continue it on a GPU, or start in another --run-dir with --init-from {state['path']}"
            raise ValueError(
                f"--resume auto: the run was started in {before}, and on this device it would be in {now}; {way_out}"
            )
        own = {name: value for name, value in self.state_dict().items() if name not in ("classes", "preprocessing")}
        if problem := difference(own | {"scores": {}}, state, ""):
            raise ValueError(f"{state['path']} cannot be resumed: {problem}; {WAY_OUT}")
        for name in STATEFUL:
            part = getattr(self, name)
            if isinstance(part, nn.Module):
                load_tensors(part, state[name])
            else:
                part.load_state_dict(state[name])
        for name in NUMBERS:
            setattr(self, name, state[name])
        # A resumed run does not read --init-from again.
        self.transform_input = state["architecture"].get("transform_input", False)
        for network in (self.model, self.ema.module):
            if isinstance(network, GoogLeNet):
                network.transform_input = self.transform_input
        self.sums.copy_(rank_state["sums"])
        self.skipped.copy_(rank_state["skipped"])
        try:
            torch.set_rng_state(rank_state["rng"]["cpu"])
        except RuntimeError as error:
            problem = "rng.cpu is no state of torch's random numbers"
            raise ValueError(f"{state['path']} cannot be resumed: {problem}; {WAY_OUT}") from error
        if self.device.type == "cuda" and rank_state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(rank_state["rng"]["cuda"], self.device)


def _precision(autocast_dtype: str, setting: object) -> str:
    """Returns the precision that a setting has led to, as --precision has it. The float32 of a GPU may be TF32."""
    return "tf32" if setting == "tf32" else PRECISIONS.get(autocast_dtype, autocast_dtype)


def build_job(
    config: StepConfig,
    world: World,
    *,
    num_classes: int,
    classes: tuple[str, ...] | None,
    class_weights: Sequence[float] | None = None,
    autocast_dtype: torch.dtype | None,
    steps_per_epoch: int,
    initial: InitialWeights | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> Job:
    """Builds a fresh model with everything that trains it.

    Args:
        config: Settings of the step, with a batch size.
        world: This process and the others.
        num_classes: Length of the logits.
        classes: Class names by number, if they are known.
        class_weights: Weights of the classes in the loss, or `None` for equal ones.
        autocast_dtype: Dtype of mixed precision, or `None` for float32.
        steps_per_epoch: Optimizer steps per epoch, for the learning rate schedule.
        initial: Initial weights, or `None` for random ones.
        preprocessing: Image sizes and normalization for the checkpoints.

    Raises:
        ValueError: The device does not support a setting, or the initial weights do not fit.
    """
    assert config.batch_size, "choose a batch size first"
    device = world.device
    _choose_kernels(config)
    transform_input = _choose_transform_input(config, initial)
    torch.manual_seed(config.seed)  # the same weights on all ranks
    network = build_network(config.model, num_classes, transform_input, steps_per_epoch)
    if initial is not None:
        initial(network, classes, last_layers(network, num_classes))
    model = _place(network, config, device)
    if config.model.arch:
        check_network(model, config.model.named, num_classes, config.image_size)
    optimizer = build_optimizer(model, config.optim, config.global_batch_size(world.size))
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
        class_weights=None if class_weights is None else torch.tensor(class_weights, device=device),
        num_classes=num_classes,
        steps_per_epoch=steps_per_epoch,
        transform_input=transform_input,
        preprocessing=preprocessing or {},
    )
    _wrap(job)
    return job


def _choose_transform_input(config: StepConfig, initial: InitialWeights | None) -> bool:
    """Returns whether GoogLeNet renormalizes its input; other networks do not."""
    setting = config.model.transform_input
    return bool(setting) if initial is None or config.model.arch else initial.choose_transform_input(setting)


def _place(model: nn.Module, config: StepConfig, device: torch.device) -> nn.Module:
    """Moves a model to the device, channels last, with synchronized batch normalization if the settings ask for it."""
    if config.sync_batchnorm:
        if device.type != "cuda":
            raise ValueError("--sync-batchnorm: torch has it for GPUs only")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _choose_kernels(config: StepConfig) -> None:
    """Makes torch refuse nondeterministic kernels with --deterministic."""
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it on first use
        # Filling each new tensor would take a kernel, and no result depends on it here.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class _WholeBatches(nn.Module):
    """Runs whole batches through a compiled network, and smaller ones through the network itself.

    A batch is smaller if bad samples were left out. torch would compile the network again for each new size in the middle of
    the run, and give up after eight sizes.

    Args:
        model: The network.
        mode: Mode of torch.compile.
        batch_size: Images in a whole batch.
    """

    def __init__(self, model: nn.Module, mode: str, batch_size: int) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.compiled = torch.compile(model, dynamic=False, mode=mode)

    def forward(self, image: Tensor) -> Any:
        return (self.compiled if len(image) == self.batch_size else self.model)(image)


def _wrap(job: Job) -> None:
    """Compiles the forward pass and joins it with the other ranks."""
    config, world = job.config, job.world
    if config.compile != "no":
        job.forward = _WholeBatches(job.model, config.compile, config.batch_size)
    if world.size > 1:
        # Rank 0 broadcasts its buffers at each step, so the statistics that it saves are everyone's.
        job.forward = DistributedDataParallel(
            job.forward, device_ids=[job.device] if job.device.type == "cuda" else None, gradient_as_bucket_view=True
        )
        torch.manual_seed(config.seed + world.rank)  # different dropout on each rank
