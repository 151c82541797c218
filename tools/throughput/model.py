"""`throughput model`: the training step alone, over batch sizes and precisions, against what the device multiplies at most."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.distributed import alone, choose_device
from model.googlenet import googlenet
from model.loss import googlenet_loss
from tools.bench.step import NUM_CLASSES, Turn, make_loader, make_trainer, measured
from tools.run.config import Config, choose_autocast_dtype
from tools.throughput.hardware import versions
from tools.throughput.report import Bar, Report
from tools.throughput.rounds import Outcome, Statistic, TurnError, summarize, take_turns

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

TOO_LARGE = "does not fit into the device's memory"
FLOPS_BATCH_SIZE = 2  # images for which operations are counted; batch normalization needs two
SMALLEST_MATRIX, LARGEST_MATRIX = 256, 8192
MATRIX_SECONDS, MATRIX_TURN_SECONDS = 0.05, 0.25


@dataclass(frozen=True)
class Matrix:
    """A product of two large square matrices in one precision: what the device's arithmetic comes to, measured, not promised.

    Attributes:
        precision: As --precision of train.py.
        size: Rows and columns.
        flops_per_second: A multiplication and an addition are two operations.
    """

    precision: Precision
    size: int
    flops_per_second: Statistic


@dataclass(frozen=True)
class Result:
    """The step in one precision and with one batch size.

    Attributes:
        precision: As --precision of train.py.
        batch_size: Images a step.
        error: Why there are no figures.
        images_per_second: Over the rounds.
        step_seconds: Of one step, a mean over those of the turn.
        flops_per_second: Of the network's convolutions and matrix products, forward and backward.
        matrix_percent: The same as a part of what the matrix product of this precision came to in the same round.
        peak_memory_bytes: On a GPU, what this step alone has allocated at most; None on a CPU.
    """

    precision: Precision
    batch_size: int
    error: str | None = None
    images_per_second: Statistic | None = None
    step_seconds: Statistic | None = None
    flops_per_second: Statistic | None = None
    matrix_percent: Statistic | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class ModelReport(Report):
    """All that was measured; `flops_per_image` is what an image costs, forward and backward."""

    device: str
    image_size: int
    aux_logits: bool
    compile: str
    steps: int
    torch_threads: int
    flops_per_image: int
    matrices: tuple[Matrix, ...]
    results: tuple[Result, ...]

    def bars(self) -> Iterable[Bar]:
        results = [(result, result.images_per_second) for result in self.results]
        return [Bar(result.precision, f"batches of {result.batch_size}", rate) for result, rate in results if rate]

    def __str__(self) -> str:
        lines = [
            f"training steps on images of {self.image_size} pixels, {self.steps} a turn, {self.flops_per_image / 1e9:.2f} "
            f"GFLOP an image; {self.device}, {self.torch_threads} threads; {self.hardware}",
            *(
                f"{matrix.precision}: a matrix product ({matrix.size:,} x {matrix.size:,}) comes to "
                f"{matrix.flops_per_second.median / 1e9:,.4g} GFLOP/s"
                for matrix in self.matrices
            ),
            f"{'precision':<10}{'batch':>6}{'images/s':>10}{'':>18}{'ms':>10}{'GFLOP/s':>12}{'of product':>12}{'memory':>11}",
            *map(_line, self.results),
        ]
        return "\n".join(lines)


def _line(result: Result) -> str:
    start = f"{result.precision:<10}{result.batch_size:>6}"
    rate, seconds, flops, percent = (
        *(result.images_per_second, result.step_seconds),
        *(result.flops_per_second, result.matrix_percent),
    )
    if rate is None or seconds is None or flops is None or percent is None:
        return f"{start}  {result.error}"
    memory = result.peak_memory_bytes
    return (
        f"{start}{rate.median:>10,.1f}{f'({rate.low:,.1f}-{rate.high:,.1f})':>18}{1000 * seconds.median:>10,.2f}"
        f"{flops.median / 1e9:>12,.4g}{percent.median:>10,.1f} %{f'{memory / 1e6:,.0f} MB' if memory else '-':>11}"
    )


def benchmark(
    config: Config, *, batch_sizes: Sequence[int], precisions: Sequence[Precision], steps: int, rounds: int
) -> ModelReport:
    """Takes turns of so many steps in each precision with each batch size, and of matrix products in each precision.

    Args:
        config: Of its settings those count that make a step; its batch size and its precision do not.
        batch_sizes: Images a step, at least 2.
        precisions: As --precision of train.py.
        steps: Of a turn.
        rounds: Turns of each.

    Raises:
        ValueError: A setting that this device does not have.
    """
    if config.torch_threads is not None:
        torch.set_num_threads(config.torch_threads)
    device = choose_device(config.device)
    flops, sizes = count_flops(config), dict[Precision, int]()
    turns, blanks = dict[str, Callable[[], Turn]](), list[Result]()
    for precision in precisions:
        sizes[precision], turns[_product(precision)] = choose_product(precision, device)
        for batch_size in batch_sizes:
            case = dataclasses.replace(config, precision=precision, batch_size=batch_size)
            blank = Result(precision, batch_size)
            try:
                turns[_name(blank)], memory = make_case(case, device, steps)
            except torch.OutOfMemoryError:
                blanks.append(dataclasses.replace(blank, error=TOO_LARGE))
            else:
                blanks.append(dataclasses.replace(blank, peak_memory_bytes=memory))
    outcomes = take_turns(turns, rounds)
    return ModelReport(
        torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        *(config.image_size, config.model.aux_logits, config.compile, steps, torch.get_num_threads(), flops),
        tuple(
            Matrix(precision, size, summarize([2 * size**3 / turn.seconds for turn in outcomes[_product(precision)].turns]))
            for precision, size in sizes.items()
        ),
        tuple(_result(blank, flops, sizes[blank.precision], outcomes) for blank in blanks),
        versions=versions(("torch",)),
    )


def _name(result: Result) -> str:
    return f"{result.precision} {result.batch_size}"


def _product(precision: str) -> str:
    return f"{precision} product"


def count_flops(config: Config) -> int:
    """Operations of convolutions and matrix products for an image, forward and backward: the network's and its loss's.

    They follow from the shapes, so that nothing is computed.
    """
    with torch.device("meta"):
        settings = config.model
        model = googlenet(NUM_CLASSES, settings.aux_logits, dropout=settings.dropout).train()
        image = torch.empty(FLOPS_BATCH_SIZE, 3, config.image_size, config.image_size)
        target = torch.empty(FLOPS_BATCH_SIZE, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        options = {"label_smoothing": settings.label_smoothing, "aux_weight": settings.aux_weight}
        googlenet_loss(model(image), target, **options).total.backward()
    return int(counter.get_total_flops()) // FLOPS_BATCH_SIZE


def make_case(config: Config, device: torch.device, steps: int) -> tuple[Callable[[], Turn], int | None]:
    """The trainer's step as a competitor, warm, and how many bytes it allocates at most on a GPU.

    Raises:
        ValueError: A setting that this device does not have.
        torch.OutOfMemoryError: It does not fit.
    """
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    autocast_dtype = choose_autocast_dtype(config.precision, device)
    world = alone(device)
    loader = make_loader(config, device, autocast_dtype, steps)
    turn = measured(make_trainer(config, world, autocast_dtype, loader, steps), steps, device)
    memory = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return _in_precision(config.precision, device, turn), memory


def _in_precision(precision: str, device: torch.device, turn: Callable[[], Turn]) -> Callable[[], Turn]:
    """Sets first what float32 means on a GPU, which is one setting for all turns.

    What the others keep may leave too little memory for a turn, though it once fitted.
    """

    def run() -> Turn:
        choose_autocast_dtype(precision, device)
        try:
            return turn()
        except torch.OutOfMemoryError:
            raise TurnError(f"{TOO_LARGE} beside the others") from None

    return run


def choose_product(precision: str, device: torch.device) -> tuple[int, Callable[[], Turn]]:
    """Rows of square matrices whose product takes a moment, more than which are not needed, and the product as a competitor.

    Raises:
        ValueError: A precision that this device does not have.
    """
    dtype = choose_autocast_dtype(precision, device) or torch.float32
    size, seconds = SMALLEST_MATRIX // 2, 0.0
    while size < LARGEST_MATRIX and seconds < MATRIX_SECONDS:
        size *= 2
        once = make_product(size, dtype, device, repeats=1)
        seconds = min(once().seconds for _ in range(3))  # something else may have had the device
    repeats = max(1, round(MATRIX_TURN_SECONDS / seconds))
    return size, _in_precision(precision, device, make_product(size, dtype, device, repeats))


def make_product(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> Callable[[], Turn]:
    """A product of two random matrices as a competitor, warm."""
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    into = torch.empty_like(one)

    def run() -> None:
        for _ in range(repeats):
            torch.mm(one, other, out=into)

    return measured(run, repeats, device)


def _result(blank: Result, flops_per_image: int, size: int, outcomes: Mapping[str, Outcome[Turn]]) -> Result:
    if blank.error is not None:
        return blank
    if (error := outcomes[_name(blank)].error) is not None:
        return dataclasses.replace(blank, error=error)
    seconds = [turn.seconds for turn in outcomes[_name(blank)].turns]
    rates = [blank.batch_size / each for each in seconds]
    of_matrix = [2 * size**3 / turn.seconds for turn in outcomes[_product(blank.precision)].turns]
    return dataclasses.replace(
        blank,
        images_per_second=summarize(rates),
        step_seconds=summarize(seconds),
        flops_per_second=summarize([flops_per_image * rate for rate in rates]),
        matrix_percent=summarize([100 * flops_per_image * rate / peak for rate, peak in zip(rates, of_matrix, strict=True)]),
    )
