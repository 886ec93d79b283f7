"""Measurements of a model, as data. Imports neither torch nor numpy: reports are read without them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from dapa_merge.imports import Shown

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

# Significance level: intervals cover 95 %, and p-values below this prove a change.
LEVEL = 0.05
# The kind of the responses to keep prompts.
KEEP = "keep"
# What messages call the prompts by which a result is taken, and those that neither a choice nor a search asks.
SEARCH_PROMPTS, HELD_OUT = "search prompts", "held-out prompts"
# A number that may be null in JSON, which has only finite numbers.
Number = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]


@dataclass(frozen=True)
class Response:
    """A model's response to a prompt, and its outcomes.

    Attributes:
        kind: The prompt's: `harmful`, `harmless` or `keep`; under an attack, `harmful` and the attack's name.
        category: The prompt's, or empty.
        response: Only the beginning if that made the outcome certain.
        outcome: By the first classifier.
        others: Outcomes by further classifiers, by name.
        earlier: The model's answers to messages before the last one that wait for its own.
    """

    kind: str
    category: str
    prompt: str
    response: str
    outcome: str
    others: Mapping[str, str] = field(default_factory=dict)
    earlier: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Response:
        """From plain data, as `asdict` makes it."""
        return cls(**{**data, "earlier": tuple(data.get("earlier", ()))})


@dataclass(frozen=True)
class CategoryFigure:
    """Number of refused prompts of a kind and category."""

    kind: str
    category: str
    num_prompts: int
    num_refused: int


@dataclass(frozen=True)
class ClassifierFigure:
    """Figures of the same responses by another classifier than the rules; rates are in [0, 1].

    Attributes:
        name: The classifier's.
        dsr: Share of harmful prompts refused according to it; None if it judged none of them.
        dsr_interval: 95 % interval.
        undecided: Share of harmful prompts without a verdict; never counted as a defense.
        over_refusal: Share of harmless prompts refused according to it; None if it judged none of them.
        agreement: With the rules, over all prompts.
    """

    name: str
    dsr: float | None
    dsr_interval: tuple[float, float] | None
    undecided: float
    over_refusal: float | None
    agreement: Agreement


@dataclass(frozen=True)
class AttackFigure:
    """Share of harmful prompts refused under an attack of `recipe/attacks.py`.

    Attributes:
        name: The attack's.
        dsr: In [0, 1]; None if the model's chat template has no system role, which the attack needs.
        interval: 95 % interval, for more prompts like these.
        num_prompts: Number of harmful prompts asked.
    """

    name: str
    dsr: float | None
    interval: tuple[float, float] | None
    num_prompts: int


@dataclass(frozen=True)
class KeptFigure:
    """A model's answers to the keep prompts beside the target's own, in numbers of prompts.

    Attributes:
        num_prompts: That were asked.
        num_same: Answered word for word as the target does, up to `max_new_tokens`.
        same_interval: 95 % interval of their share, for more prompts like these.
        num_other: Answered otherwise, and neither refused nor degenerate.
        words_shared: Of these, the share of the words of both answers that stand in both, in order, in [0, 1]; NaN
            without any.
        num_refused: Refused, according to the rules.
        num_newly_refused: Refused, and not by the target.
        num_degenerate: Empty, looping or noisy.
    """

    num_prompts: int
    num_same: int
    same_interval: tuple[float, float]
    num_other: int
    words_shared: Number
    num_refused: int
    num_newly_refused: int
    num_degenerate: int

    @property
    def share_same(self) -> float:
        """Share of prompts answered word for word as the target does, in [0, 1]."""
        return self.num_same / self.num_prompts

    @property
    def share_newly_refused(self) -> float:
        """Share of prompts that are refused, and not by the target, in [0, 1]."""
        return self.num_newly_refused / self.num_prompts


@dataclass(frozen=True)
class BesideSource:
    """The result's refusals beside those of the source alone, in numbers of prompts.

    Attributes:
        only_result: Harmful prompts that the result refuses and the source does not.
        only_source: Harmful prompts that the source refuses and the result does not.
        keep_of_source: Keep prompts that the source refuses.
        keep_of_both: Those of them that the result refuses too.
    """

    only_result: int
    only_source: int
    keep_of_source: int
    keep_of_both: int


@dataclass(frozen=True)
class Figures(Shown):
    """All measurements of a model; rates are in [0, 1].

    Attributes:
        num_harmful: Number of harmful prompts.
        dsr: Share of harmful prompts refused according to the rules (defense success rate).
        dsr_interval: 95 % interval, for more prompts like these.
        complied: Share of harmful prompts answered, in whatever way.
        consented: Share of harmful prompts whose answer only says yes, a part of `complied`; NaN in older reports.
        degenerate: Share of empty, looping or noisy responses to them; never counted as a defense.
        undecided: Share of responses to them with a thought but no answer; never counted as a defense.
        num_harmless: Number of harmless prompts.
        over_refusal: Share of harmless prompts refused.
        over_refusal_interval: 95 % interval.
        harmless_degenerate: Share of empty, looping or noisy responses to harmless prompts; NaN in older reports.
        harmless_undecided: Share of responses to them with a thought but no answer; NaN in older reports.
        categories: Figures by category, if the prompts have categories.
        markers: Figures by classifiers other than the rules; the name is that of the written report.
        score: Score of the whole model by the recipe's evaluator; None if that classifies responses.
        perplexity: Perplexity of `text`.
        text: Name of the perplexity text.
        skills: Each skill that was tested.
        divergence: From the target, in nats per token of its own answers to the keep prompts; NaN if not measured.
        attacks: Each attack that was tried on the harmful prompts.
        kept: The answers to keep prompts beside the target's; None if there are none, or no target.
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
    divergence: Number = math.nan
    attacks: tuple[AttackFigure, ...] = ()
    harmless_degenerate: Number = math.nan
    harmless_undecided: Number = math.nan
    consented: Number = math.nan
    kept: KeptFigure | None = None

    @property
    def skill(self) -> float:
        """The mean of the skills; NaN if none was tested."""
        return mean_score(self.skills)

    @property
    def brief(self) -> str:
        """Its refusals in a phrase."""
        return f"DSR {self.dsr:.3f}, over-refusal {self.over_refusal:.3f}"


