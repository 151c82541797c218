"""WebDataset shards in, a trained GoogLeNet out: `python train.py --help`.

Read it from top to bottom: the configuration, `main`, one epoch, validation, the run's folder.
"""

import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from model import googlenet
from model.checkpoint import load_checkpoint, save_checkpoint
from model.ema import EMA
from model.loss import googlenet_loss
from model.optim import OptimConfig, build_optimizer, build_scheduler
from pipelines import DataConfig, Loader, ShardSet, build_loader, open_shards
from pipelines.augment import RandomResizedCrop
from pipelines.files import replace_text
from pipelines.loader import MEAN, STD
from pipelines.meter import Meter, Rates
from pipelines.mix import MixConfig, mix
from pipelines.order import order_warning
from pipelines.quarantine import FILE_NAME as QUARANTINE

log = logging.getLogger("train")


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

    def __post_init__(self) -> None:
        for name in ("dropout", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"--model.{name.replace('_', '-')} {value}: a number from 0 to below 1 is needed")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves its state, besides at the end of each epoch."""

    every_steps: int | None = None
    """Steps between two saves; a run that is resumed repeats what came after the last one."""

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"--checkpoint.every-steps {self.every_steps}: at least 1 is needed")


@dataclass(frozen=True)
class Config:
    """Train GoogLeNet on WebDataset shards. Without --data.train: the embedded demo, with images that it draws itself."""

    data: DataConfig = field(default_factory=DataConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    epochs: int = 30
    """Passes over the training shards."""
    batch_size: int = 64
    """Images a step, on each device."""
    image_size: int = 224
    """Side of the images that the network sees, pixels; at least 32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the arithmetic. auto: on a GPU bf16, or fp16 with loss scaling where the GPU has no bf16; on a CPU fp32."""
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

    def __post_init__(self) -> None:
        # Batch normalization needs two values a channel, and 32 pixels are one in the last feature map.
        least = {"epochs": 1, "batch_size": 2, "image_size": 32, "log_every": 1, "torch_threads": 1, "seed": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least {minimum} is needed")
        if self.resume == "auto" and self.run_dir is None:
            raise ValueError("--resume auto needs --run-dir, the folder of the run to go on with")


DEMO_DATA = Path(__file__).parent / "data" / "demo"
DEMO = Config(
    data=DataConfig(train=str(DEMO_DATA), valid=str(DEMO_DATA), crop=RandomResizedCrop(scale=(0.5, 1.0))),
    model=ModelConfig(ema_decay=0.98),
    optim=OptimConfig(lr=0.02),
    epochs=4,
    batch_size=16,  # so small a set needs many steps more than it needs large ones
    image_size=48,
)


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        config = parse(arguments)
        if config.data.train == str(DEMO_DATA):
            make_demo_data()
        train(config)
    except BrokenPipeError:  # whoever read the output, `head` for one, has gone
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def parse(arguments: Sequence[str] | None) -> Config:
    """The configuration that the command line asks for; its flags override the demo's settings where the demo runs."""
    config = tyro.cli(Config, args=arguments, prog="train.py")
    if config.data.train and config.data.valid:
        return config
    if config.data.train or config.data.valid:
        given, missing = ("train", "valid") if config.data.train else ("valid", "train")
        raise ValueError(f"--data.{given} is given and --data.{missing} is not; training needs both")
    return tyro.cli(Config, args=arguments, prog="train.py", default=DEMO)


def make_demo_data() -> None:
    """Draws and converts the demo's images with the `shards` command, unless an earlier run has."""
    try:
        open_shards(str(DEMO_DATA), "train"), open_shards(str(DEMO_DATA), "valid")
        return
    except ValueError:  # there are none, or not all of them
        pass
    log.info("drawing the demo's images into %s", DEMO_DATA)
    command = [sys.executable, "-m", "tools.shards", "demo", str(DEMO_DATA), "--overwrite"]
    if subprocess.run(command, check=False, cwd=Path(__file__).parent).returncode:
        raise ValueError("the demo's images could not be made; the line above says why")


