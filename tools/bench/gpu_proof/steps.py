"""The steps of a proof. Each gives its figures one by one, so that those it had are not lost with a step that is ended."""

import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from model.distributed import choose_device
from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.loader import STD, Batch, Loader
from tools.bench.gpu_proof.plan import Figures, Ground
from tools.bench.gpu_proof.testing import run_tests
from tools.bench.linked import LinkedShards, photograph
from tools.run.config import Config, image_dtype, share_threads
from tools.shards.encode import Encoder
from tools.shards.shape import Shape
from tools.throughput.model import make_case
from tools.throughput.stage import Task, stage_batches
from tools.throughput.turn import cpu_seconds

ROOT = Path(__file__).parents[3]
LOADS = (0.0, 0.65, 1.0)  # shares of the decoder in hardware
BUSY = "nvidia-smi --query-gpu=utilization.gpu,utilization.jpeg --format=csv,noheader,nounits"
# Stretches that the trainer names for the profiler; they are no kernels.
NAMED = re.compile(r"forward|backward|update|data: |dali: |Optimizer|ProfilerStep|name\b", re.IGNORECASE)

# What pytest is given, and what it is given in a rehearsal.
DAMAGED, DAMAGED_ON_CPU = ["tests/gpu/test_bad_samples_on_gpu.py"], ["tests/pipelines/test_bad_samples.py", "-k", "reaches"]
WAITS = [f"tests/gpu/test_{name}_on_gpu.py" for name in ("train", "augment", "meter")] + ["-k", "wait or pace"]
WAITS_ON_CPU = ["tests/pipelines/test_meter.py"]
TESTS = ["tests/gpu/test_handover_on_gpu.py", "tests/gpu/test_draws_on_gpu.py"]
TESTS += [
    f"tests/gpu/test_loaders_on_gpu.py::TestOnGPU::test_{name}[dali-float16]"
    for name in ("batches", "batches_stay", "valid_pixels_are_the_cpus", "resumed_loop", "two_at_once", "reproducible")
]
TESTS += [
    f"tests/gpu/test_train_on_gpu.py::test_{name}"
    for name in ("training[bf16]", "training[fp16]", "a_run_that_is_stopped_goes_on", "predictions_are_the_cpus")
]
TESTS_ON_CPU = ["tests/pipelines/test_loaders.py", "-k", "dali and (batches or epochs)"]

Rows = Iterator[Figures]


def data(ground: Ground) -> Rows:
    """Draws the images and makes shards of them; few images under many names, read from the page cache."""
    shards, samples = (8, 512) if ground.is_rehearsal else (64, 40_000)
    num_threads = torch.get_num_threads()
    encoder = Encoder(Shape(resize=256))  # sets torch's threads to one
    torch.set_num_threads(num_threads)

    def smaller(figure: str, rng: np.random.Generator) -> bytes:
        [shaped] = encoder([photograph(figure, rng)])
        assert shaped.data is not None
        return shaped.data

    ground.originals.parent.mkdir()
    for folder, encode in ((ground.originals, photograph), (ground.resized, smaller)):
        made = LinkedShards(folder.with_name(f"{folder.name}-tars"), encode).make(shards, samples)
        folder.symlink_to(made)
        yield {folder.name: f"{samples:,} samples in {shards} shards"}


def pipelines(ground: Ground) -> Rows:
    """Seconds to a first batch, the first and the second time, and how far pixels are from a CPU's."""
    for split in ("train", "valid"):
        for time_of in ("first", "second"):
            start = time.perf_counter()
            _first_batch(ground, split)
            yield {f"{split}: seconds to the {time_of} loader's first batch": round(time.perf_counter() - start, 2)}
    for split, load in itertools.product(("valid", "train"), LOADS):
        ours, reference = _first_batch(ground, split, hw_decoder_load=load), _first_batch(ground, split, device="cpu")
        assert torch.equal(ours["target"].cpu(), reference["target"])
        difference = (ours["image"].float().cpu() - reference["image"]).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
        of_images = difference.mean((1, 2, 3))
        figures = {"mean": round(of_images.mean().item(), 3), "worst image": round(of_images.max().item(), 3)}
        yield {f"{split}: pixels against a CPU's, of 255, hw_decoder_load {load}": figures}


