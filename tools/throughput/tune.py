"""`throughput tune`: settings of the loader with which this machine is faster than with the defaults, if there are any."""

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.distributed import alone, choose_device
from pipelines.config import DataConfig
from pipelines.meter import WARM_UP_BATCHES
from pipelines.shards.shard_set import ShardSet
from pipelines.tuned import HW_DECODER_LOAD, PREFETCH, SETTINGS, Device, Tuned, cores_of_a_process, gpu_model
from tools.run.config import Config, choose_batch_size
from tools.throughput.hardware import versions
from tools.throughput.jobs import JobTurns
from tools.throughput.report import Bar, Report
from tools.throughput.rounds import Statistic, TurnError, summarize
from tools.throughput.search import DEFAULTS, Choice, Duel, Tried, describe, duel, search

# Of a turn, by the clock, as a part of the time for the search: so many turns tell twenty choices apart.
TURNS = 45
MOST_OF_TURN = 3  # times what it should last; on a CPU other programs may make torch's threads wait for each other
FEWEST_IMAGES = 2  # that batch normalization can be trained with


@dataclass(frozen=True)
class Result:
    """A choice that was tried.

    Attributes:
        what: Its settings.
        error: Why it took no more turns.
        images_per_second: Of its turns in the search.
        ratio: The same as a part of the defaults' in the same rounds.
    """

    what: str
    error: str | None
    images_per_second: Statistic | None
    ratio: Statistic | None


@dataclass(frozen=True)
class TuneReport(Report):
    """All that was measured.

    Attributes:
        step_images: Of each batch, on which a step was trained; None where the loader was alone.
        batches: That counted in a turn.
        defaults: The settings without the file.
        results: Of the search; the defaults first.
        best: Of them, which owes something to luck.
        duel: That one and the defaults once more, in rounds of their own; None where the defaults came out best.
        tuned: What the file says; None, of a setting, is the default.
        file: Where it is.
        verdict: What comes of it.
    """

    shards: str
    samples: int
    batch_size: int
    image_size: int
    torch_threads: int
    step_images: int | None
    batches: int
    seconds: float
    data: DataConfig
    defaults: str
    results: tuple[Result, ...]
    best: str
    duel: Duel | None
    tuned: Tuned
    file: str
    verdict: str

    def bars(self) -> Iterable[Bar]:
        bars = [Bar("tried", r.what, r.images_per_second) for r in self.results if r.images_per_second]
        if self.duel is not None:
            bars += [Bar("once more", "before", self.duel.before), Bar("once more", "after", self.duel.after)]
        return bars

    def __str__(self) -> str:
        step = f", each followed by a step on {self.step_images} of them, {self.torch_threads} torch threads"
        lines = [
            f"{self.shards}: {self.samples:,} samples; {self.batches} batches of {self.batch_size} images of {self.image_size} "
            f"pixels a turn{step if self.step_images else ''}; {self.tuned.gpu or 'the CPU'}; {self.hardware}; "
            f"the defaults: {self.defaults}",
            f"{'tried':<45}{'turns':>6}{'images/s':>10}{'':>20}{'of the defaults':>17}",
            *map(_line, self.results),
        ]
        if self.duel is not None:
            once = f"once more, {len(self.duel.ratio.rounds)} rounds"
            lines.append(f"{once:<51}{'images/s':>10}{'':>20}{'of before':>17}")
            lines.append(f"{f'before: {self.defaults}':<51}{_rate(self.duel.before)}{'1':>17}")
            lines.append(f"{f'after: {self.best}':<51}{_rate(self.duel.after)}{_ratio(self.duel.ratio):>17}")
        return "\n".join([*lines, self.verdict, f"{self.file}: {self.tuned}"])


def _rate(rate: Statistic) -> str:
    return f"{rate.median:>10,.1f}{f'({rate.low:,.1f}-{rate.high:,.1f})':>20}"


def _ratio(ratio: Statistic) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _line(result: Result) -> str:
    rate, ratio = result.images_per_second, result.ratio
    if rate is None or ratio is None:
        return f"{result.what:<45}failed: {result.error}"
    of_defaults = "1" if result.what == describe(DEFAULTS) else _ratio(ratio)
    return f"{result.what:<45}{len(rate.rounds):>6}{_rate(rate)}{of_defaults:>17}"


