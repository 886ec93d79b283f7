"""Would tracing have found the same units? Rankings held against a selection, and against one another, in numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Overlap:
    """How far the first units of a ranking are those of a selection of as many.

    Attributes:
        top: The first units of the ranking, as many as were selected.
        num_common: How many of them were selected.
        jaccard: Units in both, as a share of those in either, in [0, 1].
        by_chance: What that is for a random ranking, on average.
        spearman: Rank correlation between the ranking's scores and being selected, in [-1, 1]; NaN if either is
            constant.
        spearman_at_best: What that is for a ranking that has them all on top, and no two scores alike.
    """

    top: tuple[Hashable, ...]
    num_common: int
    jaccard: float
    by_chance: float
    spearman: float
    spearman_at_best: float


def overlap(scores: Mapping[T, float], selection: Collection[T]) -> Overlap:
    """Hold a ranking against a selection.

    Args:
        scores: For every unit that could be selected; the largest come first, NaN last, of equal ones the first in the
            mapping.
        selection: Some of these units.
    """
    chosen = set(selection)
    top = sorted(scores, key=lambda unit: math.inf if math.isnan(scores[unit]) else -scores[unit])[: len(chosen)]
    common = len(chosen & set(top))
    return Overlap(
        top=tuple(top),
        num_common=common,
        jaccard=common / (2 * len(chosen) - common) if chosen else math.nan,
        by_chance=chance_jaccard(len(scores), len(chosen)),
        spearman=rank_correlation(list(scores.values()), [float(unit in chosen) for unit in scores]),
        spearman_at_best=rank_correlation(
            range(len(scores)), [float(rank >= len(scores) - len(chosen)) for rank in range(len(scores))]
        ),
    )


def chance_jaccard(total: int, number: int) -> float:
    """The mean Jaccard index of two independent random selections of `number` of `total` (hypergeometric)."""
    if not 0 < number <= total:
        return math.nan
    ways = math.comb(total, number)
    return sum(
        math.comb(number, common) * math.comb(total - number, number - common) / ways * common / (2 * number - common)
        for common in range(max(0, 2 * number - total), number + 1)
    )


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank, in [-1, 1]; NaN if either is constant or too short."""
    if len(one) < 2 or len(set(one)) < 2 or len(set(other)) < 2:
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)
