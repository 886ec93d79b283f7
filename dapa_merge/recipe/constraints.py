"""The constraints of a search, each declared once: a key of the recipe, and a limit on a figure.

A new constraint is one entry of `CONSTRAINTS`. If its figure is new, `measure/meter.py` measures it and
`measure/figures.py` reports it. What is measured comes in as an argument: nothing here knows of models.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

# Approximate number of response tokens per run through the model's layers; most of them are drafted.
TOKENS_FOR_EACH_RUN = 8


def piece_cost(meter: Any) -> float:
    """Cost of a piece of prompts, in runs through the model's layers; one of them reads the prompts."""
    return float(1 + meter.max_new_tokens / TOKENS_FOR_EACH_RUN)


def text_cost(meter: Any) -> float:
    """Cost of the passages for the perplexity, in the same unit."""
    return float(math.ceil(len(meter.prompts.passages) / meter.batch_size.limit))


def answers_cost(meter: Any) -> float:
    """Cost of reading the target's own answers to the keep prompts, in the same unit."""
    return float(math.ceil(len(meter.keep) / meter.batch_size.limit))


def questions_cost(meter: Any) -> float:
    """Cost of asking all questions of the skills, in the same unit."""
    return piece_cost(meter) * float(math.ceil(sum(one.num_questions for one in meter.skills) / meter.batch_size.limit))


def shown(figure: float) -> str:
    """A figure as text: three decimals, or two digits of one that they would show as zero."""
    return f"{figure:.2g}" if 0 < abs(figure) < 0.0005 else f"{figure:.3f}"


@dataclass(frozen=True)
class Range:
    """Numbers that a recipe may give: from `low`, or only `above` it, to `high`; `allowed` says so in a message."""

    low: float
    high: float
    allowed: str
    above: bool = False


@dataclass(frozen=True)
class Constraint(ABC):
    """A limit on one figure, relative to the figures of the target and of its full transplant.

    Attributes:
        figure: Its name in journals and reports, and in `Figures` unless `read` says otherwise.
        key: The recipe's parameter that sets the limit; a recipe without a value (None) has no limit.
        limit: The limit for the target's figure, the full transplant's and the recipe's value; NaN for no limit.
        label: Name for people.
        values: What the recipe may say.
        default: The value of a recipe that does not name one.
        kind: The kind of prompts, if the figure is a share of them; None for other figures.
        outcome: The outcome of the responses that count, as `measure.refusal` names it.
        read: How to read the figure; by default the attribute `figure`.
        refers: Whether it compares with the target's own answers to the keep prompts (`Meter.referring`).
        cost: Cost of measuring it, or of asking one piece of its prompts, in runs through the model's layers.
    """

    figure: str
    key: str
    limit: Callable[[float, float, float], float]
    label: str
    values: Range
    default: float | None = None
    kind: str | None = None
    outcome: str = "refused"
    read: Callable[[Any], float] | None = None
    refers: bool = False
    cost: Callable[[Any], float] = piece_cost

    bound: ClassVar[str]
    words: ClassVar[tuple[str, str, str]]

    @property
    def check(self) -> str:
        """The name of the examiner's check: a kind of prompts, or the figure itself."""
        return self.kind or self.figure

    @property
    def name(self) -> str:
        """The name of its limit in a report."""
        return f"{self.bound}_{self.figure}"

    def of(self, measured: Any) -> float:
        """The figure of a measured model."""
        return float(self.read(measured) if self.read else getattr(measured, self.figure))

    def is_met(self, figure: float, limit: float) -> bool:
        """Whether a figure meets a limit; a NaN figure meets only a NaN limit."""
        return math.isnan(limit) or (figure >= limit if self.bound == "min" else figure <= limit)

    @abstractmethod
    def violation(self, figure: float, limit: float) -> float:
        """How far a figure is beyond a limit, as a share of the worst that there is: in [0, 1], 0 if it is met."""

    def counts(self, response: Any) -> bool:
        """Whether a response is part of the share."""
        return bool(response.outcome == self.outcome)

    def complaint(self, lowest: float, highest: float, limit: float) -> str | None:
        """The violation by a figure between two bounds; None if it may still meet the limit."""
        best = highest if self.bound == "min" else lowest
        if self.is_met(best, limit):
            return None
        at_best, beyond, wanted = self.words
        if not math.isfinite(best):
            return f"its {self.label} is not finite; {shown(limit)} is {wanted}"
        found = shown(best) if lowest == highest else f"{at_best} {shown(best)}"
        return f"its {self.label} is {found}, {shown(abs(best - limit))} {beyond} the {shown(limit)} {wanted}"


class Floor(Constraint):
    """A figure must reach its limit."""

    bound, words = "min", ("at most", "below", "required")

    def violation(self, figure: float, limit: float) -> float:
        if self.is_met(figure, limit):
            return 0.0
        # The worst is 0.
        return 1.0 if math.isnan(figure) else 1 - figure / limit


class Ceiling(Constraint):
    """A figure must not exceed its limit."""

    bound, words = "max", ("at least", "above", "allowed")

    def violation(self, figure: float, limit: float) -> float:
        if self.is_met(figure, limit):
            return 0.0
        if not math.isfinite(figure):
            return 1.0
        # The worst share is 1; other figures have no largest value.
        return (figure - limit) / (1 - limit) if self.kind is not None else 1 - limit / figure


def _kept_score(target: float, full: float, retain: float) -> float:
    """The target's score plus a share of the gain."""
    gain = full - target
    # Lowered by 1e-9, so that rounding cannot demand the impossible, but kept above the target's own score, so that an
    # empty selection is never enough.
    return target + max(retain * gain - 1e-9, 1e-6 * gain)


SCORE = Floor(
    "score",
    "retain",
    _kept_score,
    "DSR",
    Range(0, 1, "write a share above 0 and up to 1", above=True),
    0.95,
    kind="harmful",
    read=lambda measured: measured.dsr if measured.score is None else measured.score,
)
# The score's floor, which every search has, comes first.
CONSTRAINTS: tuple[Constraint, ...] = (
    SCORE,
    Ceiling(
        "over_refusal",
        "max_over_refusal",
        lambda target, _full, rise: target + rise + 1e-9,
        "over-refusal",
        Range(0, 1, "write a share from 0 to 1"),
        0.05,
        kind="harmless",
    ),
    Ceiling(
        "perplexity",
        "max_perplexity",
        # NaN without passages to take it from.
        lambda target, _full, ratio: target * ratio,
        "perplexity",
        Range(1, math.inf, "write a ratio of at least 1"),
        1.05,
        cost=text_cost,
    ),
    Ceiling(
        "divergence",
        "max_divergence",
        # NaN without prompts to measure it on.
        lambda target, _full, most: math.nan if math.isnan(target) else most,
        "divergence",
        Range(0, math.inf, "write a number of nats per token of at least 0"),
        refers=True,
        cost=answers_cost,
    ),
    Floor(
        "skill",
        "min_skill",
        # NaN without questions. Lowered by 1e-9, so that rounding cannot demand more than the target has.
        lambda target, _full, share: target * share - 1e-9,
        "skill",
        Range(0, 1, "write a share of the target's own skill above 0 and up to 1", above=True),
        cost=questions_cost,
    ),
)
