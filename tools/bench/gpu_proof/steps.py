"""The steps of a proof. Each yields its figures one by one, so that a step that is ended loses none of them."""

import contextlib
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from model.distributed import choose_device
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import STD, Batch
from pipelines.machine import cpu_seconds, num_cpus
from tools.bench.gpu_proof.plan import Figures, Setup
from tools.bench.gpu_proof.testing import run_tests
from tools.bench.linked import LinkedShards, photograph
from tools.run.config import Config
from tools.run.resources import image_dtype, share_threads
from tools.shards.encode import Encoder
from tools.shards.shape import Shape
from tools.throughput.model import make_case
from tools.throughput.process import ROOT
from tools.throughput.stage import StageTask, stage_batches

LOADS = (0.0, 0.65, 1.0)  # shares of the hardware decoder
BUSY = "nvidia-smi --query-gpu=utilization.gpu,utilization.jpeg --format=csv,noheader,nounits"
# Ranges that the trainer names for the profiler; they are not kernels.
NAMED = re.compile(r"forward|backward|update|data: |dali: |Optimizer|ProfilerStep|name\b", re.IGNORECASE)

# Arguments of pytest, and those of a rehearsal.
DAMAGED, DAMAGED_ON_CPU = ["tests/gpu/test_bad_samples_on_gpu.py"], ["tests/pipelines/test_bad_samples.py", "-k", "reaches"]
WAITS = [f"tests/gpu/test_{name}_on_gpu.py" for name in ("train", "augment", "meter")] + ["-k", "wait or launch_bound"]
WAITS_ON_CPU = ["tests/pipelines/test_meter.py"]
TESTS = ["tests/gpu/test_handover_on_gpu.py", "tests/gpu/test_draws_on_gpu.py"]
TESTS += [
    f"tests/gpu/test_loaders_on_gpu.py::TestOnGPU::test_{name}[dali-float16]"
    for name in ("batches", "batches_stay", "valid_pixels_match_the_cpu", "resumed_loop", "two_at_once", "reproducible")
]
TESTS += [
    f"tests/gpu/test_train_on_gpu.py::test_{name}"
    for name in ("training[bf16]", "training[fp16]", "stopped_run_resumes", "predictions_match_the_cpu")
]
TESTS_ON_CPU = ["tests/pipelines/test_loaders.py", "-k", "dali and (batches or epochs)"]

Rows = Iterator[Figures]


def data(setup: Setup) -> Rows:
    """Draws a few images, and makes shards with many names for them, which are read from the page cache."""
    shards, samples = (8, 512) if setup.is_rehearsal else (64, 40_000)
    num_threads = torch.get_num_threads()
    encoder = Encoder(Shape(resize=256))  # sets torch's threads to one
    torch.set_num_threads(num_threads)

    def smaller(figure: str, rng: np.random.Generator) -> bytes:
        [shaped] = encoder([photograph(figure, rng)])
        assert shaped.data is not None
        return shaped.data

    setup.originals.parent.mkdir()
    for folder, encode in ((setup.originals, photograph), (setup.resized, smaller)):
        folder.symlink_to(LinkedShards(folder.with_name(f"{folder.name}-tars"), encode).make(shards, samples))
        yield {folder.name: f"{samples:,} samples in {shards} shards"}


def pipelines(setup: Setup) -> Rows:
    """Measures the seconds to the first batch, twice, and the difference between the pixels and a CPU's."""
    for split in ("train", "valid"):
        for time_of in ("first", "second"):
            start = time.perf_counter()
            _first_batch(setup, split, setup.device)
            yield {f"{split}: seconds to the {time_of} loader's first batch": round(time.perf_counter() - start, 2)}
    for split, load in itertools.product(("valid", "train"), LOADS):
        ours, reference = _first_batch(setup, split, setup.device, hw_decoder_load=load), _first_batch(setup, split, "cpu")
        assert torch.equal(ours["target"].cpu(), reference["target"])
        difference = (ours["image"].float().cpu() - reference["image"]).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
        of_images = difference.mean((1, 2, 3))
        figures = {"mean": round(of_images.mean().item(), 3), "worst image": round(of_images.max().item(), 3)}
        yield {f"{split}: pixels against a CPU's, of 255, hw_decoder_load {load}": figures}


def step(setup: Setup) -> Rows:
    """Measures the eager step over batch sizes."""
    for batch_size in (4, 8) if setup.is_rehearsal else (256, 64, 1024, 512):
        yield from _step_figures(setup, f"batch {batch_size}", batch_size)


def compiled(setup: Setup) -> Rows:
    """Measures the compiled step with CUDA graphs."""
    if setup.is_rehearsal:
        yield {"left out": "a CPU takes minutes to compile it"}
    else:
        yield from _step_figures(setup, "batch 256, reduce-overhead", 256, compile="reduce-overhead")