def train(config: Config) -> None:
    """Runs the training job that the configuration describes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes were started; training on more than one device is not supported yet")
    started = time.perf_counter()
    device = choose_device(config.device)
    torch_threads, loader_threads = share_threads(config, device)
    torch.set_num_threads(torch_threads)
    torch.manual_seed(config.seed)
    autocast_dtype = choose_autocast_dtype(config.precision, device)

    data = config.data
    train_shards = open_shards(data.train, "train", data.index_dir, data.label_key, data.class_file)
    valid_shards = open_shards(data.valid, "valid", data.index_dir, data.label_key, data.class_file)
    num_classes = agree_on_classes(train_shards, valid_shards)
    if data.backend == "dali" and (warning := order_warning(train_shards, data, config.batch_size, num_classes)):
        log.warning("%s", warning)
    run_path = config.run_dir or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"

    def loader_of(split: Literal["train", "valid"], shards: ShardSet) -> Loader:
        return build_loader(
            config.data,
            split,
            shards=shards,
            batch_size=config.batch_size,
            image_size=config.image_size,
            device=device,
            dtype=torch.float16 if autocast_dtype and device.type == "cuda" else torch.float32,
            num_classes=num_classes,
            num_threads=loader_threads,
            seed=config.seed,
            quarantine=run_path / QUARANTINE,
        )

    with loader_of("train", train_shards) as train_loader, loader_of("valid", valid_shards) as valid_loader:
        job = build_job(config, num_classes, train_shards.classes, device, autocast_dtype, len(train_loader))
        meter = Meter(device)
        with RunFolder(run_path, config) as run:
            run.begin(job, train_loader, meter)
            log.info(
                "%d classes, %s training and %s validation samples; %s, %s, %d torch and %d data threads; writing to %s",
                num_classes,
                f"{train_shards.num_samples:,}",
                f"{valid_shards.num_samples:,}",
                torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
                str(autocast_dtype or torch.float32).removeprefix("torch."),
                torch_threads,
                loader_threads,
                run.path,
            )
            train_epochs(config, job, train_loader, valid_loader, meter, run)
        if num_bad := train_loader.num_bad_samples + valid_loader.num_bad_samples:
            log.warning(
                "%d bad samples were left out, see %s; later runs leave them out from the start with --data.quarantine %s",
                *(num_bad, run.path / QUARANTINE, run.path),
            )
    print(report(job.scores, meter.total, run.path, time.perf_counter() - started))


def train_epochs(
    config: Config, job: "Job", train_loader: Loader, valid_loader: Loader, meter: Meter, run: "RunFolder"
) -> None:
    """All epochs, or those that are left, each with its validation and its checkpoint."""
    steps = len(train_loader)
    with logging_redirect_tqdm(), tqdm(total=config.epochs * steps, initial=job.step, unit="step", disable=None) as progress:
        for epoch in range(job.validated + 1, config.epochs + 1):
            job.epoch = epoch
            if job.step < epoch * steps:  # what is resumed may lack the validation alone
                train_epoch(config, job, train_loader, meter, run, progress)
            job.scores = evaluate(job, valid_loader)
            log.info(
                "epoch %d/%d  valid: top-1 %.1f %%, EMA %.1f %%  top-5 %.1f %%, EMA %.1f %%  loss %.3f",
                *(epoch, config.epochs, *(job.scores[name] for name in ("top1", "ema_top1", "top5", "ema_top5", "loss"))),
            )
            bad_samples = valid_loader.num_bad_samples
            run.write({"split": "valid", "epoch": epoch, **job.scores, "bad_samples": bad_samples}, job.step)
            job.validated = epoch
            run.save(job, train_loader, meter, best=max(job.scores["top1"], job.scores["ema_top1"]))


def choose_device(name: str) -> torch.device:
    """The device that `--device` names."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU that this build of torch can use; see 'GPU' in README.md, or use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def share_threads(config: Config, device: torch.device) -> tuple[int, int]:
    """CPU threads for torch and for the loader; what the user has set stays."""
    cores = len(os.sched_getaffinity(0))
    if device.type == "cuda":
        torch_threads, loader_threads = torch.get_num_threads(), min(cores, 16)
    else:
        # Arithmetic is far more work than decoding, and torch's threads wait for each other: a second loader thread stalls them
        # all. The table in docs/performance.md is for 2 cores; where there are more, torch leaves the loader its own.
        loader_threads = max(1, cores // 8)
        torch_threads = cores if cores <= 2 else cores - loader_threads
    return config.torch_threads or torch_threads, config.data.threads or loader_threads


def choose_autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of automatic mixed precision, or None for float32 throughout."""
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU, for its loss scaling; on a CPU use bf16 or fp32")
    if precision == "auto":
        if device.type == "cpu":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def agree_on_classes(train_shards: ShardSet, valid_shards: ShardSet) -> int:
    """The number of classes.

    Raises:
        ValueError: Both splits name their classes, and not the same.
    """
    if train_shards.classes and valid_shards.classes and train_shards.classes != valid_shards.classes:
        only = sorted(set(train_shards.classes) ^ set(valid_shards.classes))
        raise ValueError(f"training and validation shards have different classes: {', '.join(only[:20]) or 'another order'}")
    return max(train_shards.num_classes(), valid_shards.num_classes())


@dataclass
class Job:
    """Everything that changes while training."""

    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    device: torch.device
    autocast_dtype: torch.dtype | None
    classes: tuple[str, ...] | None
    num_classes: int
    epoch: int = 0
    step: int = 0
    best: float = 0.0
    validated: int = 0  # epochs
    scores: dict[str, float] = field(default_factory=dict)  # of the last of them
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last log line

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def state_dict(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            **{name: getattr(self, name).state_dict() for name in STATEFUL},
            **{name: getattr(self, name) for name in (*NUMBERS, "losses")},
            "autocast_dtype": str(self.autocast_dtype),
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(self.device) if on_gpu else None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["autocast_dtype"] != str(self.autocast_dtype):
            raise ValueError(
                f"--resume auto: the run was begun with arithmetic in {state['autocast_dtype']}, and on this device it would "
                f"be in {self.autocast_dtype}; --precision sets it"
            )
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        for name in NUMBERS:
            setattr(self, name, state[name])
        self.losses = [loss.to(self.device) for loss in state["losses"]]
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)


STATEFUL = ("model", "ema", "optimizer", "scheduler", "scaler")
NUMBERS = ("classes", "epoch", "step", "best", "validated", "scores")


def build_job(
    config: Config,
    num_classes: int,
    classes: tuple[str, ...] | None,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    steps_per_epoch: int,
) -> Job:
    """A fresh model with all that trains it."""
    model = googlenet(num_classes, aux_logits=config.model.aux_logits, dropout=config.model.dropout)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config.optim)
    return Job(
        model=model,
        ema=EMA(model, config.model.ema_decay),
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optim, epochs=config.epochs, steps_per_epoch=steps_per_epoch),
        scaler=torch.amp.GradScaler(device.type, enabled=autocast_dtype == torch.float16),
        device=device,
        autocast_dtype=autocast_dtype,
        classes=classes,
        num_classes=num_classes,
    )


def train_epoch(config: Config, job: Job, loader: Loader, meter: Meter, run: "RunFolder", progress: tqdm) -> None:
    """One pass over the training split, or what is left of it; the loss leaves the device only for a log line."""
    job.model.train()
    first = job.step - (job.epoch - 1) * len(loader) + 1
    for i, batch in enumerate(meter.batches(loader), start=first):
        image, target = mix(
            config.mix, batch["image"], batch["target"], num_classes=job.num_classes, step=job.step, seed=config.seed
        )
        if job.step == 0:
            run.write_images(image)
        lr = float(job.scheduler.get_last_lr()[0])
        job.losses.append(train_step(config, job, image, target))
        progress.update()
        if i % config.log_every == 0 or i == len(loader):
            log_step(config, job, i, loader, lr, meter, run)
        if config.checkpoint.every_steps and job.step % config.checkpoint.every_steps == 0:
            run.save(job, loader, meter)


def train_step(config: Config, job: Job, image: Tensor, target: Tensor) -> Tensor:
    """Forward, backward, update; returns the loss, detached, on the device."""
    with job.autocast():
        outputs = job.model(image)
        loss = googlenet_loss(outputs, target, label_smoothing=config.model.label_smoothing, aux_weight=config.model.aux_weight)
    job.optimizer.zero_grad()
    job.scaler.scale(loss).backward()
    job.scaler.step(job.optimizer)
    job.scaler.update()
    job.scheduler.step()
    job.ema.update_parameters(job.model)
    job.step += 1
    return loss.detach()


def log_step(config: Config, job: Job, i: int, loader: Loader, lr: float, meter: Meter, run: "RunFolder") -> None:
    """Says how training goes: to the log and to the run's folder.

    Raises:
        ValueError: The loss is not a finite number any more.
    """
    loss = float(torch.stack(job.losses).mean())  # here the host waits for the device
    job.losses.clear()
    rates = meter.take()
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss became {loss} in the {config.log_every} steps before step {job.step}; lower --optim.lr ({lr:g} now)"
        )
    left = (config.epochs * len(loader) - job.step) * meter.total.seconds * config.batch_size / meter.total.images
    log.info(
        "epoch %d/%d  step %d/%d  loss %.3f  lr %.4g  %.1f images/s  data wait %.1f %%  %s left",
        *(job.epoch, config.epochs, i, len(loader), loss, lr, rates.images_per_second, rates.data_wait_percent),
        f"{left // 60:.0f}m{left % 60:02.0f}s",
    )
    run.write(
        {
            "split": "train",
            "epoch": job.epoch,
            "step": job.step,
            "loss": loss,
            "lr": lr,
            "images_per_second": rates.images_per_second,
            "data_wait_percent": rates.data_wait_percent,
            "bad_samples": loader.num_bad_samples,
        },
        job.step,
    )


@torch.no_grad()
def evaluate(job: Job, loader: Loader) -> dict[str, float]:
    """Scores of the raw and of the averaged weights over one pass of the validation split.

    Returns:
        `top1`, `top5`, `ema_top1`, `ema_top5` in percent, and `loss`, the raw weights' cross-entropy without label smoothing.
    """
    job.model.eval()
    job.ema.eval()
    sums = torch.zeros(5, device=job.device, dtype=torch.float64)
    count = 0
    for batch in loader:
        with job.autocast():
            logits, ema_logits = job.model(batch["image"]), job.ema(batch["image"])
        target = batch["target"]
        loss = cross_entropy(logits.float(), target, reduction="sum")
        sums += torch.stack([*top1_top5(logits, target), *top1_top5(ema_logits, target), loss])
        count += len(target)
    if not count:
        raise ValueError("not one validation sample can be used; `shards verify` says why")
    top1, top5, ema_top1, ema_top5, loss_sum = sums.tolist()
    return {
        "top1": 100 * top1 / count,
        "top5": 100 * top5 / count,
        "ema_top1": 100 * ema_top1 / count,
        "ema_top5": 100 * ema_top5 / count,
        "loss": loss_sum / count,
    }


def top1_top5(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """How many of `(N, num_classes)` logits have the target first, and among the first five."""
    hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    return hits[:, 0].sum(), hits.sum()


class RunFolder:
    """What a run leaves on the disk: config.json, metrics.jsonl, quarantine.jsonl, TensorBoard's files, last.pt and best.pt."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self._config = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        self._resume = config.resume == "auto"
        self._saved = load_checkpoint(path / "last.pt") if self._resume and (path / "last.pt").exists() else None
        if self._saved is not None:
            check_same_run(self._saved["config"], self._config)
        elif not self._resume and (path / "metrics.jsonl").exists():
            raise ValueError(
                f"--run-dir {path} holds a run already; go on with it (--resume auto), name another folder, or remove it"
            )

    def begin(self, job: Job, loader: Loader, meter: Meter) -> None:
        """Opens the files; if the run is being resumed, brings everything to where it last saved its state."""
        saved = self._saved
        if saved is not None:
            loader.load_state_dict(saved["loader"])
            job.load_state_dict(saved)
            meter.total = Rates(**saved["rates"])
            log.info("resuming %s after step %d", self.path, job.step)
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.path / "config.json", json.dumps(self._config, indent=2) + "\n")
        self._metrics = open(self.path / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115  (closed by `__exit__`)
        # What a killed run wrote after it last saved its state will be written again.
        self._metrics.truncate(min(saved["metrics_bytes"] if saved else 0, self._metrics.tell()))
        self._metrics.seek(0, os.SEEK_END)  # `tell` would go on from what was there before
        self._tensorboard = SummaryWriter(str(self.path), purge_step=job.step + 1 if self._resume else None)

    def write(self, metrics: dict[str, Any], step: int) -> None:
        """One line of metrics.jsonl, and its numbers as scalars `SPLIT/NAME` for TensorBoard."""
        self._metrics.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if name not in ("split", "epoch", "step"):
                self._tensorboard.add_scalar(f"{metrics['split']}/{name}", value, step)

    def write_images(self, images: Tensor) -> None:
        """A picture of the first 32 images of a training batch, `(N, 3, H, W)` normalized, as the network sees them."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        self._tensorboard.add_images("train/batch", (images[:32].float().cpu() * std + mean).clamp(0, 1), 0)

    def save(self, job: Job, loader: Loader, meter: Meter, best: float | None = None) -> None:
        """Writes last.pt; at the end of an epoch, `best` being its score, also best.pt where that is the best so far."""
        is_best = best is not None and (best > job.best or job.epoch == 1)
        job.best = max(job.best, best or 0.0)
        state = {
            **job.state_dict(),
            "loader": loader.state_dict(),
            "rates": dataclasses.asdict(meter.total),
            "metrics_bytes": self._metrics.tell(),
            "config": self._config,
        }
        for name in ("best.pt", "last.pt") if is_best else ("last.pt",):  # killed in between, the run validates again
            save_checkpoint(self.path / name, state)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._metrics.close()
        self._tensorboard.close()


# Settings that may change when a run is resumed: they change neither the batches nor the arithmetic, or not knowingly.
FREE_SETTINGS = (
    *("run_dir", "resume", "checkpoint", "log_every", "device", "torch_threads"),
    *("data.train", "data.valid"),  # they may have been moved; the loader compares what they hold
    *(f"data.{name}" for name in ("threads", "index_dir", "cache_dir", "cache_gigabytes")),
    *(f"data.{name}" for name in ("on_error", "max_bad_fraction", "quarantine")),
)


def check_same_run(saved: dict[str, Any], config: dict[str, Any], prefix: str = "") -> None:
    """Compares the settings of a run with those with which it is to go on.

    Raises:
        ValueError: One has changed on which the result depends.
    """
    for name, value in config.items():
        if f"{prefix}{name}" in FREE_SETTINGS:
            continue
        if isinstance(value, dict):
            check_same_run(saved.get(name, {}), value, f"{prefix}{name}.")
        elif saved.get(name) != value:
            flag = f"--{prefix}{name}".replace("_", "-")
            raise ValueError(f"--resume auto: the run was begun with {flag} {saved.get(name)}, and now it is {value}")


def report(scores: dict[str, float], rates: Rates, run_path: Path, seconds: float) -> str:
    """What a person wants to know at the end."""
    return f"""
        raw     EMA
top-1  {scores["top1"]:5.1f} % {scores["ema_top1"]:5.1f} %
top-5  {scores["top5"]:5.1f} % {scores["ema_top5"]:5.1f} %
training: {rates.images_per_second:.1f} images/s, {rates.data_wait_percent:.1f} % of the time spent waiting for data
in all:   {seconds:.0f} s
the run:  {run_path} (config.json, metrics.jsonl, TensorBoard events, last.pt, best.pt)
next:     tensorboard --logdir {run_path.parent}
          shards convert FOLDER_OF_CLASS_FOLDERS shards/mine --name train
          shards convert THE_SAME_FOR_VALIDATION shards/mine --name valid
          python train.py --data.train shards/mine --data.valid shards/mine"""


if __name__ == "__main__":
    main()
