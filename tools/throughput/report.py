"""What all measurements have in common: what is written down beside the figures, and what of them is drawn."""

import abc
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from tools.throughput.hardware import Hardware, describe_hardware, now
from tools.throughput.rounds import Statistic


@dataclass(frozen=True)
class Bar:
    """A bar of a chart.

    Attributes:
        group: Bars of the same group stand together, under its name.
        name: Of the bar.
        figures: Its length is their median; the interval is drawn across its end.
    """

    group: str
    name: str
    figures: Statistic


@dataclass(frozen=True)
class Curve:
    """A line of a chart, over a logarithmic axis.

    Attributes:
        axis: What grows along it; curves of one axis stand side by side.
        name: Of what is drawn, with its unit.
        points: Values on the axis, and the figures there.
    """

    axis: str
    name: str
    points: list[tuple[int, Statistic]]


@dataclass(frozen=True, kw_only=True)
class Report(abc.ABC):
    """What a measurement found out; `str()` of it is a table.

    Attributes:
        hardware: What it ran on.
        versions: Of Python and of the packages that matter.
        date: When it ended, UTC.
        unit: Of the bars' figures.
    """

    unit: ClassVar[str] = "images/s"

    hardware: Hardware = field(default_factory=describe_hardware)
    versions: dict[str, str]
    date: str = field(default_factory=now)

    @abc.abstractmethod
    def bars(self) -> Iterable[Bar]:
        """What a chart shows, from top to bottom."""

    def curves(self) -> Iterable[Curve]:
        """What a chart shows instead, where growth is what matters."""
        return ()

    def as_json(self) -> str:
        """One JSON object with the attributes as keys."""
        return json.dumps(dataclasses.asdict(self), indent=2)
