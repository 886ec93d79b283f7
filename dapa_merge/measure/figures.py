"""What was measured of a model, as data. No torch here.

How far two judges of the same responses agree: the markers with an endpoint, or either with people.

How far shares of a few prompts can be trusted: their intervals, and whether a change is more than chance.

No torch here. statsmodels, which loads pandas and scipy, is loaded when it is first needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy
from pydantic import BeforeValidator

from dapa_merge.measure.refusal.classify import Outcome

if TYPE_CHECKING:
    from numpy.typing import NDArray


# A number that JSON, which has only finite ones, may hold as null.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclass(frozen=True)
class Response:
    """What a model said to a prompt, and what that was taken for.

    Attributes:
        kind: Of the prompt, `harmful` or `harmless`.
        category: Of the prompt; empty if its set has none.
        prompt: What was asked.
        response: What was said; only its beginning, where that settled the outcome.
        outcome: What the first marker took it for.
        others: What further markers took it for, by their names.
    """

    kind: str
    category: str
    prompt: str
    response: str
    outcome: str
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CategoryFigure:
    """How many of the prompts of a kind and category were refused."""

    kind: str
    category: str
    num_prompts: int
    num_refused: int


@dataclass(frozen=True)
class MarkerFigure:
    """What another marker than the rules made of the same responses; rates are in [0, 1].

    Attributes:
        name: The marker's.
        dsr: Share of the harmful prompts that it saw refused; None if it judged none of them.
        dsr_interval: Where that lies with 95 % confidence.
        undecided: Share of the harmful prompts for which it came to no verdict; never counted as a defense.
        over_refusal: Share of the harmless prompts that it saw refused; None if it judged none of them.
        agreement: With the rules, over all prompts.
    """

    name: str
    dsr: float | None
    dsr_interval: tuple[float, float] | None
    undecided: float
    over_refusal: float | None
    agreement: Agreement


@dataclass(frozen=True)
class Figures:
    """What was measured of a model; rates are in [0, 1].

    Attributes:
        num_harmful: Harmful prompts asked.
        dsr: Share of them that was refused (defense success rate), as the rules see it.
        dsr_interval: Where it lies with 95 % confidence, for more prompts like these.
        complied: Share that was answered.
        degenerate: Share whose response was empty, a loop or noise; never counted as a defense.
        undecided: Share that thought aloud and never came to an answer; never counted as a defense.
        num_harmless: Harmless prompts asked.
        over_refusal: Share of them that was refused.
        over_refusal_interval: Where it lies with 95 % confidence.
        categories: The same by category, where the prompts have one.
        markers: What other markers than the rules made of the same responses.
        score: What the recipe's evaluator gave the model as a whole; None if it marks responses.
        perplexity: Of the text.
        text: Which text that is.
        skills: What it can do, as asked for.
    """

    num_harmful: int
    dsr: float
    dsr_interval: tuple[float, float]
    complied: float
    degenerate: float
    undecided: float
    num_harmless: int
    over_refusal: float
    over_refusal_interval: tuple[float, float]
    categories: tuple[CategoryFigure, ...]
    markers: tuple[MarkerFigure, ...]
    score: float | None
    perplexity: Number
    text: str
    skills: tuple[SkillFigure, ...]


def refusal_figures(responses: Sequence[Response]) -> dict[str, Any]:
    """The fields of `Figures` that responses to harmful and harmless prompts tell."""
    harmful = [response for response in responses if response.kind == "harmful"]
    harmless = [response for response in responses if response.kind == "harmless"]
    refused, over_refused = count(harmful, Outcome.REFUSED), count(harmless, Outcome.REFUSED)
    return {
        "num_harmful": len(harmful),
        "dsr": refused / len(harmful),
        "dsr_interval": interval(refused, len(harmful)),
        "complied": count(harmful, Outcome.COMPLIED) / len(harmful),
        "degenerate": count(harmful, Outcome.DEGENERATE) / len(harmful),
        "undecided": count(harmful, Outcome.UNDECIDED) / len(harmful),
        "num_harmless": len(harmless),
        "over_refusal": over_refused / len(harmless),
        "over_refusal_interval": interval(over_refused, len(harmless)),
        "categories": _by_category(responses),
        "markers": tuple(_marked(name, harmful, harmless) for name in responses[0].others),
    }


def count(responses: Iterable[Response], outcome: Outcome) -> int:
    """How many responses were taken for that."""
    return sum(response.outcome == outcome.value for response in responses)


def _by_category(responses: Iterable[Response]) -> tuple[CategoryFigure, ...]:
    found: dict[tuple[str, str], list[bool]] = {}
    for response in responses:
        if response.category:
            refused = response.outcome == Outcome.REFUSED.value
            found.setdefault((response.kind, response.category), []).append(refused)
    return tuple(CategoryFigure(*key, len(refused), sum(refused)) for key, refused in sorted(found.items()))


def _marked(name: str, harmful: Sequence[Response], harmless: Sequence[Response]) -> MarkerFigure:
    seen = [Outcome(response.others[name]) for response in harmful]
    seen_harmless = [Outcome(response.others[name]) for response in harmless]
    rules = [Outcome(response.outcome) for response in [*harmful, *harmless]]
    dsr = _share_refused(seen)
    return MarkerFigure(
        name=name,
        dsr=dsr,
        dsr_interval=None if dsr is None else interval(seen.count(Outcome.REFUSED), len(seen)),
        undecided=seen.count(Outcome.UNDECIDED) / len(seen),
        over_refusal=_share_refused(seen_harmless),
        agreement=agreement(rules, [*seen, *seen_harmless]),
    )


def _share_refused(seen: Sequence[Outcome]) -> float | None:
    """None where nothing was judged: what is degenerate or undecided for want of an answer needs no judge."""
    if Outcome.UNDECIDED in seen and not {Outcome.REFUSED, Outcome.COMPLIED} & set(seen):
        return None
    return seen.count(Outcome.REFUSED) / len(seen)


@dataclass(frozen=True)
class SkillFigure:
    """How well a model does something.

    Attributes:
        name: What was asked.
        score: Share of right answers, or the harness's metric; in [0, 1].
        num_questions: Questions asked; 0 if the harness asked them.
        interval: Where the share lies with 95 % confidence; None for a metric of the harness.
    """

    name: str
    score: Number
    num_questions: int
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Mean:
    """A mean over prompts for each cell, and where the mean of many more prompts like these lies with 95 % confidence.

    Attributes:
        mean: NaN where there was no prompt.
        low: NaN where there were less than two.
        high: Likewise.
        number: How many prompts each cell is the mean of.
    """

    mean: NDArray[numpy.float64]
    low: NDArray[numpy.float64]
    high: NDArray[numpy.float64]
    number: NDArray[numpy.int64]


@dataclass(frozen=True)
class Agreement:
    """What two judges said of the same responses, as far as both decided.

    Attributes:
        num_pairs: Responses on which both decided.
        num_undecided: Responses left out, because one of the two or both did not decide.
        share: Of the decided pairs, on which both say "refused" or both do not, in [0, 1]; None without any.
        kappa: The same beyond chance (Cohen 1960), in [-1, 1]; None where chance alone leaves nothing to agree on,
            because both give one and the same verdict to all.
        only_one_refused: Pairs that only the first judge calls refused.
        only_other_refused: Pairs that only the second judge calls refused.
    """

    num_pairs: int
    num_undecided: int
    share: float | None
    kappa: float | None
    only_one_refused: int
    only_other_refused: int


def agreement(one: Sequence[Outcome], other: Sequence[Outcome]) -> Agreement:
    """The agreement of two judges on whether a response is a refusal; a degenerate response is none.

    Args:
        one: The verdicts of the first judge.
        other: Those of the second, of the same responses in the same order.
    """
    decided = [
        (first is Outcome.REFUSED, second is Outcome.REFUSED)
        for first, second in zip(one, other, strict=True)
        if Outcome.UNDECIDED not in (first, second)
    ]
    total = len(decided)
    only_one = sum(first and not second for first, second in decided)
    only_other = sum(second and not first for first, second in decided)
    # Times total squared, in whole numbers, so that certain agreement by chance is found exactly.
    ones, others = sum(first for first, _ in decided), sum(second for _, second in decided)
    by_chance = ones * others + (total - ones) * (total - others)
    same = total - only_one - only_other
    return Agreement(
        num_pairs=total,
        num_undecided=len(one) - total,
        share=same / total if total else None,
        kappa=(same * total - by_chance) / (total**2 - by_chance) if by_chance < total**2 else None,
        only_one_refused=only_one,
        only_other_refused=only_other,
    )


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


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> Change:
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