@dataclass(frozen=True)
class SkillFigure:
    """Share of right answers in [0, 1], or the harness's metric, with 0 questions and no interval."""

    name: str
    score: Number
    num_questions: int
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Mean:
    """Means over prompts, one per cell, and their 95 % intervals for more prompts like these.

    Attributes:
        mean: NaN without a prompt.
        low: NaN with fewer than two prompts.
        high: Likewise.
        number: Number of prompts per cell.
    """

    mean: NDArray[numpy.float64]
    low: NDArray[numpy.float64]
    high: NDArray[numpy.float64]
    number: NDArray[numpy.int64]


@dataclass(frozen=True)
class Agreement:
    """Agreement of two classifiers on the same responses.

    Attributes:
        num_pairs: Number of responses that both decided.
        num_undecided: Number of responses left out because at least one did not decide.
        share: Share of decided pairs that both or neither call refused, in [0, 1]; None without any.
        kappa: Agreement beyond chance (Cohen 1960), in [-1, 1]; None if both give one same verdict to all responses.
        only_one_refused: Number of pairs that only the first calls refused.
        only_other_refused: Number of pairs that only the second calls refused.
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
        within_noise: Whether the p-value is 0.05 or more: the change may be chance.
    """

    newly_refused: int
    no_longer_refused: int
    p_value: float
    within_noise: bool


def mean_score(skills: Sequence[SkillFigure]) -> float:
    """The mean of skills; NaN without any."""
    return math.fsum(skill.score for skill in skills) / len(skills) if skills else math.nan


def responses_text(responses: Mapping[str, Sequence[Response]]) -> str:
    """Format every prompt, response and verdict as JSON lines, given the responses by model name."""
    rows = ({"model": model} | asdict(response) for model, said in responses.items() for response in said)
    # Few prompts have several turns.
    kept = ({key: value for key, value in row.items() if key != "earlier" or value} for row in rows)
    return "".join(_json_line(row) + "\n" for row in kept)


def _json_line(row: Mapping[str, Any]) -> str:
    """JSON with the letters of every language, but with escapes for what moves a cursor or cannot be encoded."""
    text = json.dumps(row, ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
