"""`throughput loader`: the loader alone, and what each stage of it costs."""

import dataclasses
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.distributed import alone, choose_device
from pipelines.config import DataConfig
from tools.bench.converters import ENVIRONMENT, ROOT
from tools.run.config import Config, apply_tuned, choose_autocast_dtype, choose_batch_size, image_dtype, share_threads
from tools.throughput.hardware import versions
from tools.throughput.process import absolute, run_measured
from tools.throughput.report import Bar, Report
from tools.throughput.rounds import Outcome, Statistic, summarize, take_turns
from tools.throughput.stage import WHOLE, Task

Split = Literal["train", "valid"]

WHAT = {
    "read": "read",
    "headers": "+ read headers",
    "decode": "+ decode",
    "resize": "+ resize",
    "normalize": "+ augment and normalize",
    WHOLE: "+ hand over: the loader",
}


@dataclass(frozen=True)
class Turn:
    """What a graph that ends with a stage did in a round, as a process of its own."""

    images_per_second: float
    cpu_milliseconds: float
    first_seconds: float
    peak_memory_bytes: int


NOTHING = Turn(float("inf"), 0.0, 0.0, 0)


@dataclass(frozen=True)
class Result:
    """The graph up to a stage, over the rounds.

    Attributes:
        split: "train" or "valid".
        stage: The last one.
        what: The same for people.
        error: What it printed last, where it failed.
        images_per_second: Of all stages up to this one, once they are warm.
        milliseconds: For an image, what this stage adds to the stage before in the same round, by the clock; None where that
            one failed.
        cpu_milliseconds: The same of time on the CPU, all threads together.
        first_seconds: From the start of the process to the first batch, imports included.
        peak_memory_bytes: Of the process, the largest of the rounds.
    """

    split: Split
    stage: str
    what: str
    error: str | None = None
    images_per_second: Statistic | None = None
    milliseconds: Statistic | None = None
    cpu_milliseconds: Statistic | None = None
    first_seconds: Statistic | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class LoaderReport(Report):
    """All that was measured; `bytes_per_image` is what of the shards has to be read for one."""

    shards: dict[Split, str]
    bytes_per_image: dict[Split, float]
    images: int
    batch_size: int
    image_size: int
    device: str
    threads: int
    rounds: int
    data: DataConfig
    results: tuple[Result, ...]

    def bars(self) -> Iterable[Bar]:
        return [Bar(r.split, r.what, r.images_per_second) for r in self.results if r.images_per_second]

    def __str__(self) -> str:
        lines = [
            f"{self.images:,} images a turn, {self.rounds} rounds, {self.batch_size} x {self.image_size} pixels a batch, "
            f"{self.threads} threads, {self.device}; {self.hardware}; medians; ms an image "
            "are what a stage adds"
        ]
        for split, location in self.shards.items():
            lines += ["", f"{split}: {location}, {self.bytes_per_image[split] / 1e3:.0f} KB an image"]
            lines += [f"{'':<26}{'images/s':>10}{'MB/s':>8}{'ms':>8}{'CPU ms':>9}{'first batch':>13}{'memory MB':>11}"]
            lines += [_line(result, self.bytes_per_image[split]) for result in self.results if result.split == split]
        return "\n".join(lines)


def _line(result: Result, bytes_per_image: float) -> str:
    rate, first = result.images_per_second, result.first_seconds
    if rate is None or first is None:
        return f"{result.what:<26}failed: {result.error}"
    megabytes = rate.median * bytes_per_image / 1e6
    own, cpu = (f"{added.median:.2f}" if added else "-" for added in (result.milliseconds, result.cpu_milliseconds))
    return (
        f"{result.what:<26}{rate.median:>10,.0f}{megabytes:>8,.1f}{own:>8}{cpu:>9}"
        f"{first.median:>11.1f} s{(result.peak_memory_bytes or 0) / 1e6:>11,.0f}"
    )


