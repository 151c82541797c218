"""A chart of a report: a bar for each median, with its interval."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tools.throughput.report import Report, Table
from tools.throughput.rounds import Statistic

WIDTH, BAR_HEIGHT, MARGIN = 9.0, 0.32, 1.1  # inches
COLOR, GRID, INK = "#3b75af", "#dddddd", "#333333"


def draw(report: Report, path: Path) -> None:
    """Writes a PNG with the first column of each table. It has no bars if everything failed."""
    groups = list[tuple[Table, dict[str, Statistic]]]()
    for table in report.tables:
        rates = [(row.what, row.figures.get(table.columns[0].key)) for row in table.rows]
        if bars := {what: rate for what, rate in rates if isinstance(rate, Statistic)}:
            groups.append((table, bars))
    heights = [len(bars) + 0.5 for _, bars in groups]
    figure = Figure(figsize=(WIDTH, BAR_HEIGHT * sum(heights) + MARGIN), layout="constrained")
    FigureCanvasAgg(figure)
    if groups:
        rows = figure.subplots(len(groups), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (table, bars) in zip(rows, groups, strict=True):
            _draw_bars(axes, table.title, bars)
        rows[-1].set_xlabel(groups[-1][0].columns[0].title, color=INK)
    figure.text(0.99, 0.005, f"{report.hardware}, {report.date[:10]}", ha="right", size=7, color=INK)
    figure.savefig(path, dpi=150)


def _draw_bars(axes: Axes, title: str, bars: dict[str, Statistic]) -> None:
    medians = [each.median for each in bars.values()]
    spread = [[each.median - each.low for each in bars.values()], [each.high - each.median for each in bars.values()]]
    drawn = axes.barh(range(len(bars)), medians, xerr=spread, color=COLOR, ecolor=INK, capsize=2, height=0.7)
    axes.bar_label(drawn, [_number(median) for median in medians], padding=4, size=8, color=INK)
    axes.set_yticks(range(len(bars)), list(bars), size=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_title(title, loc="left", size=10, weight="bold")
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _number(value: float) -> str:
    """Formats a number with at least three digits."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"
