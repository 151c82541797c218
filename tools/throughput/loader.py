"""`throughput loader`: the loader alone, and the cost of each of its stages."""

import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from model.distributed import alone, choose_device
from pipelines.build import LoaderSpec
from pipelines.printable import counted
from tools.run.config import Config
from tools.run.resources import choose_autocast_dtype, image_dtype, share_threads, with_batch_size
from tools.throughput.hardware import DALI_PACKAGES, DECODER_PACKAGES, versions
from tools.throughput.options import STAGES, Loader, Split, Stage
from tools.throughput.process import run_loader
from tools.throughput.report import LOADER_COSTS, RATE, Column, Figure, Report, Row, Table
from tools.throughput.rounds import Outcome, Turn, summarize, take_turns
from tools.throughput.stage import StageTask

WHAT: dict[Stage, str] = {
    "read": "read",
    "headers": "+ read headers",
    "decode": "+ decode",
    "resize": "+ resize",
    "normalize": "+ augment and normalize",
    "hand-over": "+ hand over: the loader",
}
COLUMNS = (RATE, Column("megabytes_per_second", "MB/s", ",.1f"), Column("milliseconds", "ms", ",.2f"), *LOADER_COSTS)


def benchmark(options: Loader) -> Report:
    """Runs the pipelines that end with each stage, and the loader, in turns, each turn in a process of its own."""
    settings = {name: getattr(options, name) for name in ("data", "batch_size", "image_size", "device", "seed")}
    config = Config(**settings)  # checks them
    device = choose_device(config.device)
    threads = share_threads(None, config.data.threads, device, 1)[1]
    dtype = image_dtype(choose_autocast_dtype(config.precision, device), device)
    shards = {split: config.data.open_shards(split) for split in options.splits}
    config = with_batch_size(config, alone(device), max(opened.num_samples for opened in shards.values()))
    stages = [stage for stage in STAGES if stage in options.stages]
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        turns = dict[str, Callable[[], Turn]]()
        for split in options.splits:
            spec = LoaderSpec(
                split=split,
                batch_size=config.batch_size,
                image_size=config.image_size,
                device=device,
                dtype=dtype,
                num_threads=threads,
                seed=config.seed,
            )
            for stage in stages:
                turns[f"{split} {stage}"] = _turn(StageTask(stage, config.data, spec, options.images), Path(folder))
        outcomes = take_turns(turns, options.rounds)
    sizes = {split: sum(opened.sizes) / opened.num_samples for split, opened in shards.items()}
    locations: dict[Split, str] = {split: getattr(config.data, split) for split in options.splits}
    found = {"shards": locations, "bytes_per_image": sizes, "batch_size": config.batch_size, "device": str(device)}
    return Report(
        heading=f"{counted(options.images, 'image')} per turn, {counted(options.rounds, 'round')}, batches of "
        f"{config.batch_size} x {config.image_size} pixels, {counted(threads, 'thread')}, {device}; medians; "
        "ms per image: what a stage adds",
        tables=[
            Table(f"{split}: {where}, {size / 1e3:.0f} KB per image", COLUMNS, _rows(split, stages, outcomes, size))
            for (split, where), size in zip(locations.items(), sizes.values(), strict=True)
        ],
        settings={**vars(options), **found, "threads": threads},
        versions=versions(*DALI_PACKAGES, "torch", *DECODER_PACKAGES),
    )


def _turn(task: StageTask, folder: Path) -> Callable[[], Turn]:
    path = folder / f"{task.spec.split} {task.stage}"
    path.write_bytes(pickle.dumps(task))
    return lambda: run_loader((sys.executable, "-m", "tools.throughput.stage", path), folder)


def _rows(split: Split, stages: Sequence[Stage], outcomes: Mapping[str, Outcome], bytes_per_image: float) -> list[Row]:
    """Returns the rows of a split. A stage costs the difference to the stage before; if that failed, it is not known."""
    rows = list[Row]()
    before = dict.fromkeys(("milliseconds", "cpu_milliseconds"), [0.0] * len(outcomes[f"{split} {stages[0]}"].turns))
    for stage in stages:
        outcome, costs = outcomes[f"{split} {stage}"], dict[str, list[float]]()
        row = Row.of(WHAT[stage], outcome, COLUMNS, split=split, stage=stage)
        if outcome.error is None:
            rates = outcome.rounds("images_per_second")
            costs = {"milliseconds": [1000 / rate for rate in rates], "cpu_milliseconds": outcome.rounds("cpu_milliseconds")}
            own: dict[str, Figure] = {"megabytes_per_second": summarize([rate * bytes_per_image / 1e6 for rate in rates])}
            for name, own_costs in costs.items():
                own[name] = summarize([a - b for a, b in zip(own_costs, before[name], strict=True)]) if before else None
            row = Row(row.what, {**row.figures, **own}, labels=row.labels)
        rows.append(row)
        before = costs
    return rows
