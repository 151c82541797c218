"""Resuming: finds the last checkpoint of a run, checks that the settings still fit, and restores the state."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from model.checkpoint import load_checkpoint
from model.distributed import World
from model.job import Job
from pipelines.json_file import shown
from pipelines.loader import Loader, state_for_others
from pipelines.meter import Meter, Rates
from pipelines.printable import printable
from pipelines.shards.labels import class_names
from tools.run.checkpoints import newest_checkpoint
from tools.run.config import Config
from tools.run.run_folder import METRICS, flat
from tools.run.saved_state import require_ranks, require_resumable

log = logging.getLogger("train")

# These settings may change on resuming. They do not change the global batches, except by the samples left out, nor the
# arithmetic beyond rounding.
FREE_SETTINGS = (
    *("run_dir", "resume", "recipe", "checkpoint", "log_every", "log", "profile"),
    *("device", "torch_threads", "max_nonfinite_steps"),
    *("data.train", "data.valid"),  # the shards may have moved; the loader compares their content
    "precision",  # a device may have another default; the job compares the arithmetic that it leads to
    *("batch_size", "accumulate_steps"),  # another world size may make the same steps: the images per step are compared
    *("init_from", "init_from_partial", "init_from_weights"),  # the state contains their effect
    "model.class_weights",  # the file may have moved; the weights themselves are compared
    *(f"data.{name}" for name in ("threads", "prefetch", "hw_decoder_load")),
    *(f"data.{name}" for name in ("index_dir", "cache_dir", "cache_gigabytes")),
    *(f"data.{name}" for name in ("on_error", "max_bad_fraction", "max_pixels", "quarantine", "timeout")),
)


def settings_of(config: Config) -> dict[str, Any]:
    """Returns the settings as JSON values, as config.json and the checkpoints hold them."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return settings


def settings_of_run(config: Config, job: Job) -> dict[str, Any]:
    """Returns the settings, and what the run found out, as config.json and the checkpoints hold them."""
    classes = None if job.classes is None else [*job.classes]
    return settings_of(config) | {"transform_input": job.transform_input, "classes": classes, "class_weights": _weights(job)}


def _weights(job: Job) -> list[float] | None:
    return None if job.class_weights is None else job.class_weights.tolist()


def find_saved_state(path: Path, config: Config, world: World) -> dict[str, Any] | None:
    """Returns the newest checkpoint of the run in a folder, or `None` if the run starts from the beginning.

    Raises:
        ValueError: The folder holds a run that is not to be resumed, or one with other settings.
    """
    if config.resume != "auto":
        if world.from_main((path / METRICS).exists()):  # all ranks agree, before rank 0 creates the file
            raise ValueError(
                f"--run-dir {path} holds a run already; continue it with --resume auto, name another folder, or remove it"
            )
        return None
    newest, saved = newest_checkpoint(path) if world.is_main else (None, None)
    newest = world.from_main(newest)
    if newest is None:
        return None
    saved = saved or load_checkpoint(newest)
    require_resumable(newest, saved)
    images = config.global_batch_size(world.size)
    if saved["global_batch_size"] != images:
        raise ValueError(
            f"--resume auto: the run was started with {saved['global_batch_size']} images a step, and now there are {images}; "
            "(processes) x --batch-size x --accumulate-steps has to stay the same"
        )
    check_same_run(path, saved, config)
    return saved | {"path": newest}


def restore(saved: dict[str, Any], job: Job, loader: Loader, meter: Meter) -> None:
    """Restores the state of a checkpoint.

    Raises:
        ValueError: The data, the weights of the classes, or the precision differ.
    """
    require_ranks(saved, job, loader)
    _require_class_weights(saved, job)
    ranks = saved["ranks"]
    if len(ranks) == job.world.size:
        own = ranks[job.world.rank]
    else:  # with the random numbers of rank 0, all ranks would draw the same dropout
        own = {**ranks[0], "rng": job.rank_state()["rng"]}
        own["loader"] = state_for_others([rank["loader"] for rank in ranks])
    loader.load_state_dict(own["loader"])
    job.load_state_dict(saved, own)
    meter.total = Rates(**own["rates"])
    log.info("resuming after step %d", job.step)


def check_same_run(path: Path, saved: dict[str, Any], config: Config) -> None:
    """Compares the settings of a checkpoint with those of the run that resumes it.

    Raises:
        ValueError: Settings that the result depends on have changed.
    """
    before, changed = dict(flat(saved["config"])), []
    for name, value in flat(settings_of(config)):
        if any(name == free or name.startswith(f"{free}.") for free in FREE_SETTINGS):
            continue
        if name not in before or before[name] == value:  # an older version without a setting had its default
            continue
        if name != "epochs" or not _may_have_epochs(saved, config):
            changed.append(f"{written(name, before[name])} before, {written(name, value)} now")
    if changed:
        raise ValueError(
            f"--resume auto: {path} has other settings: {'; '.join(changed)}; set what it had before, or start a new run from "
            f"its weights: the same command without --resume, with --init-from {path / 'last.pt'} and another --run-dir"
        )


def _require_class_weights(saved: dict[str, Any], job: Job) -> None:
    """Compares the weights of the classes, which depend on a file or on the training labels."""
    before, now = saved["config"].get("class_weights"), _weights(job)
    are_weights = isinstance(before, list) and all(type(weight) is float for weight in before)
    if (before is None and now is None) or (are_weights and before == now):
        return
    if are_weights and now is not None and len(before) == len(now):
        number = [one == other for one, other in zip(before, now, strict=True)].index(False)
        name = printable(class_names(job.classes, job.num_classes)[number])
        change = f"class {name} had the weight {shown(before[number])} in the loss, and now has {now[number]}"
    else:
        texts = ["no class weights" if weights is None else f"the class weights {shown(weights)}" for weights in (before, now)]
        change = f"the run was started with {texts[0]}, and now has {texts[1]}"
    raise ValueError(
        f"--resume auto: {change}; set --model.class-weights to what it was, a file with the content that it had, or start in "
        f"another --run-dir with --init-from {saved['path']}"
    )


def _may_have_epochs(saved: dict[str, Any], config: Config) -> bool:
    """Returns whether a run of this number of epochs would have come to the saved state, too: with the same learning rates.

    A cosine without cycles ends with the run, so its rates depend on the number of epochs, unless it is a constant.
    """
    before, optim, steps = saved["config"]["epochs"], config.optim, saved["steps_per_epoch"]
    if type(before) is not int:
        return False
    warmups = {optim.warmup_steps(epochs=epochs, steps_per_epoch=steps) for epochs in (before, config.epochs)}
    return len(warmups) == 1 and (optim.cycle_epochs is not None or optim.min_lr == optim.peak_lr)


def written(name: str, value: Any) -> str:
    """Writes a setting, as config.json holds it, as the words of the command line."""
    flag = f"--{name.replace('_', '-')}"
    if value is None:
        return f"no {flag}"
    if isinstance(value, bool):
        *parts, last = flag.removeprefix("--").split(".")
        return flag if value else "--" + ".".join([*parts, f"no-{last}"])
    if isinstance(value, list):
        return " ".join([flag, *(item["name"] if isinstance(item, dict) else str(item) for item in value)])
    return f"{flag} {value}"