class TuneTurns:
    """Turns with the loader of a configuration and other settings; short ones, so that many fit.

    On a GPU it is the loader alone. On a CPU it shares the cores with the training step, so alone it would do best with more of
    them than it gets: there each batch is followed by a step on so few of its images that it takes no longer than the loader
    does for the batch. A step of the whole batch takes so much longer that all settings would seem the same.

    Args:
        config: That of train.py.
        shards: Of its training split.
        device: Where the batches go.
        seconds: Of a turn, about.

    Attributes:
        step_images: Images of each batch that a step is made on; None where there is none.
        jobs: What takes the turns.
    """

    def __init__(self, config: Config, shards: ShardSet, device: torch.device, seconds: float) -> None:
        self.jobs = JobTurns(config, shards, device, steps=4)
        self.step_images: int | None = None
        self.jobs.loader()  # what it reads is in the page cache from here on
        batch_seconds = config.batch_size / self.jobs.loader().images_per_second
        if device.type == "cpu":
            self.step_images = self._images_within(batch_seconds)
        clock = time.perf_counter()
        batch_seconds = config.batch_size / self._turn(config.data)
        opening = time.perf_counter() - clock - (WARM_UP_BATCHES + self.jobs.steps) * batch_seconds
        self.jobs.steps = max(4, int((seconds - opening) / batch_seconds) - WARM_UP_BATCHES)
        self.jobs.most_seconds = MOST_OF_TURN * seconds

    def __call__(self, choice: Choice) -> float:
        """A turn with a choice, images/s.

        Raises:
            TurnError: The loader cannot be had with it.
        """
        try:
            return self._turn(with_choice(self.jobs.config.data, choice))
        except (RuntimeError, ValueError, OSError) as error:
            raise TurnError(" ".join(str(error).split())) from error

    def _turn(self, data: DataConfig) -> float:
        if self.step_images is None:
            return self.jobs.loader(data.threads, data).images_per_second
        return self.jobs.job(data, data.threads, self.step_images).images_per_second

    def _images_within(self, seconds: float) -> int:
        """So many that a step on them takes no longer, if at all possible."""
        images = FEWEST_IMAGES
        while 2 * images <= self.jobs.config.batch_size and self.jobs.step_seconds(2 * images) <= seconds:
            images *= 2
        return images


def with_choice(data: DataConfig, choice: Choice) -> DataConfig:
    """The settings with those of the choice."""
    settings: dict[str, Any] = dict(choice)
    return dataclasses.replace(data, **settings)


def values_to_try(data: DataConfig, device_type: str, threads: int, cores: int) -> dict[str, tuple[float, ...]]:
    """Of each setting that is not given those beside the default; the load of the hardware's decoder depends on the threads.

    Args:
        data: Settings as given.
        device_type: "cpu" or "cuda".
        threads: The default.
        cores: That the process has.
    """
    most = max(threads, cores + cores // 2)
    of_threads = sorted({threads // 4, threads // 2, 3 * threads // 2, 2 * threads} - {0, threads})
    values: dict[str, tuple[float, ...]] = {"threads": tuple(count for count in of_threads if count <= most)}
    if device_type == "cuda":
        values["hw_decoder_load"] = (0.0, 0.35, 0.5, 0.8, 1.0)
    values["prefetch"] = (1, 3, 4, 6)
    return {name: found for name, found in values.items() if found and getattr(data, name) is None}


def benchmark(config: Config, file: Path, *, seconds: float, rounds: int) -> TuneReport:
    """Searches for settings, sets the best against the defaults, and writes the file.

    Settings that are given in `config` stay, and belong to the defaults.

    Args:
        config: That of train.py; what its speed does not depend on does not count.
        file: To write.
        seconds: For the search.
        rounds: Of the best found and the defaults, afterwards.

    Raises:
        ValueError: Shards or settings that cannot be used.
    """
    device, data = choose_device(config.device), config.data
    shards = data.open_shards("train")
    config = choose_batch_size(config, alone(device), shards.num_samples)
    least = (WARM_UP_BATCHES + 1) * config.batch_size
    if shards.is_remote or shards.num_samples < least:
        raise ValueError(
            f"--data.train {data.train}: {least} samples in local shards, {WARM_UP_BATCHES + 1} batches, are needed; "
            "a smaller --batch-size needs fewer, and a bucket's loader is tuned on copies of some of its shards"
        )
    cores = cores_of_a_process(1)
    turns = TuneTurns(config, shards, device, seconds / TURNS)
    best, tried = search(turns, values_to_try(data, device.type, turns.jobs.data_threads, cores), seconds)
    final = None if best == DEFAULTS else duel(turns, best, rounds, seconds)
    chosen = with_choice(data, best) if final is not None and final.is_won else data
    kind: Device = "cuda" if device.type == "cuda" else "cpu"
    tuned = Tuned(kind, gpu_model(device), cores, **{name: getattr(chosen, name) for name in SETTINGS})
    tuned.write(file)
    return TuneReport(
        *(data.train, shards.num_samples, config.batch_size, config.image_size, turns.jobs.torch_threads),
        *(turns.step_images, turns.jobs.steps, seconds, data),
        _describe_defaults(data, device.type, turns.jobs.data_threads),
        tuple(_result(choice, of_choice) for choice, of_choice in tried.items() if of_choice.rates or of_choice.error),
        describe(best),
        final,
        *(tuned, str(file), _say(final)),
        versions=versions(("nvidia-dali-cuda120", "torch", "nvidia-nvimgcodec-cu12")),
    )


def _describe_defaults(data: DataConfig, device_type: str, threads: int) -> str:
    found = f"threads {threads}, prefetch {data.prefetch or PREFETCH}"
    if device_type != "cuda":
        return found
    return f"{found}, hw_decoder_load {HW_DECODER_LOAD if data.hw_decoder_load is None else data.hw_decoder_load}"


def _result(choice: Choice, tried: Tried) -> Result:
    if tried.error is not None:
        return Result(describe(choice), tried.error, None, None)
    return Result(describe(choice), None, summarize(tried.rates), summarize(tried.ratios))


def _say(final: Duel | None) -> str:
    if final is None or not final.is_won:
        return "nothing that was tried is faster than the defaults"
    return f"{final.ratio.median:.2f} times as fast as the defaults ({final.ratio.low:.2f}-{final.ratio.high:.2f})"
