"""Competitors taking turns, and what can be said of the figures of a few rounds."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tqdm import tqdm

Turn = TypeVar("Turn")

CONFIDENCE = 0.95


class TurnError(Exception):
    """A competitor failed; the message is for the reader of the results."""


@dataclass(frozen=True)
class Outcome(Generic[Turn]):
    """The turns of a competitor, one a round; after an error it took no more."""

    turns: tuple[Turn, ...]
    error: str | None = None


@dataclass(frozen=True)
class Statistic:
    """Figures of several rounds.

    Attributes:
        rounds: The figure of each round.
        median: Of the rounds.
        low: Lower end of the interval for the median.
        high: Upper end.
        coverage: Probability with which such an interval holds the true median.
    """

    rounds: tuple[float, ...]
    median: float
    low: float
    high: float
    coverage: float


def summarize(figures: Sequence[float]) -> Statistic:
    """The median, with an interval between two order statistics, which assumes nothing about how the figures are distributed.

    The interval is the narrowest symmetric one that covers the median with 95 % probability. Fewer than six rounds cannot reach
    that: theirs goes from the smallest to the largest, and `coverage` says what it is worth, 93.75 % with five.
    """
    ordered = sorted(figures)
    depth = max((k for k in range(len(ordered) // 2) if _coverage(len(ordered), k) >= CONFIDENCE), default=0)
    return Statistic(
        tuple(figures),
        statistics.median(ordered),
        ordered[depth],
        ordered[-1 - depth],
        _coverage(len(ordered), depth),
    )


def _coverage(count: int, depth: int) -> float:
    """How probable it is that of `count` figures more than `depth` lie on either side of the true median."""
    return 1 - 2 * sum(math.comb(count, k) for k in range(depth + 1)) / 2**count


def take_turns(
    competitors: Mapping[str, Callable[[], Turn]], rounds: int, seconds: float = math.inf
) -> dict[str, Outcome[Turn]]:
    """Calls every competitor once a round, each round beginning with another one; no round begins after so many seconds.

    So a machine that gets slower, or whatever one competitor leaves behind for the next, does not always hit the same ones. A
    competitor that raises `TurnError` is out of the later rounds.
    """
    names, turns, errors = list(competitors), {name: list[Turn]() for name in competitors}, dict[str, str]()
    end = time.monotonic() + seconds
    with tqdm(total=rounds * len(names), unit="turn", disable=None) as progress:  # None: only where there is a terminal
        for number in range(rounds):
            if number and time.monotonic() >= end:
                break
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
