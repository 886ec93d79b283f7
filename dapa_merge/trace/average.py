"""Statistics of traces: means over prompts, by the role of a token, and how far rankings of units agree."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy
from numpy.typing import NDArray
from scipy.stats import pearsonr, rankdata, spearmanr, t

from dapa_merge.measure.figures import LEVEL, Mean
from dapa_merge.trace.causal import Trace

# In the order of a prompt. Tokens before the subject have no role, because restoring them changes nothing.
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "next token",
    "further tokens",
    "last token",
)


def mean_of(values: NDArray[numpy.floating]) -> Mean:
    """The mean over the first axis, the prompts, without NaNs, and its 95 % interval (Student's t)."""
    values = numpy.asarray(values, numpy.float64)
    number = numpy.sum(~numpy.isnan(values), axis=0)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        mean = numpy.nansum(values, axis=0) / number
        deviation = numpy.sqrt(numpy.nansum((values - mean) ** 2, axis=0) / (number - 1))
        half = t.ppf(1 - LEVEL / 2, numpy.maximum(number - 1, 1)) * deviation / numpy.sqrt(number)
    half = numpy.where(number > 1, half, math.nan)
    return Mean(mean, mean - half, mean + half, number)


def roles_of(subject: tuple[int, int], num_tokens: int) -> list[int | None]:
    """The role of each token of a prompt, as an index in `ROLES`; None before the subject.

    A token with two roles has the later one: the only token of a subject is its last.
    """
    first, stop = subject
    roles: list[int | None] = [None] * first
    for index in range(first, num_tokens):
        if index == num_tokens - 1:
            roles.append(5)
        elif index < stop:
            roles.append(2 if index == stop - 1 else 0 if index == first else 1)
        else:
            roles.append(3 if index == stop else 4)
    return roles


def mean_effect(traces: Sequence[Trace], kind: str) -> Mean:
    """The mean effect of restoring a kind, in nats, `[layers, roles]`; tokens of one role are averaged first."""
    return mean_of(numpy.stack([_by_role(trace, kind) for trace in traces]))


def layer_scores(traces: Sequence[Trace], kind: str) -> list[float]:
    """The score of each layer by tracing: its mean effect at the role with the largest one; NaN without any."""
    # If the noise makes a model refuse more, restoring lowers refusing, so the sign is reversed.
    sign = 1 if sum(trace.total_effect for trace in traces) >= 0 else -1
    means = sign * mean_effect(traces, kind).mean
    return [float(numpy.nanmax(of)) if not numpy.isnan(of).all() else math.nan for of in means]


def _by_role(trace: Trace, kind: str) -> NDArray[numpy.float64]:
    effect = trace.effect(kind)
    roles = roles_of(trace.subject, len(trace.tokens))
    result = numpy.full((len(effect), len(ROLES)), math.nan)
    for role in range(len(ROLES)):
        tokens = [index for index, one in enumerate(roles) if one == role]
        if tokens:
            result[:, role] = effect[:, tokens].mean(axis=1)
    return result


T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Overlap:
    """The agreement of a ranking with a selection.

    Attributes:
        top: The first units of the ranking, as many as were selected.
        jaccard: Units in both, as a share of those in either, in [0, 1].
        jaccard_by_chance: The mean of `jaccard` over random rankings.
        spearman: Rank correlation of scores and being selected, in [-1, 1]; NaN if either is constant.
        spearman_at_best: The same if the selected units come first and no two scores are equal.
    """

    top: tuple[Hashable, ...]
    num_common: int
    jaccard: float
    jaccard_by_chance: float
    spearman: float
    spearman_at_best: float


def ranking_overlap(scores: Mapping[T, float], selection: Collection[T]) -> Overlap:
    """Compare a ranking with a selection among the same units.

    The largest scores come first, NaN last; equal ones keep the order of the mapping.
    """
    chosen = set(selection)
    top = sorted(scores, key=lambda unit: math.inf if math.isnan(scores[unit]) else -scores[unit])[: len(chosen)]
    common = len(chosen & set(top))
    return Overlap(
        top=tuple(top),
        num_common=common,
        jaccard=common / (2 * len(chosen) - common) if chosen else math.nan,
        jaccard_by_chance=chance_jaccard(len(scores), len(chosen)),
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
    return float(spearmanr(one, other).statistic)


@dataclass(frozen=True)
class Agreement:
    """How far a measure ranks units as another one does.

    Attributes:
        number: Of units that both measure.
        spearman: Rank correlation of the scores, in [-1, 1]; NaN if either is constant.
        low: Lower end of its 95 % interval (Fisher's), as if units were independent.
        high: Upper end.
        top: The first units by the measure, as many as are first by the other one.
        jaccard: Of both sets of first units, in [0, 1].
        jaccard_by_chance: The mean of `jaccard` over random rankings.
    """

    number: int
    spearman: float
    low: float
    high: float
    top: tuple[Hashable, ...]
    jaccard: float
    jaccard_by_chance: float


def agreement(scores: Mapping[T, float], others: Mapping[T, float], first: Collection[T]) -> Agreement:
    """Compare a ranking with another one of the same units, of which `first` come first; NaN scores are left out."""
    both = [unit for unit in scores if not (math.isnan(scores[unit]) or math.isnan(others[unit]))]
    ranks = [rankdata([values[unit] for unit in both]) for values in (scores, others)]
    low = high = math.nan
    if len(both) > 3 and all(len(set(of)) > 1 for of in ranks):
        interval = pearsonr(*ranks).confidence_interval(1 - LEVEL)
        low, high = float(interval.low), float(interval.high)
    overlap = ranking_overlap(scores, first)
    return Agreement(
        number=len(both),
        spearman=rank_correlation(*(of.tolist() for of in ranks)),
        low=low,
        high=high,
        top=overlap.top,
        jaccard=overlap.jaccard,
        jaccard_by_chance=overlap.jaccard_by_chance,
    )


def holding(scores: Mapping[T, float], share: float) -> list[T]:
    """The fewest units that hold a share of the sum of scores, largest first; no score may be below 0."""
    found: list[T] = []
    wanted, held = share * sum(scores.values()), 0.0
    for unit in sorted(scores, key=lambda unit: -scores[unit]):
        if held >= wanted:
            break
        found.append(unit)
        held += scores[unit]
    return found