def benchmark(config: Config, *, splits: Sequence[Split], stages: Sequence[str], images: int, rounds: int) -> LoaderReport:
    """Lets the graph up to each stage, and the loader, take turns, each turn a process of its own.

    Args:
        config: That of train.py; of its settings those of the data, batch size, image size, device and seed count.
        splits: "train", "valid".
        stages: Of `WHAT`, in its order; what a stage adds is the difference to the one before in this list.
        images: That a turn gives, once it is warm, epoch after epoch.
        rounds: Turns of each.

    Raises:
        ValueError: Shards or settings that cannot be used.
    """
    device = choose_device(config.device)
    config = apply_tuned(config, device, 1)
    threads = share_threads(config, device, 1)[1]
    dtype = str(image_dtype(choose_autocast_dtype(config.precision, device), device)).removeprefix("torch.")
    shards = {split: config.data.open_shards(split) for split in splits}
    for split, opened in shards.items():
        if opened.is_remote:
            raise ValueError(f"--data.{split}: local shards are needed; throughput remote measures buckets")
    config = choose_batch_size(config, alone(device), max(opened.num_samples for opened in shards.values()))
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        turns = dict[str, Callable[[], Turn]]()
        for split in splits:
            for stage in stages:
                sizes = (config.batch_size, config.image_size)
                task = Task(stage, from_anywhere(config.data), split, *sizes, str(device), dtype, threads, images, config.seed)
                turns[f"{split} {stage}"] = _turn(task, Path(folder))
        outcomes = take_turns(turns, rounds)
    return LoaderReport(
        {split: config.data.train if split == "train" else config.data.valid for split in splits},
        {split: sum(opened.sizes) / opened.num_samples for split, opened in shards.items()},
        *(images, config.batch_size, config.image_size, str(device), threads, rounds, config.data),
        tuple(result for split in splits for result in _results(split, stages, outcomes)),
        versions=versions(("nvidia-dali-cuda120", "torch", "nvidia-nvimgcodec-cu12")),
    )


def from_anywhere(data: DataConfig) -> DataConfig:
    """The same settings for a process that runs in another folder: its paths are absolute, what was tuned has been applied."""
    names = ("train", "valid", "index_dir", "class_file")
    paths: dict[str, Any] = {name: absolute(getattr(data, name)) for name in names}
    return dataclasses.replace(data, **paths, tuned="", quarantine=tuple(map(absolute, data.quarantine)))


def _turn(task: Task, folder: Path) -> Callable[[], Turn]:
    path = folder / f"{task.split} {task.stage}"
    path.write_bytes(pickle.dumps(task))

    def run() -> Turn:
        command = (sys.executable, "-m", "tools.throughput.stage", path, str(time.monotonic()))
        ran = run_measured(command, ROOT, folder, ENVIRONMENT)
        said = ran.said
        return Turn(
            said["images"] / said["seconds"],
            1000 * said["cpu_seconds"] / said["images"],
            said["first_seconds"],
            ran.peak_memory_bytes,
        )

    return run


def _results(split: Split, stages: Sequence[str], outcomes: Mapping[str, Outcome[Turn]]) -> list[Result]:
    results, before = list[Result](), [NOTHING] * len(outcomes[f"{split} {stages[0]}"].turns)
    for stage in stages:
        what, outcome = WHAT[stage], outcomes[f"{split} {stage}"]
        if outcome.error is not None:
            results.append(Result(split, stage, what, outcome.error))
            before = []
            continue
        pairs = [*zip(outcome.turns, before, strict=False)]
        results.append(
            Result(
                *(split, stage, what, None),
                summarize([turn.images_per_second for turn in outcome.turns]),
                _summary([1000 / turn.images_per_second - 1000 / other.images_per_second for turn, other in pairs]),
                _summary([turn.cpu_milliseconds - other.cpu_milliseconds for turn, other in pairs]),
                summarize([turn.first_seconds for turn in outcome.turns]),
                max(turn.peak_memory_bytes for turn in outcome.turns),
            )
        )
        before = [*outcome.turns]
    return results


def _summary(differences: Sequence[float]) -> Statistic | None:
    """None where the stage before failed."""
    return summarize(differences) if differences else None
