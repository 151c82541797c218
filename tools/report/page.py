"""Builds the report as a self-contained HTML page: tables, and charts as SVG."""

import base64
import html
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.printable import printable
from tools.report.charts import colors, draw_svgs
from tools.report.runs import Floats, Run, Split, differing_settings

NONE = "-"
MOST_CLASSES = 50  # in the table of recalls
CSS = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
       padding: 0 20px 40px; max-width: 1640px }
h1 { font-size: 22px } h2 { font-size: 17px; margin: 28px 0 8px }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: 4px 12px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap;
         font-variant-numeric: tabular-nums }
th { font-weight: 600; vertical-align: bottom }
thead th { white-space: normal } th[colspan] { text-align: center } th:first-child { text-align: left; white-space: nowrap }
.settings td { max-width: 340px; white-space: normal; overflow-wrap: anywhere }
.swatch { display: inline-block; width: 22px; height: 4px; margin-right: 8px; vertical-align: middle }
.legend { position: sticky; top: 0; background: #fff; padding: 6px 0; border-bottom: 1px solid #ddd }
.legend span.run { margin-right: 24px; white-space: nowrap }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 12px }
.charts img { width: 100% }
"""


@dataclass(frozen=True)
class Column:
    """A column of a table of runs. It is left out if it is empty for all runs."""

    title: str
    cell: Callable[[Run], str]
    group: str = ""


def page(runs: Sequence[Run]) -> bytes:
    """Builds the page, encoded in ASCII."""
    names = ", ".join(run.name for run in runs)
    settings = list(dict.fromkeys(name for run in runs for name in run.settings))
    legend = "".join(f'<span class="run">{_label(run, color)}</span>' for run, color in _colored(runs))
    parts = [
        f"<h1>{_text(names if len(runs) == 1 else f'{len(runs)} runs')}</h1>",
        "<h2>Results</h2>",
        _table_of_runs("results", RESULTS, runs),
        "<h2>Last state</h2>",
        _table_of_runs("state", STATE, runs),
        f"<h2>Charts</h2><div class=legend>{legend}</div>",
        f"<div class=charts>{''.join(_chart(title, svg) for title, svg in draw_svgs(runs))}</div>",
        "<p>Long curves show means over equal intervals. With up to 3 runs, a pale band shows the range of the values.</p>",
        *_recall_of_classes(runs),
    ]
    if len(runs) > 1:
        differing = differing_settings(runs)
        parts.append("<h2>Settings in which the runs differ</h2>")
        parts.append(_table_of_settings("differing", differing, runs) if differing else "<p>None.</p>")
    parts.append(f"<details><summary>All settings</summary>{_table_of_settings('settings', settings, runs)}</details>")
    title = _text(f"Report: {names}")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{CSS}</style>'
    )
    text = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"
    return text.encode("ascii", "xmlcharrefreplace")


def _last(split: Split, name: str, form: str) -> Callable[[Run], str]:
    return lambda run: NONE if (value := run.last(split, name)) is None else format(value, form)


def _best(name: str, form: str, where: Callable[[Floats], np.intp]) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        series = run.series["valid", name]
        if not len(series.values):
            return NONE
        best = where(series.values)
        return f"{series.values[best]:{form}} (epoch {series.epochs[best]})"

    return cell


def _score(group: str, name: str, form: str = ".2f", where: Callable[[Floats], np.intp] = np.argmax) -> tuple[Column, Column]:
    return Column("final", _last("valid", name, form), group), Column("best", _best(name, form, where), group)


def _median(name: str) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        values = run.series["train", name].values
        return f"{np.median(values):,.1f}" if len(values) else NONE

    return cell


RESULTS = (
    *_score("top-1, EMA (%)", "ema_top1"),
    *_score("top-1, raw (%)", "top1"),
    *_score("top-5, EMA (%)", "ema_top5"),
    *_score("top-5, raw (%)", "top5"),
    *_score("mean recall, EMA (%)", "ema_mean_recall"),
    *_score("mean recall, raw (%)", "mean_recall"),
    *_score("validation loss (nats)", "loss", ".4f", np.argmin),
    Column("images/s", _median("images_per_second"), "median"),
    Column("data wait (%)", _median("data_wait_percent"), "median"),
)
STATE = (
    Column("state", lambda run: "finished" if run.is_finished else "not finished"),
    Column("epoch", lambda run: f"{run.epoch} of {run.epochs}"),
    Column("step", lambda run: f"{run.step:,}"),
    Column("training loss", _last("train", "loss", ".4f")),
    Column("learning rate", _last("train", "lr", ".4g")),
    Column("gradient norm", _last("train", "gradient_norm", ".4g")),
    Column("images/s", _last("train", "images_per_second", ",.1f")),
    Column("data wait (%)", _last("train", "data_wait_percent", ".1f")),
    Column("GPU memory (GB)", _last("train", "gpu_memory_gigabytes", ".2f")),
    Column("loss scale", _last("train", "scale", "g")),
    Column("skipped steps", _last("train", "skipped_steps", ",.0f")),
    Column("bad samples", _last("train", "bad_samples", ",.0f")),
    Column("last line written", lambda run: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.written))),
    Column("folder", lambda run: str(run.path)),
)


def _table_of_runs(kind: str, columns: Sequence[Column], runs: Sequence[Run]) -> str:
    """Builds a table with one row per run."""
    shown = [column for column in columns if any(column.cell(run) != NONE for run in runs)]
    groups = [column.group for column in shown]
    heads = ["<th>run</th>" + "".join(f"<th>{_text(column.title)}</th>" for column in shown)]
    if any(groups):
        spans = ((group, groups.count(group)) for group in dict.fromkeys(groups))
        heads.insert(0, "<th></th>" + "".join(f"<th colspan={span}>{_text(group)}</th>" for group, span in spans))
    rows = [
        f"<th>{_label(run, color)}</th>" + "".join(f"<td>{_text(column.cell(run))}</td>" for column in shown)
        for run, color in _colored(runs)
    ]
    return _table(kind, heads, rows)


def _recall_of_classes(runs: Sequence[Run]) -> list[str]:
    """Builds a heading and a table with one row per class, the worst first, and two columns per run."""
    shown = [(run, color, run.recall) for run, color in _colored(runs) if run.recall]
    if not shown:
        return []
    worst: dict[str, float] = {}
    for _, _, (last, _) in shown:
        for name, value in last.of_classes.items():
            worst[name] = min(value, worst.get(name, value))
    names = sorted(worst, key=worst.__getitem__)[:MOST_CLASSES]
    which = f"The table has the {len(names)} of {len(worst):,} classes with the lowest." if len(names) < len(worst) else ""
    heads = [
        "<th></th>" + "".join(f"<th colspan=2>{_label(run, color)}</th>" for run, color, _ in shown),
        "<th>class</th>"
        + "".join(f"<th>final (epoch {last.epoch})</th><th>best.pt (epoch {best.epoch})</th>" for *_, (last, best) in shown),
    ]
    rows = []
    for name in names:
        values = [recall.of_classes.get(name) for *_, pair in shown for recall in pair]
        cells = (NONE if value is None else f"{value:.2f}" for value in values)
        rows.append(f"<th>{_text(name)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells))
    about = f"<p>Recall is the percentage of a class's validation images that the averaged weights recognize. {which}</p>"
    return ["<h2>Recall of the classes</h2>", about, _table("recall", heads, rows)]


def _table_of_settings(kind: str, names: Sequence[str], runs: Sequence[Run]) -> str:
    """Builds a table with one row per setting and one column per run."""
    head = "<th>setting</th>" + "".join(f"<th>{_label(run, color)}</th>" for run, color in _colored(runs))
    rows = [
        f"<th>{_text(name)}</th>" + "".join(f"<td>{_text(run.settings.get(name, NONE))}</td>" for run in runs) for name in names
    ]
    return _table(kind, [head], rows, "settings")


def _table(kind: str, heads: Sequence[str], rows: Sequence[str], style: str = "") -> str:
    head, body = ("".join(f"<tr>{row}</tr>\n" for row in part) for part in (heads, rows))
    return f'<div class=wide><table id="{kind}" class="{style}"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _chart(title: str, svg: bytes) -> str:
    # Each SVG is a separate image, because matplotlib uses the same element IDs in all of them.
    return f'<img alt="{_text(title)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def _colored(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return list(zip(runs, colors(len(runs)), strict=True))


def _label(run: Run, color: str) -> str:
    return f'<i class=swatch style="background:{color}"></i>{_text(run.name)}'


def _text(text: str) -> str:
    """Escapes text for HTML. Bytes of file names that are not text become question marks."""
    return html.escape(printable(text.encode(errors="replace").decode()))
