"""Resuming: finds the last checkpoint of a run, checks that the settings still fit, and restores the state."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from model.checkpoint import load_checkpoint
from model.distributed import World
from model.job import Job
from pipelines.loader import Loader, state_for_others
from pipelines.meter import Meter, Rates
from tools.run.checkpoints import newest_checkpoint
from tools.run.config import Config
from tools.run.run_folder import METRICS, flat

log = logging.getLogger("train")

# These settings may change on resuming. They do not change the global batches, nor the arithmetic beyond rounding.
FREE_SETTINGS = (
    *("run_dir", "resume", "recipe", "checkpoint", "log_every", "device", "torch_threads", "profile", "max_nonfinite_steps"),
    *("data.train", "data.valid"),  # the shards may have moved; the loader compares their content
    *("batch_size", "accumulate_steps"),  # another world size may make the same steps; the job compares the images per step
    *("init_from", "init_from_partial"),  # the state contains their effect
    *(f"data.{name}" for name in ("threads", "prefetch", "hw_decoder_load")),
    *(f"data.{name}" for name in ("index_dir", "cache_dir", "cache_gigabytes")),
    *(f"data.{name}" for name in ("on_error", "max_bad_fraction", "quarantine")),
)


def settings_of(config: Config) -> dict[str, Any]:
    """Returns the settings as JSON values, as config.json and the checkpoints hold them."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return settings


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
    if "ranks" not in saved:
        raise ValueError(f"{newest} was written by a version that this one cannot resume; take another --run-dir")
    check_same_run(saved["config"], settings_of(config))
    return saved


def restore(saved: dict[str, Any], job: Job, loader: Loader, meter: Meter) -> None:
    """Restores the state of a checkpoint.

    Raises:
        ValueError: The data, the precision, or the images per step differ.
    """
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


def check_same_run(saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compares the settings of a checkpoint with those of the run that resumes it.

    Raises:
        ValueError: A setting that the result depends on has changed.
    """
    before = dict(flat(saved))
    for name, value in flat(settings):
        if any(name == free or name.startswith(f"{free}.") for free in FREE_SETTINGS):
            continue
        if name not in before or before[name] == value:  # an older version without a setting had its default
            continue
        flag = f"--{name}".replace("_", "-")
        raise ValueError(f"--resume auto: the run was started with {flag} {before[name]}, and now it is {value}")
