"""`throughput model`: the training step alone, over batch sizes and precisions, relative to a large matrix product."""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.distributed import alone, choose_device
from model.factory import build_network
from model.loss import training_loss
from pipelines.printable import counted
from tools.run.config import Config
from tools.run.resources import choose_autocast_dtype
from tools.throughput.hardware import versions
from tools.throughput.loops import NUM_CLASSES, device_name, make_trainer, measured
from tools.throughput.options import Model
from tools.throughput.report import MEMORY, Column, Figure, Report, Row, Table
from tools.throughput.rounds import Outcome, Turn, TurnError, summarize, take_turns

TOO_LARGE = "does not fit into the device's memory"
FLOPS_BATCH_SIZE = 2  # images for which operations are counted; batch normalization needs two
SMALLEST_MATRIX, LARGEST_MATRIX = 256, 8192
MATRIX_SECONDS, MATRIX_TURN_SECONDS = 0.05, 0.25
COLUMNS = (
    Column("images_per_second", "images/s", ",.1f", interval=True),
    Column("step_seconds", "ms", ",.2f", scale=1000),
    Column("flops_per_second", "GFLOP/s", ",.4g", scale=1e-9),
    Column("matrix_percent", "% of matrix product", ",.1f"),
    MEMORY,
)


def benchmark(options: Model) -> Report:
    """Runs training steps in each precision with each batch size, and matrix products in each precision, in turns."""
    device = choose_device(options.device)
    is_cuda, steps, name = device.type == "cuda", options.steps_on(device.type), device_name(device)
    settings = {name: getattr(options, name) for name in ("image_size", "compile", "torch_threads")}
    config = Config(
        epochs=1000, model=ModelConfig(arch=options.arch, options=options.options, aux_logits=options.aux_logits), **settings
    )
    if options.torch_threads is not None:
        torch.set_num_threads(options.torch_threads)
    flops, threads = count_flops(config), torch.get_num_threads()
    turns, sizes, memory = dict[str, Callable[[], Turn]](), dict[str, int](), dict[str, Figure]()
    cases = [
        dataclasses.replace(config, precision=precision, batch_size=batch_size)
        for precision in dict.fromkeys(options.precisions or (("tf32", "bf16") if is_cuda else ("fp32",)))
        for batch_size in dict.fromkeys(options.batch_sizes or ((64, 128, 256, 512) if is_cuda else (16, 32)))
    ]
    for case in cases:
        if case.precision not in sizes:
            sizes[case.precision], turns[case.precision] = choose_product(case.precision, device)
        with contextlib.suppress(torch.OutOfMemoryError):
            turns[_name(case)], memory[_name(case)] = make_case(case, device, steps)
    outcomes = take_turns(turns, options.rounds)
    products = {each: [2 * size**3 / seconds for seconds in outcomes[each].rounds("seconds")] for each, size in sizes.items()}
    rates = {each: summarize(product) for each, product in products.items()}
    rows = [_row(case, outcomes.get(_name(case)), memory.get(_name(case)), flops, products[case.precision]) for case in cases]
    found = {"device": name, "steps": steps, "flops_per_image": flops, "torch_threads": threads}
    found["matrices"] = [{"precision": each, "size": sizes[each], "flops_per_second": rates[each]} for each in sizes]
    return Report(
        heading=f"training steps on images of {options.image_size} pixels, {steps} per turn, {flops / 1e9:.2f} GFLOP per "
        f"image; {name}, {counted(threads, 'thread')}",
        tables=[Table("precision, batch", COLUMNS, rows)],
        notes=[
            f"{each}: a matrix product ({size:,} x {size:,}) reaches {rates[each].median / 1e9:,.4g} GFLOP/s"
            for each, size in sizes.items()
        ],
        settings={**vars(options), **found},
        may_have_errors=True,
        versions=versions("torch"),
    )


def _name(config: Config) -> str:
    return f"{config.precision:<5}{config.batch_size:>5}"


def _row(config: Config, outcome: Outcome | None, memory: Figure, flops_per_image: int, products: list[float]) -> Row:
    """Returns the row of a step. Its operations are those of convolutions and matrix products."""
    labels = {"precision": config.precision, "batch_size": config.batch_size}
    if outcome is None or outcome.error:
        return Row(_name(config), error=outcome.error if outcome else TOO_LARGE, labels=labels)
    seconds = outcome.rounds("seconds")
    rates = [config.batch_size / each for each in seconds]
    flops = [flops_per_image * rate for rate in rates]
    figures = {
        "images_per_second": summarize(rates),
        "step_seconds": summarize(seconds),
        "flops_per_second": summarize(flops),
        "matrix_percent": summarize([100 * own / product for own, product in zip(flops, products, strict=True)]),
        "peak_memory_bytes": memory,
    }
    return Row(_name(config), figures, labels=labels)


def count_flops(config: Config) -> int:
    """Counts the operations of convolutions and matrix products for an image, forward and backward, with the loss.

    A multiplication and an addition are two operations. They follow from the shapes, so GoogLeNet computes nothing.
    """
    settings = config.model
    with torch.device("cpu" if settings.arch else "meta"):  # others may compute values when they are built
        model = build_network(settings, NUM_CLASSES, transform_input=False).train()
        image = torch.empty(FLOPS_BATCH_SIZE, 3, config.image_size, config.image_size)
        target = torch.zeros(FLOPS_BATCH_SIZE, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        outputs, smoothing = model(image), settings.label_smoothing
        training_loss(outputs, target, label_smoothing=smoothing, aux_weight=settings.aux_weight).total.backward()
    return int(counter.get_total_flops()) // FLOPS_BATCH_SIZE


def make_case(config: Config, device: torch.device, steps: int) -> tuple[Callable[[], Turn], int | None]:
    """Returns the trainer's step as a competitor, warmed up, and on a GPU the peak of its memory in bytes."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if is_cuda else 0
    autocast_dtype = choose_autocast_dtype(config.precision, device)
    turn = measured(make_trainer(config, alone(device), autocast_dtype, steps), steps, device)
    memory = torch.cuda.max_memory_allocated(device) - before if is_cuda else None
    return _in_precision(config.precision, device, turn), memory


def _in_precision(precision: str, device: torch.device, turn: Callable[[], Turn]) -> Callable[[], Turn]:
    """Sets the float32 mode of the GPU before each turn, because it is one setting for all turns.

    A turn that once fitted may run out of memory, because the other competitors keep theirs.
    """

    def run() -> Turn:
        choose_autocast_dtype(precision, device)
        try:
            return turn()
        except torch.OutOfMemoryError:
            raise TurnError(f"{TOO_LARGE} beside the others") from None

    return run


def choose_product(precision: str, device: torch.device) -> tuple[int, Callable[[], Turn]]:
    """Returns the side of square matrices whose product takes a moment, and the product as a competitor."""
    dtype = choose_autocast_dtype(precision, device) or torch.float32
    size, seconds = SMALLEST_MATRIX // 2, 0.0
    while size < LARGEST_MATRIX and seconds < MATRIX_SECONDS:
        size *= 2
        once = make_product(size, dtype, device, repeats=1)
        seconds = min(once()["seconds"] or 0 for _ in range(3))  # other work may have used the device
    repeats = max(1, round(MATRIX_TURN_SECONDS / seconds))
    return size, _in_precision(precision, device, make_product(size, dtype, device, repeats))


def make_product(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> Callable[[], Turn]:
    """Returns the product of two random matrices as a competitor, warmed up."""
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(one)

    def run() -> None:
        for _ in range(repeats):
            torch.mm(one, other, out=result)

    return measured(run, repeats, device)
