"""The charts: one panel a quantity, one colour a run."""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from tools.report.runs import Floats, Run, Series, Split

PANEL_WIDTH, PANEL_HEIGHT = 5.2, 3.3  # inches
COLUMNS = 3
LEGEND_LINE = 0.28  # inches
DOTS_PER_INCH = 100
# Okabe and Ito's colours, which colour-blind people tell apart too; without the yellow, which is hard to see on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # matplotlib brings it along
    "font.size": 9.0,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": "#e2e2e2",
    "legend.frameon": False,
    "svg.hashsalt": "report",  # the same input gives the same bytes
}
PANEL_POINTS = 1000  # more of them than a panel has pixels
MEANS, MEANS_OF_MANY = 300, 100  # points left of a curve that is drawn as means
FEW_RUNS = 3  # with more of them bands cover each other, and noise covers everything
MOST_MARKED = 30  # points of a curve that get a dot each
LONGEST_NAME = 40  # letters
LOG_FROM = 20.0  # times the smallest value, from which on the small ones would not be seen


@dataclass(frozen=True)
class Curve:
    """A metric in a panel, for each run."""

    split: Split
    name: str
    label: str = ""
    dashes: Literal["-", "--"] = "-"


@dataclass(frozen=True)
class Panel:
    """A chart; without more words, of a quantity that is noisy."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    is_smooth: bool = False
    is_counter: bool = False  # stays as it is for long, mostly for the whole of a run; then it is not drawn
    may_be_log: bool = False
    top: float | None = None  # from 0 to here, or farther if need be


def _loss(title: str, name: str) -> Panel:
    return Panel(title, "cross-entropy, nats", (Curve("train", name),), may_be_log=True)


def _accuracy(title: str, name: str) -> Panel:
    curves = (Curve("valid", f"ema_{name}", "averaged weights (EMA)"), Curve("valid", name, "raw weights", "--"))
    return Panel(title, "% of validation images", curves)


def _counter(title: str, unit: str, name: str) -> Panel:
    return Panel(title, unit, (Curve("train", name),), is_counter=True, top=1)


PANELS = (
    _loss("Training loss, all heads", "loss"),
    Panel("Validation loss", "cross-entropy, nats", (Curve("valid", "loss"),), may_be_log=True),
    Panel("Learning rate", "learning rate", (Curve("train", "lr"),), is_smooth=True, top=0),
    _loss("Training loss, main head", "main_loss"),
    _loss("Training loss, auxiliary head 2", "aux2_loss"),
    _loss("Training loss, auxiliary head 1", "aux1_loss"),
    _accuracy("Top-1 accuracy", "top1"),
    _accuracy("Top-5 accuracy", "top5"),
    Panel("Gradient norm", "L2 norm", (Curve("train", "gradient_norm"),), may_be_log=True),
    Panel("Throughput", "images/s", (Curve("train", "images_per_second"),), top=0),
    Panel("Data wait", "% of the time", (Curve("train", "data_wait_percent"),), top=5),
    Panel("GPU memory", "GB", (Curve("train", "gpu_memory_gigabytes"),), is_smooth=True, top=0),
    Panel("Loss scale", "factor", (Curve("train", "scale"),), is_counter=True, may_be_log=True),
    _counter("Skipped steps", "steps so far", "skipped_steps"),
    _counter("Bad samples", "samples left out", "bad_samples"),
)


def colors(count: int) -> list[str]:
    """A colour for each of so many runs, as `#rrggbb`."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    return [to_hex(color) for color in mpl.colormaps["viridis"](np.linspace(0, 0.93, count))]


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Those for which the runs have something to draw.

    Raises:
        ValueError: There is none.
    """

    def is_shown(panel: Panel) -> bool:
        values = _values(panel, runs)
        return bool(len(values)) and not (panel.is_counter and all(_is_constant(run, panel.curves[0]) for run in runs))

    shown = [panel for panel in PANELS if is_shown(panel)]
    if not shown:
        raise ValueError(f"{runs[0].path}: no line of metrics.jsonl has a number that could be drawn")
    return shown


def charts(runs: Sequence[Run]) -> Iterator[tuple[str, bytes]]:
    """Title and SVG of each panel."""
    with mpl.rc_context(STYLE):
        for panel in panels(runs):
            figure = Figure(figsize=(PANEL_WIDTH, PANEL_HEIGHT), layout="constrained")
            _draw(figure.add_subplot(), panel, runs)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            yield panel.title, buffer.getvalue()


def write_picture(runs: Sequence[Run], output: Path) -> None:
    """All panels below a legend of the runs, as a PNG that appears whole or not at all."""
    shown = panels(runs)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    with mpl.rc_context(STYLE):
        legend_columns = 2 if len(runs) > FEW_RUNS and columns > 1 else 1
        size = (columns * PANEL_WIDTH, rows * PANEL_HEIGHT + -(-len(runs) // legend_columns) * LEGEND_LINE)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1), dpi=DOTS_PER_INCH)
        places = figure.subplots(rows, columns, squeeze=False).flat
        for place in list(places)[len(shown) :]:
            place.set_axis_off()
        for place, panel in zip(figure.axes, shown, strict=False):
            _draw(place, panel, runs)
        handles = [Line2D([], [], color=color, linewidth=2.5) for color in colors(len(runs))]
        names = [_caption(run) for run in runs]
        legend = figure.legend(handles, names, loc="outside upper left", fontsize=10, ncols=legend_columns)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a folder may be called a$b$c
        temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        try:
            figure.savefig(temporary, format="png")
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)


def _caption(run: Run) -> str:
    """A run's name in letters that the font has, and how far it has come."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    name = "".join(letter if ord(letter) in known else "?" for letter in run.name)
    name = name if len(name) <= LONGEST_NAME else f"...{name[3 - LONGEST_NAME :]}"
    scores = {"top-1": run.last("valid", "top1"), "EMA": run.last("valid", "ema_top1")}
    shown = [f"{label} {score:.2f} %" for label, score in scores.items() if score is not None]
    return "   ".join([name, f"epoch {run.epoch} of {run.epochs}, step {run.step:,}", *shown])


