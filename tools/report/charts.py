"""Draws the charts: one panel per quantity, one color per run."""

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
# Okabe and Ito's palette for color-blind readers, without yellow, which is hard to see on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
FONT = "DejaVu Sans"  # part of matplotlib
STYLE: dict[Any, Any] = {
    "font.family": [FONT],
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
    "svg.hashsalt": "report",  # makes the SVG a function of its input
}
MAX_POINTS = 1000  # a panel has fewer pixels
MEANS, MEANS_OF_MANY = 300, 100  # points of a curve drawn as means, for few and for many runs
FEW_RUNS = 3  # the bands of more runs would cover each other
MAX_MARKERS = 30  # longer curves have no markers
MAX_NAME = 40  # characters
LOG_RATIO = 20.0  # the axis is logarithmic if the largest value exceeds the smallest by more than this factor


class Panel(NamedTuple):
    """A chart of one quantity; by default, of a noisy one.

    Attributes:
        title: Title.
        unit: Label of the vertical axis.
        split: Split of the metrics.
        names: Metrics to plot: the first as a solid line, the second dashed.
        labels: Their labels, if there are two.
        is_smooth: The quantity has no noise to average.
        is_counter: The quantity changes rarely. The panel is left out if it never changes.
        may_be_log: The axis is logarithmic if the values span a wide range.
        top: Smallest upper limit of an axis that starts at 0; None to fit the axis to the values.
    """

    title: str
    unit: str
    split: Split
    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    is_smooth: bool = False
    is_counter: bool = False
    may_be_log: bool = False
    top: float | None = None


def _loss(title: str, name: str, split: Split = "train") -> Panel:
    return Panel(title, "cross-entropy, nats", split, (name,), may_be_log=True)


def _accuracy(title: str, name: str) -> Panel:
    labels = ("averaged weights (EMA)", "raw weights")
    return Panel(title, "% of validation images", "valid", (f"ema_{name}", name), labels)


PANELS = (
    _loss("Training loss, all heads", "loss"),
    _loss("Validation loss", "loss", "valid"),
    Panel("Learning rate", "learning rate", "train", ("lr",), is_smooth=True, top=0),
    _loss("Training loss, main head", "main_loss"),
    _loss("Training loss, auxiliary head 2", "aux2_loss"),
    _loss("Training loss, auxiliary head 1", "aux1_loss"),
    _accuracy("Top-1 accuracy", "top1"),
    _accuracy("Top-5 accuracy", "top5"),
    _accuracy("Mean recall of the classes", "mean_recall")._replace(unit="mean of the classes, %"),
    Panel("Gradient norm", "L2 norm", "train", ("gradient_norm",), may_be_log=True),
    Panel("Throughput", "images/s", "train", ("images_per_second",), top=0),
    Panel("Data wait", "% of the time", "train", ("data_wait_percent",), top=5),
    Panel("GPU memory", "GB", "train", ("gpu_memory_gigabytes",), is_smooth=True, top=0),
    Panel("Loss scale", "factor", "train", ("scale",), is_counter=True, may_be_log=True),
    Panel("Skipped steps", "steps so far", "train", ("skipped_steps",), is_counter=True, top=1),
    Panel("Bad samples", "samples left out", "train", ("bad_samples",), is_counter=True, top=1),
)


