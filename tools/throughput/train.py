"""`throughput train`: the job on its data beside the same job without, and what of it would make it faster, tried."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.distributed import alone, choose_device
from pipelines.config import DataConfig
from pipelines.loader import resize_shorter_for
from pipelines.meter import DATA_BOUND_PERCENT, WARM_UP_BATCHES, verdict
from tools.run.config import Config, apply_tuned, choose_batch_size
from tools.throughput.hardware import versions
from tools.throughput.jobs import JobTurns, Turn
from tools.throughput.report import Bar, Report
from tools.throughput.rounds import Outcome, Statistic, summarize, take_turns

DECODER_LOADS = (0.4, 0.9)  # to either side of the default; `throughput tune` tries more
MODEL, CACHED, JOB, COLD, LOADER = "model", "cached", "job", "cold", "loader"
MODEL_ALL, LOADER_ALL = "model on all cores", "loader on all cores"
WHAT = {
    MODEL: "the model's own rate: one synthetic batch",
    CACHED: "the job on a few of its batches, held in memory",
    JOB: "the job, shards in the page cache",
    COLD: "the job, shards dropped from the page cache",
    LOADER: "the loader alone",
    MODEL_ALL: "the model, all cores",
    LOADER_ALL: "the loader alone, all cores",
}


@dataclass(frozen=True)
class Result:
    """A competitor over the rounds.

    Attributes:
        name: Of the competitor.
        what: The same for people.
        error: Why it took no more turns.
        images_per_second: After warming up.
        ratio: The same as a part of the model's own rate in the same round; among the trials, of the job's.
        wait_percent: As the job's own log has it.
    """

    name: str
    what: str
    error: str | None
    images_per_second: Statistic | None
    ratio: Statistic | None
    wait_percent: Statistic | None


@dataclass(frozen=True)
class TrainReport(Report):
    """All that was measured.

    Stalls are as in "Analyzing and Mitigating Data Stalls in DNN Training" (arXiv 2007.06775), by differences between whole
    jobs, formed within a round, as a part of the time of the slower of the two; noise may make them negative.

    Attributes:
        hand_over_stall_percent: The job on batches in memory against the model: other memory read at each step, real labels.
        prep_stall_percent: The job with its shards in the page cache against the model: decoding and augmentation that the
            step does not hide, or that take the cores from it.
        fetch_stall_percent: The job whose shards have been dropped from the page cache against the one that finds them there:
            storage that neither of them hides. None where they cannot be dropped, as from a file system in memory.
        of_both_percent: On a CPU, where step and loader share the cores: the job's rate as a part of 1 / (1 / model + 1 /
            loader), which is what both costs added up allow. Each of them is alone with all cores then, or with its threads
            of the job where these are the faster: threads that other programs disturb wait for each other.
        trials: Where the data costs the job 5 % or more: the job again, and after it what might make it faster.
        verdict: What sets the pace; and those trials that helped, whose intervals lie above the job's.
    """

    shards: str
    samples: int
    device: str
    arithmetic: str
    batch_size: int
    image_size: int
    steps: int
    torch_threads: int
    data_threads: int
    data: DataConfig
    results: tuple[Result, ...]
    hand_over_stall_percent: Statistic | None
    prep_stall_percent: Statistic | None
    fetch_stall_percent: Statistic | None
    of_both_percent: Statistic | None
    trials: tuple[Result, ...]
    verdict: str

    def bars(self) -> Iterable[Bar]:
        results = [*(("", result) for result in self.results), *(("tried", result) for result in self.trials)]
        return [Bar(group, r.what, r.images_per_second) for group, r in results if r.images_per_second]

    def __str__(self) -> str:
        stalls = {
            "hand-over stall": self.hand_over_stall_percent,
            "prep stall": self.prep_stall_percent,
            "fetch stall": self.fetch_stall_percent,
            "of what model and loader, sharing the cores, allow": self.of_both_percent,
        }
        lines = [
            f"{self.shards}: {self.samples:,} samples; {self.steps} steps of {self.batch_size} images of {self.image_size} "
            f"pixels a turn; {self.arithmetic} on {self.device}, {self.torch_threads} torch and {self.data_threads} data "
            f"threads; {self.hardware}",
            f"{'':<50}{'images/s':>10}{'':>20}{'of model':>10}{'data wait':>11}",
            *map(_line, self.results),
            *(
                f"{name:<50}{f'{stall.median:.1f} %':>10}{f'({stall.low:.1f} to {stall.high:.1f})':>20}"
                for name, stall in stalls.items()
                if stall is not None
            ),
        ]
        if self.trials:
            lines += [f"{'tried':<50}{'images/s':>10}{'':>20}{'of job':>10}{'data wait':>11}", *map(_line, self.trials)]
        return "\n".join([*lines, self.verdict])


def _line(result: Result) -> str:
    rate, ratio, wait = result.images_per_second, result.ratio, result.wait_percent
    if rate is None or wait is None:
        return f"{result.what:<50}{result.error}"
    return (
        f"{result.what:<50}{rate.median:>10,.1f}{f'({rate.low:,.1f}-{rate.high:,.1f})':>20}"
        f"{f'{ratio.median:.3f}' if ratio else '-':>10}{f'{wait.median:.1f} %':>11}"
    )


def benchmark(config: Config, *, steps: int, rounds: int) -> TrainReport:
    """Lets the job, what it consists of, and what may make it faster, take turns in this process.

    One model makes all steps. Each turn opens its loader anew, at the beginning of the first epoch: all read the same samples.

    Args:
        config: That of train.py; the learning rate, saving and validation do not count.
        steps: That count in a turn: not the first `WARM_UP_BATCHES` batches of each epoch, as in train.py's own verdict.
        rounds: Turns of each.

    Raises:
        ValueError: Shards or settings that cannot be used.
    """
    device = choose_device(config.device)
    config = apply_tuned(config, device, 1)
    shards = config.data.open_shards("train")
    config = choose_batch_size(config, alone(device), shards.num_samples)
    least = (WARM_UP_BATCHES + 1) * config.batch_size
    if shards.is_remote or shards.num_samples < least:
        raise ValueError(
            f"--data.train {config.data.train}: {least} samples in local shards, {WARM_UP_BATCHES + 1} batches, are needed; "
            "a smaller --batch-size needs fewer, and throughput remote measures buckets"
        )
    turns = JobTurns(config, shards, device, steps)
    turns.loader()  # what it reads is in the page cache from here on
    outcomes = take_turns(_competitors(turns, device), rounds)
    rates = {name: [turn.images_per_second for turn in outcome.turns] for name, outcome in outcomes.items()}
    own, job = rates[MODEL], rates[JOB]
    trials: tuple[Result, ...] = ()
    if summarize(_stalls(own, job)).median >= DATA_BOUND_PERCENT:
        with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
            trials = _try(turns, Path(scratch), rounds)
    return TrainReport(
        config.data.train,
        shards.num_samples,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        turns.arithmetic,
        *(config.batch_size, config.image_size, steps, turns.torch_threads, turns.data_threads),
        config.data,
        tuple(_result(name, WHAT[name], outcome, own) for name, outcome in outcomes.items()),
        summarize(_stalls(own, rates[CACHED])),
        summarize(_stalls(own, job)),
        None if outcomes[COLD].error else summarize(_stalls(job, rates[COLD])),
        summarize(_of_both(rates)) if device.type == "cpu" else None,
        trials,
        _say(device, outcomes, trials),
        versions=versions(("nvidia-dali-cuda120", "torch")),
    )


def _competitors(turns: JobTurns, device: torch.device) -> dict[str, Callable[[], Turn]]:
    competitors: dict[str, Callable[[], Turn]] = {
        MODEL: turns.model,
        CACHED: turns.cached,
        JOB: turns.job,
        COLD: turns.cold,
        LOADER: turns.loader,
    }
    cores = _num_cores()
    if device.type == "cpu" and turns.torch_threads != cores:
        competitors[MODEL_ALL] = lambda: turns.model(cores)
    if device.type == "cpu" and turns.data_threads != cores:
        competitors[LOADER_ALL] = lambda: turns.loader(cores)
    return competitors


def _try(turns: JobTurns, scratch: Path, rounds: int) -> tuple[Result, ...]:
    """What might make the job faster: other numbers of threads, shares of a GPU's decoder, smaller images in the shards."""
    now_has, cores = turns.data_threads, _num_cores()
    data, size = turns.config.data, resize_shorter_for(turns.config.image_size)
    competitors: dict[str, Callable[[], Turn]] = {JOB: turns.job}
    for threads in sorted({now_has // 2, 2 * now_has, cores} - {0, now_has}):
        if threads <= cores:
            competitors[f"--data.threads {threads}"] = functools.partial(turns.job, data_threads=threads)
    if turns.device.type == "cuda" and data.hw_decoder_load is None:
        for load in DECODER_LOADS:
            other = dataclasses.replace(data, hw_decoder_load=load)
            competitors[f"--data.hw-decoder-load {load}"] = functools.partial(turns.job, other)
    competitors[f"shards convert --resize {size}"] = lambda: turns.job(turns.resized(size, scratch / "resized"))
    outcomes = take_turns(competitors, rounds)
    base = [turn.images_per_second for turn in outcomes[JOB].turns]
    return tuple(_result(name, WHAT.get(name, name), outcome, base) for name, outcome in outcomes.items())


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _stalls(without: Sequence[float], rates: Sequence[float]) -> list[float]:
    """The part of the time that is lost against the rates of the same rounds without something, %."""
    return [100 * (1 - rate / other) for rate, other in zip(rates, without, strict=True)]


def _of_both(rates: Mapping[str, Sequence[float]]) -> list[float]:
    """The job's rate as a part of what model and loader would come to by turns, each at its best, %."""
    models, loaders = (
        [max(pair) for pair in zip(rates[name], rates.get(all_cores, rates[name]), strict=True)]
        for name, all_cores in ((MODEL, MODEL_ALL), (LOADER, LOADER_ALL))
    )
    return [100 * job * (1 / one + 1 / other) for job, one, other in zip(rates[JOB], models, loaders, strict=True)]


def _result(name: str, what: str, outcome: Outcome[Turn], base: Sequence[float]) -> Result:
    rates = [turn.images_per_second for turn in outcome.turns]
    if outcome.error is not None or not rates:
        return Result(name, what, outcome.error, None, None, None)
    ratio = summarize([rate / other for rate, other in zip(rates, base, strict=True)])
    return Result(name, what, None, summarize(rates), ratio, summarize([turn.wait_percent for turn in outcome.turns]))


def _say(device: torch.device, outcomes: Mapping[str, Outcome[Turn]], trials: Sequence[Result]) -> str:
    """The verdict, and which of the trials, the first of which is the job, helped."""
    model, loader, job = (outcomes[name].turns for name in (MODEL, LOADER, JOB))
    of_own = [100 * turn.images_per_second / other.images_per_second for turn, other in zip(job, model, strict=True)]
    loader_rate, model_rate = (summarize([turn.images_per_second for turn in turns]).median for turns in (loader, model))
    text = verdict(
        device.type,
        summarize([turn.wait_percent for turn in job]).median,
        summarize(of_own).median,
        f" by decode: loader {loader_rate:,.0f} img/s, model {model_rate:,.0f} img/s",
        summarize([turn.launch_bound_percent for turn in job]).median,
    )
    if not trials:
        return text
    job_rate = trials[0].images_per_second
    helped = [
        f"{trial.name} makes it {trial.ratio.median:.2f} times as fast"
        for trial in trials[1:]
        if job_rate and trial.ratio and trial.images_per_second and trial.images_per_second.low > job_rate.high
    ]
    return f"{text}; {', '.join(helped) or 'nothing that was tried makes it faster'}"
