"""Which settings are the fastest, and whether they are faster than the defaults: noisy turns, and little time for them.

Two questions, which the same figures must not answer. The search may err: it takes one setting after another, keeps the best
of those before, and halves the field of the setting's values again and again, each field getting the same time, so that the
few that are left are measured the most. That is sequential halving ("Almost Optimal Exploration in Multi-Armed Bandits",
Karnin, Koren and Somekh, ICML 2013; for settings arXiv 1502.07943), with medians of ratios in place of means, as other programs
disturb some turns. What comes out of it owes something to luck, so it meets the defaults once more, in rounds of their own
(`duel`).

The defaults take a turn in each round of both, and all rates are compared with theirs of the same round.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from tools.throughput.rounds import CONFIDENCE, Statistic, summarize, take_turns

# The settings that are not the defaults', each with its value.
Choice = tuple[tuple[str, float], ...]
Take = Callable[[Choice], float]

DEFAULTS: Choice = ()
LEAST_GAIN = 1.02  # what is worth leaving the defaults, and with them what everybody else has
MOST_ROUNDS = 12  # of a field: more than that tells no more than the next, smaller one


@dataclass
class Tried:
    """The turns of a choice, in images/s, and as parts of the defaults' in the same rounds; after an error it took no more."""

    rates: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Duel:
    """The defaults and the best found, in images/s, and their ratio in the same rounds."""

    before: Statistic
    after: Statistic
    ratio: Statistic

    @property
    def is_won(self) -> bool:
        """Whether all of the ratio's interval lies above 1, one that was had in rounds enough for it."""
        return self.ratio.low > 1 and self.ratio.coverage >= CONFIDENCE


def describe(choice: Choice) -> str:
    """What of it is not the defaults'."""
    return ", ".join(f"{name} {value:g}" for name, value in choice) or "the defaults"


def search(take: Take, axes: Mapping[str, Sequence[float]], seconds: float) -> tuple[Choice, dict[Choice, Tried]]:
    """Looks for the fastest choice.

    Args:
        take: Takes a turn with a choice; images/s. Raises `TurnError` where there is none to be had.
        axes: Values beside the default of each setting, in the order in which they are searched.
        seconds: For all of it. A round that has begun is ended; what there is no time for is not tried.

    Returns:
        The best, which is `DEFAULTS` where no ratio's median comes to `LEAST_GAIN`; and all that were tried, the defaults
        first.

    Raises:
        ValueError: The defaults fail.
    """
    tried, best = {DEFAULTS: Tried()}, DEFAULTS
    end = time.monotonic() + seconds
    for left, (name, values) in zip(itertools.count(len(axes), -1), axes.items(), strict=False):
        if time.monotonic() >= end:
            break
        choices = [choice for choice in (best, *((*best, (name, value)) for value in values)) if choice != DEFAULTS]
        found = _halve(take, choices, (end - time.monotonic()) / left, tried)
        best = max((DEFAULTS, *found), key=lambda choice: found.get(choice, LEAST_GAIN))
    return best, tried


def _halve(take: Take, choices: Sequence[Choice], seconds: float, tried: dict[Choice, Tried]) -> dict[Choice, float]:
    """The last one of the field, with the median of its ratios here; none where all of them failed."""
    end, ratios = time.monotonic() + seconds, {choice: list[float]() for choice in choices}
    for stage in range(stages := max(1, math.ceil(math.log2(max(1, len(choices)))))):
        if stage and time.monotonic() >= end:
            break
        _compare(take, list(ratios), (end - time.monotonic()) / (stages - stage), tried, ratios)
        good = [choice for choice in ratios if tried[choice].error is None]
        good.sort(key=lambda choice: median(ratios[choice]), reverse=True)
        ratios = {choice: ratios[choice] for choice in good[: math.ceil(len(ratios) / 2)]}
    return {choice: median(figures) for choice, figures in itertools.islice(ratios.items(), 1)}


def _compare(
    take: Take, choices: Sequence[Choice], seconds: float, tried: dict[Choice, Tried], ratios: Mapping[Choice, list[float]]
) -> None:
    """Rounds of the field and the defaults, as many as there is time for; adds what comes of them."""
    if not choices:
        return
    rates = _rounds(take, [DEFAULTS, *choices], MOST_ROUNDS, seconds, tried)
    for choice in choices:
        found = [rate / other for rate, other in zip(rates[choice], rates[DEFAULTS], strict=False)]
        tried[choice].ratios += found
        ratios[choice].extend(found)
    tried[DEFAULTS].ratios += [1.0] * len(rates[DEFAULTS])


def _rounds(
    take: Take, choices: Sequence[Choice], rounds: int, seconds: float, tried: dict[Choice, Tried]
) -> dict[Choice, Sequence[float]]:
    outcomes = take_turns({describe(choice): functools.partial(take, choice) for choice in choices}, rounds, seconds)
    for choice in choices:
        of_choice, outcome = tried.setdefault(choice, Tried()), outcomes[describe(choice)]
        of_choice.rates += outcome.turns
        of_choice.error = outcome.error
    if (error := tried[DEFAULTS].error) is not None:
        raise ValueError(f"the defaults cannot be measured: {error}")
    return {choice: outcomes[describe(choice)].turns for choice in choices}


def duel(take: Take, best: Choice, rounds: int, seconds: float) -> Duel | None:
    """The best found against the defaults, in so many rounds of their own, if there is time; None where it fails now.

    Raises:
        ValueError: The defaults fail.
    """
    tried: dict[Choice, Tried] = {}
    rates = _rounds(take, [DEFAULTS, best], rounds, seconds, tried)
    if tried[best].error is not None:
        return None
    before, after = rates[DEFAULTS], rates[best]
    return Duel(summarize(before), summarize(after), summarize([one / other for one, other in zip(after, before, strict=True)]))
