"""The report of every measurement: tables as text, as JSON, and as a chart."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.throughput.hardware import Hardware, describe_hardware
from tools.throughput.rounds import Outcome, Statistic

Figure = Statistic | float | None


@dataclass(frozen=True)
class Column:
    """One figure of each row."""

    key: str  # of the figure in the turns and in the JSON file
    title: str
    form: str = ",.0f"  # format of a number in the table
    scale: float = 1  # factor that turns the figure into the unit of the table
    interval: bool = False  # print the interval of the median, too
    of: str = ""  # the figure is the ratio of this figure to the baseline's in the same round
    largest: bool = False  # the figure is the largest of the rounds

    def figure(self, outcome: Outcome, baseline: Outcome | None) -> Figure:
        if self.of:
            return outcome.ratio(self.of, baseline)
        return outcome.largest(self.key) if self.largest else outcome.summary(self.key)

    def cell(self, figure: Figure) -> str:
        if figure is None:
            return "-"
        if not isinstance(figure, Statistic):
            return f"{self.scale * figure:{self.form}}"
        median, low, high = (f"{self.scale * each:{self.form}}" for each in (figure.median, figure.low, figure.high))
        return f"{median} ({low}-{high})" if self.interval else median


RATE = Column("images_per_second", "images/s")
RATIO = Column("ratio", "ratio", ".2f", interval=True, of="images_per_second")
MEMORY = Column("peak_memory_bytes", "memory MB", scale=1e-6, largest=True)
# What every process that measures a loader reports beside its rate; see `measure_loader` in turn.py.
LOADER_COSTS = (
    Column("cpu_milliseconds", "CPU ms", ",.2f"),
    Column("first_seconds", "first batch s", ",.1f"),
    MEMORY,
)


@dataclass(frozen=True)
class Row:
    """A competitor in a table."""

    what: str  # its name for people
    figures: Mapping[str, Figure] = field(default_factory=dict)  # by the keys of the columns
    error: str | None = None
    is_installed: bool = True
    labels: Mapping[str, Any] = field(default_factory=dict)  # more entries for the JSON file

    @classmethod
    def of(
        cls, what: str, outcome: Outcome | None, columns: Sequence[Column], baseline: Outcome | None = None, **labels: Any
    ) -> "Row":
        """Returns the row of a competitor, or of one that is not installed, without an outcome."""
        if outcome is None or outcome.error:
            return cls(what, error=outcome.error if outcome else None, is_installed=outcome is not None, labels=labels)
        return cls(what, {column.key: column.figure(outcome, baseline) for column in columns}, labels=labels)


@dataclass(frozen=True)
class Table:
    """Rows with the same columns. A chart shows the first column. A table without rows is not printed."""

    title: str
    columns: Sequence[Column]
    rows: list[Row]
    key: str = "results"  # in the JSON file; tables with the same key share a list

    def lines(self) -> list[str]:
        """Returns the text, with aligned columns."""
        cells = [[column.title for column in self.columns]]
        for row in self.rows:
            has_figures = row.is_installed and not row.error
            cells.append([column.cell(row.figures.get(column.key)) for column in self.columns] if has_figures else [])
        widths = [max(map(len, column)) for column in zip(*filter(None, cells), strict=True)]
        texts = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)) for row in cells]
        remarks = ["", *(f"failed: {row.error}" if row.error else "not installed" for row in self.rows)]
        names = [self.title, *(row.what for row in self.rows)]
        name_width = max(map(len, names))
        lines = zip(names, texts, remarks, strict=True)
        return [f"{name:<{name_width}}  {text or remark}".rstrip() for name, text, remark in lines]

    def entries(self) -> list[dict[str, Any]]:
        """Returns the rows for the JSON file."""
        empty = dict.fromkeys(column.key for column in self.columns)
        common = ("what", "error", "is_installed")
        return [{**row.labels, **{name: getattr(row, name) for name in common}, **empty, **row.figures} for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a measurement."""

    heading: str  # first line of the text; the hardware is added
    tables: Sequence[Table]
    settings: Mapping[str, Any]  # the options, and more entries for the JSON file
    notes: Sequence[str] = ()  # last lines of the text
    may_have_errors: bool = False  # a competitor's error is a result
    versions: Mapping[str, str]  # of Python and of the packages that matter
    hardware: Hardware = field(default_factory=describe_hardware)
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))

    @property
    def has_failed(self) -> bool:
        """Whether the command fails, because a competitor failed."""
        return not self.may_have_errors and any(row.error for table in self.tables for row in table.rows)

    def as_json(self) -> str:
        """Returns one JSON object: the settings, the rows of the tables, and the circumstances."""
        found = dict(self.settings)
        for table in self.tables:
            found[table.key] = found.get(table.key, []) + table.entries()
        found |= {"hardware": self.hardware, "versions": dict(self.versions), "date": self.date}
        return json.dumps(
            found, indent=2, default=lambda value: str(value) if isinstance(value, Path) else dataclasses.asdict(value)
        )

    def publish(self, json_path: Path | None = None, plot: Path | None = None) -> None:
        """Prints the tables, and writes the JSON file and the chart."""
        tables = [line for table in self.tables if table.rows for line in ("", *table.lines())]
        print(f"{self.heading}; {self.hardware}", *tables, *self.notes, sep="\n", flush=True)
        if json_path is not None:
            json_path.write_text(self.as_json() + "\n")
        if plot is not None:
            from tools.throughput.chart import draw

            draw(self, plot)
