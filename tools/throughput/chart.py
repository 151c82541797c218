"""A measurement drawn: a bar for each of its medians, with the interval across its end; or lines, where it is of growth."""

import itertools
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tools.throughput.report import Bar, Curve, Report

WIDTH, BAR_HEIGHT, ROW_HEIGHT, MARGIN, FOOT = 9.0, 0.32, 2.0, 1.1, 0.2  # inches
COLOR, GRID, INK = "#3b75af", "#dddddd", "#333333"


def draw(report: Report, path: Path) -> None:
    """Writes it as a PNG; one without bars where everything failed."""
    curves = list(report.curves())
    figure = _draw_curves(curves) if curves else _draw_bars(report)
    FigureCanvasAgg(figure)
    figure.text(0.99, 0.005, f"{report.hardware}, {report.date[:10]}", ha="right", size=7, color=INK)
    figure.savefig(path, dpi=150)


def _draw_bars(report: Report) -> Figure:
    groups = [(name, list(bars)) for name, bars in itertools.groupby(report.bars(), key=lambda bar: bar.group)]
    heights = [len(bars) + 0.5 for _, bars in groups]
    figure = Figure(figsize=(WIDTH, BAR_HEIGHT * sum(heights) + MARGIN), layout="constrained")
    if not groups:
        return figure
    rows = figure.subplots(len(groups), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, bars) in zip(rows, groups, strict=True):
        _draw_group(axes, name, bars)
    rows[-1].set_xlabel(report.unit, color=INK)
    return figure


def _draw_curves(curves: list[Curve]) -> Figure:
    """A row for each axis, in which its curves stand side by side, each from zero on."""
    rows = [list(row) for _, row in itertools.groupby(curves, key=lambda curve: curve.axis)]
    height = ROW_HEIGHT * len(rows) + MARGIN / 2
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(rect=(0, FOOT / height, 1, 1 - FOOT / height)))
    panels = figure.subplots(len(rows), max(map(len, rows)), squeeze=False)
    for places, row in zip(panels, rows, strict=True):
        for axes, curve in zip(places, row, strict=True):
            _draw_curve(axes, curve)
    return figure


def _draw_curve(axes: Axes, curve: Curve) -> None:
    values, figures = [value for value, _ in curve.points], [each for _, each in curve.points]
    medians = [each.median for each in figures]
    spread = [[each.median - each.low for each in figures], [each.high - each.median for each in figures]]
    axes.errorbar(values, medians, yerr=spread, color=COLOR, ecolor=INK, capsize=2, marker="o", markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:,}" for value in values], size=7)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(0, 1.15 * max([each.high for each in figures], default=1))
    axes.set_xlabel(curve.axis, size=8, color=INK)
    axes.set_title(curve.name, loc="left", size=8, weight="bold")
    axes.grid(color=GRID)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_group(axes: Axes, name: str, bars: list[Bar]) -> None:
    figures = [bar.figures for bar in bars]
    medians = [each.median for each in figures]
    spread = [[each.median - each.low for each in figures], [each.high - each.median for each in figures]]
    drawn = axes.barh(range(len(bars)), medians, xerr=spread, color=COLOR, ecolor=INK, capsize=2, height=0.7)
    axes.bar_label(drawn, [_number(median) for median in medians], padding=4, size=8, color=INK)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], size=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_title(name, loc="left", size=10, weight="bold")
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _number(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"