def decode(setup: Setup) -> Rows:
    """Measures reading and decoding alone, over the hardware decoder's share, then over threads at the best share."""
    most, threads = num_cpus(), share_threads(None, None, choose_device(setup.device), 1)[1]
    rates = {}
    for load in (0.65,) if setup.is_rehearsal else (0.0, 0.35, 0.65, 0.9):
        found = _decode_figures(setup, load, threads)
        rates[load] = found["images/s"]
        yield {f"hw_decoder_load {load}, {threads} threads": found}
    best = max(rates, key=lambda load: rates[load])
    for count in (1,) if setup.is_rehearsal else sorted({most // 2, 3 * most // 4, most}):
        yield {f"hw_decoder_load {best}, {count} threads": _decode_figures(setup, best, count)}


def _first_batch(setup: Setup, split: str, device_name: str, **settings: Any) -> Batch:
    device = choose_device(device_name)
    config = DataConfig(train=str(setup.originals), valid=f"{setup.originals}/train-00000*.tar", **settings)
    spec = LoaderSpec(
        split="train" if split == "train" else "valid",
        batch_size=64,
        image_size=224,
        device=device,
        dtype=image_dtype(torch.bfloat16, device),
        num_threads=share_threads(None, None, device, 1)[1],
    )
    with build_loader(config, spec) as loader:
        batch = next(iter(loader))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return batch


def _step_figures(setup: Setup, name: str, batch_size: int, **options: Any) -> Rows:
    """Measures the trainer's step on a batch that lies on the device: time on the clock, then time in kernels."""
    steps, size = (1, 64) if setup.is_rehearsal else (10, 224)
    device = choose_device(setup.device)
    start = time.perf_counter()
    turn, memory = make_case(Config(epochs=1000, batch_size=batch_size, image_size=size, **options), device, steps)
    ready = time.perf_counter() - start
    seconds = [turn()["seconds"] or 0.0 for _ in range(5)]
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


def _decode_figures(setup: Setup, load: float, threads: int) -> Figures:
    """Returns images per second, CPU time per image, and the utilization of the GPU and its JPEG engines, after warm-up."""
    seconds, batch_size = (2, 16) if setup.is_rehearsal else (8, 256)
    device = choose_device(setup.device)
    spec = LoaderSpec(split="train", batch_size=batch_size, image_size=224, device=device, num_threads=threads)
    batches = stage_batches(StageTask("decode", DataConfig(train=str(setup.originals), hw_decoder_load=load), spec))
    for _ in range(5):
        next(batches)
    cpu, start, count, busy = cpu_seconds(), time.perf_counter(), 0, None
    while (passed := time.perf_counter() - start) < seconds:
        if busy is None and passed > seconds / 2 and not setup.is_rehearsal:
            busy = subprocess.Popen(BUSY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, shell=True)
        count += len(next(batches))
    cpu = cpu_seconds() - cpu
    batches.close()
    figures: Figures = {"images/s": round(count / passed), "CPU ms an image": round(1000 * cpu / count, 3)}
    if busy is not None:
        figures["GPU %, JPEG engines %"] = busy.communicate()[0].strip()
    return figures


def _job(setup: Setup, shards: Path) -> Rows:
    """Runs two epochs of train.py, with a profile in the first."""
    small = ("--batch-size", 16, "--image-size", 32, "--torch-threads", 1) if setup.is_rehearsal else ()
    folder = setup.work / "runs" / shards.name
    printed = _run(
        setup.work / f"train-{shards.name}.log",
        *("train.py", "--data.train", shards, "--data.valid", f"{shards}/train-000000.tar", "--device", setup.device, *small),
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
        rows = [re.split(r"\s{2,}", line.strip()) for line in (folder / "profile.txt").read_text().splitlines()]
        kernels = [row for row in rows if row[0] and not row[0].startswith("-") and not NAMED.match(row[0])]
        yield {"longest kernels": [f"{row[0]}: {' '.join(row[-4:])}" for row in kernels[:8]]}


def _compare(setup: Setup, split: str) -> Rows:
    """Compares loaders on the same images."""
    images, batch_size = (64, 16) if setup.is_rehearsal else (10_000, 256)
    report = setup.work / f"compare-{split}-report.json"
    only = ("ours", "pillow") if setup.is_rehearsal else ("ours", "pillow", "torchvision-gpu")
    _run(
        setup.work / f"throughput-{split}.log",
        *("-m", "tools.throughput", "compare", setup.originals, "--device", setup.device, "--splits", split),
        *("--images", images, "--batch-size", batch_size, "--rounds", 1, "--only", *only, "--json", report),
        seconds=110,
        may_fail=True,  # a competitor may, and the report says so
    )
    for row in json.loads(report.read_text())["results"]:
        figures = {name: row[name] and row[name]["rounds"] for name in ("images_per_second", "ratio", "cpu_milliseconds")}
        yield {row["name"]: {"error": row["error"]} if row["error"] else figures}


def _run(log: Path, *arguments: object, seconds: float, may_fail: bool = False) -> str:
    """Runs this Python and returns its output, which goes to a file. Interrupts it, like Ctrl-C, after a number of seconds."""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            may_fail = True
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
    printed = log.read_text()
    if process.returncode and not may_fail:
        raise ChildProcessError(f"exit status {process.returncode}: {' '.join(printed.splitlines()[-1:])}")
    return printed


def _tests(on_a_gpu: list[str], on_a_cpu: list[str]) -> Callable[[Setup], Rows]:
    return lambda setup: run_tests(on_a_cpu if setup.is_rehearsal else on_a_gpu)


STEPS: dict[str, Callable[[Setup], Rows]] = {
    "data": data,
    "pipelines": pipelines,
    "damaged": _tests(DAMAGED, DAMAGED_ON_CPU),  # damaged files with several shares of the hardware decoder
    "waits": _tests(WAITS, WAITS_ON_CPU),  # step and mixing in torch's sync debug mode, and the meter with a slow host
    "step": step,
    "decode": decode,
    "job-originals": lambda setup: _job(setup, setup.originals),
    "job-resized": lambda setup: _job(setup, setup.resized),
    "tests": _tests(TESTS, TESTS_ON_CPU),  # overwriting, random draws, the loader contract, and whole training runs
    "compiled": compiled,
    "compare-train": lambda setup: _compare(setup, "train"),
    "compare-valid": lambda setup: _compare(setup, "valid"),
}
