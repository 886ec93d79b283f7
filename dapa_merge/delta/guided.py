"""Guided delta debugging: a prior says which units are probably needed, and Bayes' rule weighs it against the answers.

The prior is a score for each unit, on an unknown scale, and may be worthless. It stands for a set of hypotheses: every
wide gap between neighbouring scores may be the border between needed and unneeded units, more or less sharp; or the
scores say nothing, and some share of the units is needed. Each answer shifts the weight between them.

Every question leaves out a group of the units that are least likely needed, of the most promising size. A good prior
drops everything below a border at once; where the prior errs, the groups shrink as in a bisection; without one, they
start as large as the share of needed units allows. When a group cannot be left out, one of its units is needed: it is
narrowed down at once, or later if other groups promise more. Such groups are disjoint, so that their chances are exact
under each hypothesis (M. Sobel and P. Groll, "Group testing to eliminate efficiently all defectives in a binomial
sample", Bell System Technical Journal 38, 1959, for one group at a time).

Of units that are equally likely needed, the larger are left out first.

Chances only choose the questions. The answers alone decide which units are kept, and single removals come last, so the
result is 1-minimal for any oracle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dapa_merge.delta.classic import Query, Script, single_removals, without

# Total weight of the hypotheses that trust the prior.
TRUST = 0.9
# Shares of needed units, where the scores say nothing.
SHARES = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 0.8)
# How many of the widest gaps may be the border, and how sharp it may be: slopes of the logistic curve over all scores.
NUM_BORDERS = 12
SLOPES = (10.0, 25.0, 60.0)
# No score makes a unit certain.
LEAST_CHANCE = 0.003
# Needed units cluster: factor on the odds of the neighbours of a unit that turns out to be needed.
NEIGHBOUR_ODDS = 6.0


@dataclass
class _Hypothesis:
    """One reading of the prior: its weight, and each unit's chance of being needed if it is right."""

    weight: float
    needed: dict[Any, float]

    def none_needed(self, units: Sequence[Any]) -> float:
        return math.prod(1 - self.needed[unit] for unit in units)


class _Choice(NamedTuple):
    """A group of a pool to leave out.

    `promise` is the expected number of units dropped, times the information in the answer in bits; `chance` that the
    rest holds, and `chances` the same under each hypothesis.
    """

    pool: tuple[Any, ...]
    group: tuple[Any, ...]
    promise: float
    chance: float
    chances: tuple[float, ...]


def guided(units: tuple[Any, ...], prior: Mapping[Any, float] | None, sizes: Mapping[Any, int] | None = None) -> Script:
    """Ask about groups in the order of the prior, learn from each answer, and certify what remains.

    Args:
        units: In an order in which neighbours belong together.
        prior: A score for each; None without a prior.
        sizes: A size for each, for ties; None if they are alike.
    """
    sizes = dict.fromkeys(units, 1) if sizes is None else sizes
    hypotheses = _hypotheses(units, prior)
    current = units
    free: tuple[Any, ...] = ()
    # Groups with at least one needed unit. Until the end, something is assumed to be needed.
    suspicious = [units] if len(units) > 1 else []
    while free or suspicious:
        choices = [_best_group(pool, hypotheses, sizes, is_suspicious=True) for pool in suspicious]
        if free:
            choices.insert(0, _best_group(free, hypotheses, sizes, is_suspicious=False))
        choice = max(choices, key=lambda choice: choice.promise)
        rest = without(current, choice.group)
        holds = yield Query(rest, choice.chance)
        _learn(hypotheses, choice, holds)
        remaining = without(choice.pool, choice.group)
        is_from_free = choice.pool is free
        if not is_from_free:
            suspicious.remove(choice.pool)
        if holds:
            current = rest
            if is_from_free:
                free = remaining
            else:
                suspicious.append(remaining)
        else:
            # Nothing more is known about the rest of the suspicious pool.
            free = remaining if is_from_free else tuple(unit for unit in current if unit in {*free, *remaining})
            suspicious.append(choice.group)
        for pool in [pool for pool in suspicious if len(pool) == 1]:
            suspicious.remove(pool)
            _suspect_neighbours(hypotheses, units, pool[0])
    yield from single_removals(current, sorted(current, key=lambda unit: -sizes[unit]))