def _values(panel: Panel, runs: Sequence[Run]) -> Floats:
    return np.concatenate([run.series[curve.split, curve.name].values for run in runs for curve in panel.curves])


def _is_constant(run: Run, curve: Curve) -> bool:
    values = run.series[curve.split, curve.name].values
    return not len(values) or bool((values == values[0]).all())


def _draw(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    for run, color in zip(runs, colors(len(runs)), strict=True):
        for curve in panel.curves:
            _draw_curve(axes, panel, run.series[curve.split, curve.name], color, curve.dashes, len(runs))
    values = _values(panel, runs)
    axes.set(title=panel.title, xlabel="step", ylabel=panel.unit, xlim=(0, 1.02 * max(1, *(run.step for run in runs))))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if panel.may_be_log and values.min() > 0 and values.max() > LOG_FROM * values.min():
        axes.set_yscale("log")
        axes.set_ylabel(f"{panel.unit} (log scale)")
        is_wide = values.max() > 1000 * values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=panel.is_counter))
        if values.max() >= 1000:
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if panel.top is not None:
            axes.set_ylim(0, max(panel.top, 1.05 * values.max()) or 1)
    if len(panel.curves) > 1:
        styles = [Line2D([], [], color="#555555", linestyle=curve.dashes) for curve in panel.curves]
        axes.legend(styles, [curve.label for curve in panel.curves], loc="lower right", fontsize=8)


def _draw_curve(axes: Axes, panel: Panel, series: Series, color: str, dashes: Literal["-", "--"], num_runs: int) -> None:
    """A line; of a noisy quantity with many points the means of equal stretches, on a band from the least to the greatest."""
    steps, values = series.steps, series.values
    means = MEANS if num_runs <= FEW_RUNS else MEANS_OF_MANY
    if panel.is_smooth or panel.is_counter:
        kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), PANEL_POINTS)).round().astype(int))
        steps, values = steps[kept], values[kept]
    elif len(values) > 2 * means:
        starts = np.linspace(0, len(values), means + 1).astype(int)[:-1]
        counts = np.diff(starts, append=len(values))
        if num_runs <= FEW_RUNS:
            low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
            axes.fill_between(steps[starts + counts // 2], low, high, color=color, alpha=0.15, linewidth=0)
        steps, values = (np.add.reduceat(numbers, starts) / counts for numbers in (steps, values))
    axes.plot(
        steps,
        values,
        dashes,
        color=color,
        linewidth=1.3,
        marker="." if len(values) <= MOST_MARKED else "",
        markersize=9 if len(values) == 1 else 4,
        drawstyle="steps-post" if panel.is_counter else "default",
    )
