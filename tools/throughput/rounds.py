"""Competitors that take turns, and the statistics of their rounds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

CONFIDENCE = 0.95

Turn = dict[str, float | None]  # the figures of one turn by name; `None` where a competitor has no such figure


class TurnError(Exception):
    """A competitor failed; the message is for the reader of the results."""


@dataclass(frozen=True)
class Statistic:
    """The figures of several rounds, and their median with its confidence interval."""

    rounds: tuple[float, ...]
    median: float
    low: float
    high: float
    coverage: float  # probability that such an interval contains the true median


def summarize(figures: Sequence[float]) -> Statistic:
    """Returns the median with an interval between two order statistics, which makes no assumption about the distribution.

    The interval is the narrowest symmetric one that covers the median with a probability of 95 %. Fewer than six rounds cannot
    reach that. Their interval goes from the smallest to the largest figure, with a `coverage` of 93.75 % for five rounds.
    """
    ordered = sorted(figures)
    depth = max((k for k in range(len(ordered) // 2) if _coverage(len(ordered), k) >= CONFIDENCE), default=0)
    low, high = ordered[depth], ordered[-1 - depth]
    return Statistic(tuple(figures), statistics.median(ordered), low, high, _coverage(len(ordered), depth))


def _coverage(count: int, depth: int) -> float:
    """Returns the probability that more than `depth` of `count` figures lie on either side of the true median."""
    return 1 - 2 * sum(math.comb(count, k) for k in range(depth + 1)) / 2**count


@dataclass(frozen=True)
class Outcome:
    """The turns of a competitor, one per round. After an error it takes no more turns."""

    turns: tuple[Turn, ...]
    error: str | None = None

    def rounds(self, name: str) -> list[float]:
        """Returns a figure of each round; empty if the competitor has no such figure."""
        return [figure for turn in self.turns if (figure := turn.get(name)) is not None]

    def summary(self, name: str) -> Statistic | None:
        """Returns the statistic of a figure; `None` if the competitor has no such figure."""
        figures = self.rounds(name)
        return summarize(figures) if figures else None

    def largest(self, name: str) -> int | None:
        """Returns the largest value of a figure; `None` if the competitor has no such figure."""
        figures = self.rounds(name)
        return int(max(figures)) if figures else None

    def ratio(self, name: str, baseline: "Outcome | None") -> Statistic | None:
        """Returns the statistic of a figure relative to the baseline's in the same round; `None` if the baseline failed."""
        if baseline is None or baseline.error is not None:
            return None
        return summarize([a / b for a, b in zip(self.rounds(name), baseline.rounds(name), strict=True)])


def take_turns(competitors: Mapping[str, Callable[[], Turn]], rounds: int) -> dict[str, Outcome]:
    """Calls every competitor once per round. A competitor that raises `TurnError` skips the later rounds.

    Each round starts with the next competitor. This spreads the effects of a machine that slows down, or of whatever one
    competitor leaves behind for the next.
    """
    names, turns, errors = list(competitors), {name: list[Turn]() for name in competitors}, dict[str, str]()
    with tqdm(total=rounds * len(names), unit="turn", disable=None) as progress:  # None: only on a terminal
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                progress.set_postfix_str(name)
                if name not in errors:
                    try:
                        turns[name].append(competitors[name]())
                    except TurnError as error:
                        errors[name] = str(error)
                progress.update()
    return {name: Outcome(tuple(turns[name]), errors.get(name)) for name in names}
