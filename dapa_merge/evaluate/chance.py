"""How far shares of a few prompts can be trusted: their intervals, and whether a change is more than chance.

No torch here. statsmodels, which loads pandas and scipy, is loaded when it is first needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Of being wrong where nothing but chance is at work: intervals of 95 %, and p-values below this prove a change.
LEVEL = 0.05


@dataclass(frozen=True)
class Change:
    """What became of the same prompts from one model to another, and how likely chance alone does as much.

    Attributes:
        newly_refused: Prompts that only the second model refuses.
        no_longer_refused: Prompts that only the first model refuses.
        p_value: Of the exact McNemar test, in [0, 1]: how often as many changes would fall as one-sidedly, or more so,
            if either direction were as likely.
        within_noise: Whether the p-value is not below 0.05, so that the change proves nothing.
    """

    newly_refused: int
    no_longer_refused: int
    p_value: float
    within_noise: bool


def compare(before: Sequence[bool], after: Sequence[bool]) -> Change:
    """The change between two models; for each prompt, in the same order, whether they refused it."""
    p_value = mcnemar_p(before, after)
    return Change(
        newly_refused=sum(now and not once for once, now in zip(before, after, strict=True)),
        no_longer_refused=sum(once and not now for once, now in zip(before, after, strict=True)),
        p_value=p_value,
        within_noise=p_value >= LEVEL,
    )


def interval(successes: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), in [0, 1]; honest also for few trials and shares near 0 or 1.

    Args:
        successes: Of `total`.
        total: Independent trials, at least one.
    """
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, total, alpha=LEVEL, method="wilson")
    # The share itself lies inside; for none or all of the trials rounding would leave it a hair outside.
    return min(float(low), successes / total), max(float(high), successes / total)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean (Student's t); None for fewer than three values, or for one that is not finite."""
    from statsmodels.stats.weightstats import DescrStatsW

    # Of two, it would tell of little but the distribution's tail.
    if len(values) < 3 or not all(map(math.isfinite, values)):
        return None
    low, high = DescrStatsW(list(values)).tconfint_mean(alpha=LEVEL)
    return float(low), float(high)


def mcnemar_p(before: Sequence[bool], after: Sequence[bool]) -> float:
    """The two-sided p-value of a change in paired outcomes (McNemar 1947), exact, from the binomial distribution.

    Only pairs that differ count; 1 if there are none.
    """
    from statsmodels.stats.contingency_tables import mcnemar

    table = [[0, 0], [0, 0]]
    for once, now in zip(before, after, strict=True):
        table[once][now] += 1
    return float(mcnemar(table, exact=True).pvalue)
