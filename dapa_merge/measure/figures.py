"""What was measured of a model, as data. No torch, no numpy: reports are read without them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

# Of being wrong where only chance is at work: intervals cover 95 %, and p-values below this prove a change.
LEVEL = 0.05


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