def colors(count: int) -> list[str]:
    """Returns a distinct color for each of `count` runs, as `#rrggbb`."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    return [to_hex(color) for color in mpl.colormaps["viridis"](np.linspace(0, 0.93, count))]


def _panels(runs: Sequence[Run]) -> list[Panel]:
    """Selects the panels for which the runs have values.

    Raises:
        ValueError: There are none.
    """

    def is_shown(panel: Panel) -> bool:
        values = [run.series[panel.split, name].values for run in runs for name in panel.names]
        return any(len(np.unique(each)) > 1 if panel.is_counter else len(each) for each in values)

    shown = [panel for panel in PANELS if is_shown(panel)]
    if not shown:
        paths = ", ".join(str(run.path) for run in runs)
        raise ValueError(f"{paths}: no line of metrics.jsonl has a number that can be plotted")
    return shown


def draw_svgs(runs: Sequence[Run]) -> Iterator[tuple[str, bytes]]:
    """Draws each panel; yields its title and SVG."""
    with mpl.rc_context(STYLE):
        for panel in _panels(runs):
            figure = Figure(figsize=(PANEL_WIDTH, PANEL_HEIGHT), layout="constrained")
            _draw(figure.add_subplot(), panel, runs)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            yield panel.title, buffer.getvalue()


def draw_png(runs: Sequence[Run]) -> bytes:
    """Draws all panels below a legend of the runs; returns the PNG."""
    shown = _panels(runs)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    with mpl.rc_context(STYLE):
        legend_columns = 2 if len(runs) > FEW_RUNS and columns > 1 else 1
        size = (columns * PANEL_WIDTH, rows * PANEL_HEIGHT + -(-len(runs) // legend_columns) * LEGEND_LINE)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1), dpi=DOTS_PER_INCH)
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        for place in places[len(shown) :]:
            place.set_axis_off()
        for place, panel in zip(places, shown, strict=False):
            _draw(place, panel, runs)
        handles = [Line2D([], [], color=color, linewidth=2.5) for color in colors(len(runs))]
        names = [_caption(run) for run in runs]
        legend = figure.legend(handles, names, loc="outside upper left", fontsize=10, ncols=legend_columns)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a folder's name may contain dollar signs
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


def _caption(run: Run) -> str:
    """Formats a run's name, limited to the font's characters, with its progress and scores."""
    known = get_font(findfont(FONT)).get_charmap()
    name = "".join(letter if ord(letter) in known else "?" for letter in run.name)
    name = name if len(name) <= MAX_NAME else f"...{name[3 - MAX_NAME :]}"
    scores = {"top-1": run.last("valid", "top1"), "EMA": run.last("valid", "ema_top1")}
    shown = [f"{label} {score:.2f} %" for label, score in scores.items() if score is not None]
    return "   ".join([name, f"epoch {run.epoch} of {run.epochs}, step {run.step:,}", *shown])


def _draw(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    curves = [
        (run.series[panel.split, name], color, style)
        for run, color in zip(runs, colors(len(runs)), strict=True)
        for name, style in zip(panel.names, ("-", "--"), strict=False)
    ]
    for series, color, style in curves:
        _draw_curve(axes, panel, series, color, style, len(runs))
    axes.set(title=panel.title, xlabel="step", ylabel=panel.unit, xlim=(0, 1.02 * max(1, *(run.step for run in runs))))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _scale(axes, panel, np.concatenate([series.values for series, _, _ in curves]))
    if panel.labels:
        styles = [Line2D([], [], color="#555555", linestyle=style) for style in ("-", "--")]
        axes.legend(styles, panel.labels, loc="lower right", fontsize=8)


def _scale(axes: Axes, panel: Panel, values: Floats) -> None:
    if panel.may_be_log and values.min() > 0 and values.max() > LOG_RATIO * values.min():
        axes.set_yscale("log")
        axes.set_ylabel(f"{panel.unit} (log scale)")
        is_wide = values.max() > 1000 * values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        return
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=panel.is_counter))
    if values.max() >= 1000:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if panel.top is not None:
        axes.set_ylim(0, max(panel.top, 1.05 * values.max()) or 1)


def _draw_curve(axes: Axes, panel: Panel, series: Series, color: str, style: str, num_runs: int) -> None:
    """Draws a line. A long noisy curve becomes the means of equal intervals, on a band from their minima to their maxima."""
    steps, values = series.steps, series.values
    means = MEANS if num_runs <= FEW_RUNS else MEANS_OF_MANY
    if panel.is_smooth or panel.is_counter:
        kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_POINTS)).round().astype(int))
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
        style,
        color=color,
        linewidth=1.3,
        marker="." if len(values) <= MAX_MARKERS else "",
        markersize=9 if len(values) == 1 else 4,
        drawstyle="steps-post" if panel.is_counter else "default",
    )
