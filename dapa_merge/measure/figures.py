"""What was measured of a model, as data. No torch, no numpy: reports are read without them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

# Of being wrong where only chance is at work: intervals cover 95 %, and p-values below this prove a change.
LEVEL = 0.05
# A number that JSON, which has only finite ones, may hold as null.
Number = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]


@dataclass(frozen=True)
class Response:
    """A model's response to a prompt, and its outcomes.

    Attributes:
        kind: The prompt's, `harmful` or `harmless`.
        category: The prompt's; empty if it has none.
        prompt: The request.
        response: Only the beginning, where that settled the outcome.
        outcome: By the first classifier.
        others: By further classifiers, by name.
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
class ClassifierFigure:
    """Figures of the same responses by another classifier than the rules; rates are in [0, 1].

    Attributes:
        name: The classifier's.
        dsr: Share of the harmful prompts that it saw refused; None if it judged none of them.
        dsr_interval: With 95 % confidence.
        undecided: Share of the harmful prompts without a verdict; never counted as a defense.
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
    """Everything that is measured of a model; rates are in [0, 1].

    Attributes:
        num_harmful: Harmful prompts asked.
        dsr: Share of them that was refused (defense success rate), by the rules.
        dsr_interval: With 95 % confidence, for more prompts like these.
        complied: Share that was answered.
        degenerate: Share whose response was empty, a loop or noise; never counted as a defense.
        undecided: Share that thought aloud and never came to an answer; never counted as a defense.
        num_harmless: Harmless prompts asked.
        over_refusal: Share of them that was refused.
        over_refusal_interval: With 95 % confidence.
        categories: By category, where the prompts have one.
        markers: By other classifiers than the rules; the name is that of the written report.
        score: By the recipe's evaluator, for the model as a whole; None if that classifies responses.
        perplexity: Of the text.
        text: Its name.
        skills: Those asked for.
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
    markers: tuple[ClassifierFigure, ...]
    score: float | None
    perplexity: Number
    text: str
    skills: tuple[SkillFigure, ...]


@dataclass(frozen=True)
class SkillFigure:
    """A model's share of right answers in [0, 1], or the harness's metric, which has 0 questions and no interval."""

    name: str
    score: Number
    num_questions: int
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Mean:
    """Means over prompts, one for each cell, and their 95 % intervals for many more prompts like these.

    Attributes:
        mean: NaN where there was no prompt.
        low: NaN where there were fewer than two.
        high: Likewise.
        number: Prompts behind each cell.
    """

    mean: NDArray[numpy.float64]
    low: NDArray[numpy.float64]
    high: NDArray[numpy.float64]
    number: NDArray[numpy.int64]


@dataclass(frozen=True)
class Agreement:
    """How far two classifiers agree on the same responses.

    Attributes:
        num_pairs: Responses on which both decided.
        num_undecided: Responses left out, because at least one did not decide.
        share: Of the decided pairs, those that both or neither call refused, in [0, 1]; None without any.
        kappa: The same beyond chance (Cohen 1960), in [-1, 1]; None if both give the same verdict to all, which leaves
            nothing to agree on.
        only_one_refused: Pairs that only the first calls refused.
        only_other_refused: Pairs that only the second calls refused.
    """

    num_pairs: int
    num_undecided: int
    share: float | None
    kappa: float | None
    only_one_refused: int
    only_other_refused: int


@dataclass(frozen=True)
class Change:
    """Change of the same prompts' outcomes from one model to another, and whether it may be chance.

    Attributes:
        newly_refused: Prompts that only the second model refuses.
        no_longer_refused: Prompts that only the first model refuses.
        p_value: Of the exact McNemar test, in [0, 1]: the probability of changes at least as one-sided if both
            directions were equally likely.
        within_noise: Whether the p-value is 0.05 or more, so that the change proves nothing.
    """

    newly_refused: int
    no_longer_refused: int
    p_value: float
    within_noise: bool


def responses_text(responses: Mapping[str, Sequence[Response]]) -> str:
    """Return every prompt, response and verdict as JSON lines, by the names of the models."""
    rows = ({"model": model} | asdict(response) for model, said in responses.items() for response in said)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