def damaged(ground: Ground) -> Rows:
    """Damaged files at several shares of the decoder in hardware."""
    yield from run_tests(DAMAGED_ON_CPU if ground.is_rehearsal else DAMAGED)


def waits(ground: Ground) -> Rows:
    """The step and mixing under torch's sync debug mode, and what the meter says of a host that is too slow."""
    yield from run_tests(WAITS_ON_CPU if ground.is_rehearsal else WAITS)


def tests(ground: Ground) -> Rows:
    """Overwriting, draws, the loader's contract, and training to its end."""
    yield from run_tests(TESTS_ON_CPU if ground.is_rehearsal else TESTS)


def step(ground: Ground) -> Rows:
    """The eager step over batch sizes."""
    for batch_size in (4, 8) if ground.is_rehearsal else (256, 64, 1024, 512):
        yield from _step_figures(ground, f"batch {batch_size}", batch_size)


def compiled(ground: Ground) -> Rows:
    """The compiled step, as CUDA graphs."""
    if ground.is_rehearsal:
        yield {"left out": "a CPU takes minutes to compile it"}
        return
    yield from _step_figures(ground, "batch 256, reduce-overhead", 256, compile="reduce-overhead")


def decode(ground: Ground) -> Rows:
    """Reading and decoding alone: over the hardware decoder's share of the images, then over threads at the best share."""
    most, threads = len(os.sched_getaffinity(0)), _threads(choose_device(ground.device))
    rates = {}
    for load in (0.65,) if ground.is_rehearsal else (0.0, 0.35, 0.65, 0.9):
        found = _decode_figures(ground, load, threads)
        rates[load] = found["images/s"]
        yield {f"hw_decoder_load {load}, {threads} threads": found}
    best = max(rates, key=lambda load: rates[load])
    for count in (1,) if ground.is_rehearsal else sorted({most // 2, 3 * most // 4, most}):
        yield {f"hw_decoder_load {best}, {count} threads": _decode_figures(ground, best, count)}


def job_originals(ground: Ground) -> Rows:
    """Two epochs of train.py on originals, a profile in the first."""
    yield from _job(ground, ground.originals)


def job_resized(ground: Ground) -> Rows:
    """The same on smaller images."""
    yield from _job(ground, ground.resized)


def compare_train(ground: Ground) -> Rows:
    """Other loaders on the same images, augmented for training."""
    yield from _compare(ground, "train")


def compare_valid(ground: Ground) -> Rows:
    """The same as for validation."""
    yield from _compare(ground, "valid")


def _first_batch(ground: Ground, split: str, device: str = "", **settings: Any) -> Batch:
    with _open(ground, split, device or ground.device, **settings) as loader:
        batch = loader.next()
        assert batch is not None
        if batch["image"].is_cuda:
            torch.cuda.synchronize()
        return batch


def _open(ground: Ground, split: str, device_name: str, **settings: Any) -> Loader:
    device = choose_device(device_name)
    return build_loader(
        DataConfig(train=str(ground.originals), valid=f"{ground.originals}/train-00000*.tar", **settings),
        "train" if split == "train" else "valid",
        batch_size=64,
        image_size=224,
        device=device,
        dtype=image_dtype(torch.bfloat16, device),
        num_threads=_threads(device),
    )


def _threads(device: torch.device) -> int:
    """The CPU threads that train.py has decode there."""
    return share_threads(Config(), device, 1)[1]


def _step_figures(ground: Ground, name: str, batch_size: int, **options: Any) -> Rows:
    """What the trainer's step takes on a batch that lies on the device: by the clock, then in kernels."""
    steps, size = (1, 64) if ground.is_rehearsal else (10, 224)
    device = choose_device(ground.device)
    start = time.perf_counter()
    turn, memory = make_case(Config(epochs=1000, batch_size=batch_size, image_size=size, **options), device, steps)
    ready = time.perf_counter() - start
    seconds = [turn().seconds for _ in range(5)]
    figures = {
        "images/s": round(batch_size / statistics.median(seconds)),
        "ms": [round(1000 * each, 2) for each in seconds],
        "peak GB": round((memory or 0) / 1e9, 1),
        "seconds until warm": round(ready, 1),
    }
    yield {name: figures}
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        turn()
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    kernels = [event for event in events if not NAMED.match(event.key)]
    figures["kernels"] = sum(event.count for event in kernels) / steps
    figures["ms in kernels"] = round(sum(event.self_device_time_total for event in kernels) / 1000 / steps, 2)
    yield {name: figures}


def _decode_figures(ground: Ground, load: float, threads: int) -> Figures:
    """Images a second and CPU time an image, once it is warm, and how busy the GPU and its JPEG engines are meanwhile."""
    seconds, batch_size = (2, 16) if ground.is_rehearsal else (8, 256)
    settings = DataConfig(train=str(ground.originals), hw_decoder_load=load)
    task = Task("decode", settings, "train", batch_size, 224, str(choose_device(ground.device)), "float32", threads, 0, 0)
    batches = stage_batches(task)
    for _ in range(5):
        next(batches)
    cpu, start, count, busy = cpu_seconds(os.getpid()), time.perf_counter(), 0, None
    while (passed := time.perf_counter() - start) < seconds:
        if busy is None and passed > seconds / 2 and not ground.is_rehearsal:
            busy = subprocess.Popen(BUSY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, shell=True)
        count += len(next(batches))
    cpu = cpu_seconds(os.getpid()) - cpu
    batches.close()
    figures: Figures = {"images/s": round(count / passed), "CPU ms an image": round(1000 * cpu / count, 3)}
    if busy is not None:
        figures["GPU %, JPEG engines %"] = busy.communicate()[0].strip()
    return figures


def _job(ground: Ground, shards: Path) -> Rows:
    small = ("--batch-size", 16, "--image-size", 32, "--torch-threads", 1) if ground.is_rehearsal else ()
    folder = ground.work / "runs" / shards.name
    printed = _run(
        ground.work / f"train-{shards.name}.log",
        *("train.py", "--data.train", shards, "--data.valid", f"{shards}/train-000000.tar", "--device", ground.device, *small),
        *("--epochs", 2, "--log-every", 10, "--profile", 5, "--run-dir", folder),
        seconds=65,
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    second = [line for line in lines if line["split"] == "train" and line["epoch"] == 2]
    for name in ("images_per_second", "data_wait_percent", "launch_bound_percent", "gpu_memory_gigabytes"):
        if values := [line[name] for line in second if name in line]:
            yield {f"{name}, median of epoch 2": round(statistics.median(values), 1)}
    yield {"verdicts": re.findall(r"train: (.*)", printed), "chosen": re.findall(r"--batch-size .*chosen.*", printed)}
    if (folder / "profile.txt").exists():
        yield {"longest kernels": _longest((folder / "profile.txt").read_text())}


def _longest(table: str) -> list[str]:
    """The first rows of the profiler's table: name, the device's share of the time."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if line.strip() and not line.startswith("-")]
    return [f"{row[0]}: {' '.join(row[-4:])}" for row in rows if not NAMED.match(row[0])][:8]


def _compare(ground: Ground, split: str) -> Rows:
    images, batch_size = (64, 16) if ground.is_rehearsal else (10_000, 256)
    report = ground.work / f"compare-{split}-report.json"
    only = ("ours", "pillow") if ground.is_rehearsal else ("ours", "pillow", "torchvision-gpu")
    _run(
        ground.work / f"throughput-{split}.log",
        *("-m", "tools.throughput", "compare", ground.originals, "--device", ground.device, "--splits", split),
        *("--images", images, "--batch-size", batch_size, "--rounds", 1, "--only", *only, "--json", report),
        seconds=110,
        may_fail=True,  # a rival may, and the report says so
    )
    for row in json.loads(report.read_text())["results"]:
        figures = {name: row[name] and row[name]["rounds"] for name in ("images_per_second", "ratio", "cpu_milliseconds")}
        yield {row["name"]: {"error": row["error"]} if row["error"] else figures}


def _run(log: Path, *arguments: object, seconds: float, may_fail: bool = False) -> str:
    """What this Python prints into a file with these arguments; it is interrupted after so many seconds, as by Ctrl-C.

    Raises:
        ChildProcessError: It fails by itself.
    """
    is_late = False
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            is_late = True
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
    printed = log.read_text()
    if process.returncode and not is_late and not may_fail:
        raise ChildProcessError(f"exit status {process.returncode}: {' '.join(printed.splitlines()[-1:])}")
    return printed