def _best_group(
    pool: tuple[Any, ...], hypotheses: Sequence[_Hypothesis], sizes: Mapping[Any, int], *, is_suspicious: bool
) -> _Choice:
    """The most promising group of a pool: some of the units that are least likely needed."""
    chance_needed = {
        unit: sum(hypothesis.weight * hypothesis.needed[unit] for hypothesis in hypotheses) for unit in pool
    }
    order = sorted(pool, key=lambda unit: (chance_needed[unit], -sizes[unit]))
    # For a suspicious pool, all chances are conditional on one of its units being needed: not all can be left out.
    excluded = [hypothesis.none_needed(pool) if is_suspicious else 0.0 for hypothesis in hypotheses]
    all_unneeded = [1.0] * len(hypotheses)
    best_promise, best_size = -1.0, 0
    best_chances: tuple[float, tuple[float, ...]] = (1.0, ())
    for size, unit in enumerate(order[: len(order) - is_suspicious], 1):
        all_unneeded = [
            chance * (1 - hypothesis.needed[unit]) for chance, hypothesis in zip(all_unneeded, hypotheses, strict=True)
        ]
        chances = tuple((chance - none) / (1 - none) for chance, none in zip(all_unneeded, excluded, strict=True))
        mean = sum(hypothesis.weight * chance for hypothesis, chance in zip(hypotheses, chances, strict=True))
        mean = min(max(mean, 0.0), 1.0)
        promise = size * mean * _entropy(mean)
        if promise > best_promise:
            best_promise, best_size, best_chances = promise, size, (mean, chances)
    return _Choice(pool, tuple(order[:best_size]), best_promise, *best_chances)


def _learn(hypotheses: Sequence[_Hypothesis], choice: _Choice, holds: bool) -> None:
    """Bayes: shift the weights to the hypotheses that expected this answer."""
    for hypothesis, chance in zip(hypotheses, choice.chances, strict=True):
        # No answer makes a hypothesis impossible, since all of them may be wrong.
        hypothesis.weight *= max(chance if holds else 1 - chance, 1e-9)
    total = sum(hypothesis.weight for hypothesis in hypotheses)
    for hypothesis in hypotheses:
        hypothesis.weight /= total


def _suspect_neighbours(hypotheses: Sequence[_Hypothesis], units: tuple[Any, ...], needed: Any) -> None:
    index = units.index(needed)
    for neighbour in (*units[max(index - 1, 0) : index], *units[index + 1 : index + 2]):
        for hypothesis in hypotheses:
            chance = hypothesis.needed[neighbour]
            odds = NEIGHBOUR_ODDS * chance / (1 - chance)
            hypothesis.needed[neighbour] = odds / (1 + odds)


def _hypotheses(units: tuple[Any, ...], prior: Mapping[Any, float] | None) -> list[_Hypothesis]:
    """Every reading of the prior, with weights that add up to 1."""
    borders = _borders([prior[unit] for unit in units]) if prior is not None else []
    trust = TRUST if borders else 0.0
    readings = [
        _Hypothesis(
            trust * weight / len(SLOPES), {unit: _chance(slope * ((prior[unit] - border) / scale)) for unit in units}
        )
        for weight, border, scale in borders
        for slope in SLOPES
        if prior is not None
    ]
    flat = [_Hypothesis((1 - trust) / len(SHARES), dict.fromkeys(units, share)) for share in SHARES]
    return readings + flat


def _borders(scores: Sequence[float]) -> list[tuple[float, float, float]]:
    """Possible borders between needed and unneeded units: weight (summing to 1), score, and range of all scores.

    A wider gap is likelier, and so is a gap with fewer units above it.
    """
    ordered = sorted(scores, reverse=True)
    scale = ordered[0] - ordered[-1] if ordered else 0.0
    if not 0 < scale < math.inf:
        return []
    gaps = [
        (((above - below) / scale) ** 2 / math.sqrt(number), below + (above - below) / 2)
        for number, (above, below) in enumerate(itertools.pairwise(ordered), 1)
    ]
    widest = sorted(gaps, reverse=True)[:NUM_BORDERS]
    total = sum(weight for weight, _ in widest)
    return [(weight / total, border, scale) for weight, border in widest]


def _chance(logit: float) -> float:
    logistic = 1 / (1 + math.exp(-max(logit, -500.0)))
    return min(max(logistic, LEAST_CHANCE), 1 - LEAST_CHANCE)


def _entropy(chance: float) -> float:
    """The information in a yes/no answer with this chance, in bits."""
    return -sum(part * math.log2(part) for part in (chance, 1 - chance) if part > 0)
