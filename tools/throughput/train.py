"""`throughput train`: a training job with and without its data, and what may make it faster."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from model.config import ModelConfig
from model.distributed import alone, choose_device
from pipelines.loader import resize_shorter_for
from pipelines.machine import num_cpus
from pipelines.meter import DATA_BOUND_PERCENT, WARM_UP_BATCHES, verdict
from pipelines.printable import counted
from tools.run.config import Config
from tools.run.resources import with_batch_size
from tools.throughput.hardware import DALI_PACKAGES, versions
from tools.throughput.jobs import JobTurns
from tools.throughput.loops import device_name
from tools.throughput.options import Train
from tools.throughput.report import Column, Report, Row, Table
from tools.throughput.rounds import Outcome, Statistic, Turn, summarize, take_turns

DECODER_LOADS = (0.4, 0.9)  # on either side of the default
MODEL_ALL, LOADER_ALL = "model on all cores", "loader on all cores"
WHAT = {
    "model": "the model's own rate: one synthetic batch",
    "cached": "the job on a few of its batches, held in memory",
    "job": "the job, shards in the page cache",
    "cold": "the job, shards dropped from the page cache",
    "loader": "the loader alone",
    MODEL_ALL: "the model, all cores",
    LOADER_ALL: "the loader alone, all cores",
}
RATE = Column("images_per_second", "images/s", ",.1f", interval=True)
# Data stalls as in "Analyzing and Mitigating Data Stalls in DNN Training" (arXiv 2007.06775): the difference between two whole
# jobs in the same round, relative to the time of the slower one. Noise may make them negative.
STALLS = {
    # On batches in memory, against the model: other memory at each step, and real labels.
    "hand_over_stall_percent": "hand-over stall",
    # With shards in the page cache, against the model: decoding that the step does not hide, or that takes its cores.
    "prep_stall_percent": "prep stall",
    # With shards dropped from the page cache, against the job that finds them there: storage that nothing hides.
    "fetch_stall_percent": "fetch stall",
    # On a CPU, where both share the cores: the job's rate relative to 1 / (1 / model + 1 / loader), the sum of their costs.
    "of_both_percent": "of what model and loader, sharing the cores, allow",
}


def benchmark(options: Train) -> Report:
    """Runs the job, its parts, and what may make it faster, in turns in this process."""
    device, rounds = choose_device(options.device), options.rounds
    names = ("data", "mix", "batch_size", "image_size", "precision", "accumulate_steps", "compile", "grad_clip", "seed")
    settings = {name: getattr(options, name) for name in (*names, "torch_threads")}
    # The epochs only matter for the schedule, which must not end.
    config = Config(
        epochs=1000, model=ModelConfig(arch=options.arch, options=options.options, aux_logits=options.aux_logits), **settings
    )
    shards = config.data.open_shards("train")
    config = with_batch_size(config, alone(device), shards.num_samples)
    least = (WARM_UP_BATCHES + 1) * config.batch_size
    if shards.num_samples < least:
        raise ValueError(
            f"--data.train {config.data.train} has {counted(shards.num_samples, 'sample')}, but {WARM_UP_BATCHES + 1} batches "
            f"of {config.batch_size} are needed; choose a smaller --batch-size"
        )
    turns = JobTurns(config, shards, device, options.steps_on(device.type))
    turns.loader()  # from here on, what it reads is in the page cache
    outcomes, trials = take_turns(_competitors(turns), rounds), dict[str, Outcome]()
    stalls = _stalls(outcomes, device)
    prep_stall = stalls["prep_stall_percent"]
    if prep_stall and prep_stall.median >= DATA_BOUND_PERCENT:
        with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
            trials = take_turns(_trials(turns, Path(scratch)), rounds)
    conclusion = _conclusion(device, outcomes, trials)
    found = {
        "samples": shards.num_samples,
        "device": device_name(device),
        "arithmetic": turns.dtype,
        "steps": options.steps_on(device.type),
        "batch_size": config.batch_size,
        "torch_threads": turns.torch_threads,
        "data_threads": turns.data_threads,
    }
    heading = "{samples:,} samples; {steps} steps of {batch_size} images of {size} pixels per turn; {arithmetic} on {device}, "
    heading += "{torch_threads} torch and {data_threads} data threads"
    return Report(
        heading=f"{config.data.train}: {heading.format(**found, size=config.image_size)}",
        tables=[_table("", outcomes, "model", "results"), _table("tried", trials, "job", "trials")],
        notes=[
            f"{STALLS[name]}: {stall.median:.1f} % ({stall.low:.1f} to {stall.high:.1f})"
            for name, stall in stalls.items()
            if stall is not None
        ]
        + [conclusion],
        settings={**vars(options), **found, "shards": config.data.train, **stalls, "verdict": conclusion},
        may_have_errors=True,
        versions=versions(*DALI_PACKAGES, "torch"),
    )


def _competitors(turns: JobTurns) -> dict[str, Callable[[], Turn]]:
    competitors: dict[str, Callable[[], Turn]] = {
        "model": turns.model,
        "cached": turns.cached,
        "job": turns.job,
        "cold": turns.cold,
        "loader": turns.loader,
    }
    if turns.device.type == "cpu" and turns.torch_threads != num_cpus():
        competitors[MODEL_ALL] = lambda: turns.model(num_cpus())
    if turns.device.type == "cpu" and turns.data_threads != num_cpus():
        competitors[LOADER_ALL] = lambda: turns.loader(num_cpus())
    return competitors


def _trials(turns: JobTurns, scratch: Path) -> dict[str, Callable[[], Turn]]:
    """Returns the job and variants: other numbers of threads, other loads of a GPU's decoder, smaller images in the shards."""
    own, cores = turns.data_threads, num_cpus()
    data, size = turns.config.data, resize_shorter_for(turns.config.image_size)
    competitors: dict[str, Callable[[], Turn]] = {"job": turns.job}
    for threads in sorted({own // 2, 2 * own, cores} - {0, own}):
        if threads <= cores:
            competitors[f"--data.threads {threads}"] = functools.partial(turns.job, data_threads=threads)
    if turns.device.type == "cuda" and data.hw_decoder_load is None:
        for load in DECODER_LOADS:
            other = dataclasses.replace(data, hw_decoder_load=load)
            competitors[f"--data.hw-decoder-load {load}"] = functools.partial(turns.job, other)
    competitors[f"shards convert --resize {size}"] = lambda: turns.job(turns.resized(size, scratch / "resized"))
    return competitors


def _table(title: str, outcomes: Mapping[str, Outcome], baseline: str, key: str) -> Table:
    ratio = Column("ratio", f"of {baseline}", ".3f", of="images_per_second")
    columns = (RATE, ratio, Column("wait_percent", "data wait %", ".1f"))
    rows = [Row.of(WHAT.get(name, name), outcome, columns, outcomes[baseline], name=name) for name, outcome in outcomes.items()]
    return Table(title, columns, rows, key)


def _stalls(outcomes: Mapping[str, Outcome], device: torch.device) -> dict[str, Statistic | None]:
    """Returns the figures of `STALLS`, in percent; `None` for those that could not be measured."""
    rates = {name: outcome.rounds("images_per_second") for name, outcome in outcomes.items()}

    def lost(name: str, baseline: str) -> Statistic | None:
        if outcomes[name].error is not None:
            return None
        return summarize([100 * (1 - rate / other) for rate, other in zip(rates[name], rates[baseline], strict=True)])

    # Each at its best, alone with all cores or with its threads of the job: threads that other programs disturb wait for each
    # other.
    models, loaders = (
        [max(pair) for pair in zip(rates[name], rates.get(all_cores, rates[name]), strict=True)]
        for name, all_cores in (("model", MODEL_ALL), ("loader", LOADER_ALL))
    )
    of_both = [100 * job * (1 / one + 1 / other) for job, one, other in zip(rates["job"], models, loaders, strict=True)]
    return {
        "hand_over_stall_percent": lost("cached", "model"),
        "prep_stall_percent": lost("job", "model"),
        "fetch_stall_percent": lost("cold", "job"),
        "of_both_percent": summarize(of_both) if device.type == "cpu" else None,
    }


def _conclusion(device: torch.device, outcomes: Mapping[str, Outcome], trials: Mapping[str, Outcome]) -> str:
    """Returns the verdict, and the trials that helped: their intervals lie above the job's."""

    def median(name: str, figure: str = "images_per_second") -> float:
        return summarize(outcomes[name].rounds(figure)).median

    own_rate = outcomes["job"].ratio("images_per_second", outcomes["model"])
    text = verdict(
        device.type,
        median("job", "wait_percent"),
        100 * own_rate.median if own_rate else None,
        f" by decode: loader {median('loader'):,.0f} img/s, model {median('model'):,.0f} img/s",
        median("job", "launch_bound_percent"),
    )
    if not trials:
        return text
    job_rate = summarize(trials["job"].rounds("images_per_second"))
    helped = []
    for name, outcome in trials.items():
        rate, ratio = outcome.summary("images_per_second"), outcome.ratio("images_per_second", trials["job"])
        if outcome.error is None and rate and ratio and rate.low > job_rate.high:
            helped.append(f"{name} makes it {ratio.median:.2f} times as fast")
    return f"{text}; {', '.join(helped) or 'nothing that was tried makes it faster'}"
