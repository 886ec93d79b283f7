"""The constraints of a search, declared once, and an examination that asks as few prompts as possible.

A new constraint is one entry of `CONSTRAINTS`, and its key in a recipe (`recipe/parameters.py`, `recipe/recipe.py`). If
its figure is new, `measure/meter.py` measures it and `measure/figures.py` reports it. Search, journal, report, card and
comparison iterate over the table. No models here: figures come in, a verdict goes out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

from dapa_merge.measure.figures import Figures, Response
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.recipe.recipe import Recipe

if TYPE_CHECKING:
    from dapa_merge.measure.meter import Measurement, Meter

PROMPT_KINDS = ("harmful", "harmless")
# Approximate number of response tokens per run through the model's layers; most of them are drafted.
TOKENS_FOR_EACH_RUN = 8


def piece_cost(meter: Meter) -> float:
    """Cost of a piece of prompts, in runs through the model's layers; one of them reads the prompts."""
    return 1 + meter.max_new_tokens / TOKENS_FOR_EACH_RUN


def text_cost(meter: Meter) -> float:
    """Cost of the passages for the perplexity, in the same unit."""
    return float(math.ceil(len(meter.prompts.passages) / meter.batch_size.limit))


@dataclass(frozen=True)
class Constraint:
    """A limit on one figure, relative to the figures of the target and of its full transplant.

    Attributes:
        figure: Its name in journals and reports, and in `Figures` unless `read` says otherwise.
        key: The recipe's parameter that sets the limit; a recipe without a value (None) has no limit.
        limit: The limit for the target's figure, the full transplant's and the recipe's value; NaN for no limit.
        label: Name for people.
        kind: The kind of prompts, if the figure is a share of them; None for other figures.
        outcome: The outcome of the responses that count.
        read: How to read the figure; by default the attribute `figure`.
        cost: Cost of measuring it, or of asking one piece of its prompts, in runs through the model's layers.
    """

    figure: str
    key: str
    limit: Callable[[float, float, float], float]
    label: str
    kind: str | None = None
    outcome: Outcome = Outcome.REFUSED
    read: Callable[[Figures | Measurement], float] | None = None
    cost: Callable[[Meter], float] = piece_cost

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

    def of(self, measured: Figures | Measurement) -> float:
        """The figure of a measured model."""
        return float(self.read(measured) if self.read else getattr(measured, self.figure))

    def is_met(self, figure: float, limit: float) -> bool:
        """Whether a figure meets a limit; a NaN figure meets only a NaN limit."""
        return math.isnan(limit) or (figure >= limit if self.bound == "min" else figure <= limit)

    def counts(self, response: Response) -> bool:
        """Whether a response is part of the share."""
        return response.outcome == self.outcome.value

    def complaint(self, lowest: float, highest: float, limit: float) -> str | None:
        """The violation by a figure between two bounds; None if it may still meet the limit."""
        best = highest if self.bound == "min" else lowest
        if self.is_met(best, limit):
            return None
        at_best, beyond, wanted = self.words
        if not math.isfinite(best):
            return f"its {self.label} is not finite; {limit:.3f} is {wanted}"
        found = f"{best:.3f}" if lowest == highest else f"{at_best} {best:.3f}"
        return f"its {self.label} is {found}, {abs(best - limit):.3f} {beyond} the {limit:.3f} {wanted}"


class Floor(Constraint):
    """A figure must reach its limit."""

    bound, words = "min", ("at most", "below", "required")


class Ceiling(Constraint):
    """A figure must not exceed its limit."""

    bound, words = "max", ("at least", "above", "allowed")


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
        kind="harmless",
    ),
    Ceiling(
        "perplexity",
        "max_perplexity",
        # NaN without passages to take it from.
        lambda target, _full, ratio: target * ratio,
        "perplexity",
        cost=text_cost,
    ),
)


def settings_of(recipe: Recipe) -> dict[str, float]:
    """A recipe's values for the constraints that it sets, by their keys."""
    values = {constraint.key: getattr(recipe, constraint.key) for constraint in CONSTRAINTS}
    return {key: value for key, value in values.items() if value is not None}


def constraints_of(
    settings: Collection[str], measure: str = SCORE.label, *, is_whole: bool = False
) -> tuple[Constraint, ...]:
    """The active constraints.

    Args:
        settings: The keys that a recipe sets.
        measure: The name of the score: DSR, or the evaluator's.
        is_whole: Whether the evaluator scores a model as a whole, rather than its responses.
    """
    score = replace(SCORE, label=measure, kind=None if is_whole else SCORE.kind)
    return tuple(score if one is SCORE else one for one in CONSTRAINTS if one.key in settings)


def identity_of(recipe: Recipe) -> str:
    """The constraint settings that affect a verdict, as text for the journal."""
    settings = settings_of(recipe)
    return ", ".join(f"{one.label} {settings[one.key]}" for one in constraints_of(settings))


def limited(settings: Collection[str]) -> str:
    """The limited figures other than the score, as text; without settings, all that can be limited."""
    constraints = constraints_of(settings or [one.key for one in CONSTRAINTS])
    *most, last = (one.label for one in constraints if one.figure != SCORE.figure)
    return f"{', '.join(most)} and {last}" if most else last


@dataclass(frozen=True)
class Requirement:
    """The active constraints, the score's first, each with its absolute limit; NaN for no limit."""

    limits: tuple[tuple[Constraint, float], ...]

    @property
    def measure(self) -> str:
        """The name of the score: DSR, or the evaluator's."""
        return self.limits[0][0].label

    @property
    def min_score(self) -> float:
        """In [0, 1]."""
        return self.limits[0][1]

    def complaint(self, figures: Mapping[str, float]) -> str | None:
        """The first limit that these figures violate, and by how much; None if they meet the requirement."""
        found = ((one, figures[one.figure], limit) for one, limit in self.limits)
        return _first(one.complaint(figure, figure, limit) for one, figure, limit in found)

    def to_json(self) -> dict[str, float | str]:
        """Plain data for the report."""
        return {**{one.name: limit for one, limit in self.limits}, "measure": self.measure}


def limits_text(requirement: Mapping[str, float | str] | None) -> str:
    """The limits of a report, as text."""
    found = requirement or {}
    constraints = constraints_of([one.key for one in CONSTRAINTS], str(found.get("measure", "score")))
    limits = [(one, found[one.name]) for one in constraints if isinstance(found.get(one.name), (int, float))]
    texts = [f"{one.label} at {'least' if one.bound == 'min' else 'most'} {limit:.3f}" for one, limit in limits]
    return ", ".join(texts) or "as the recipe says"


def requirement(
    constraints: Iterable[Constraint],
    target: Mapping[str, float],
    full: Mapping[str, float],
    settings: Mapping[str, float],
) -> Requirement:
    """The requirement for a target and its full transplant.

    Args:
        constraints: The active ones.
        target: The target's own figures, by name.
        full: The figures with every unit transplanted.
        settings: The recipe's values, by key.
    """
    return Requirement(
        tuple((one, one.limit(target[one.figure], full[one.figure], settings[one.key])) for one in constraints)
    )


class Examinee(Protocol):
    """A candidate that can be asked, at a cost, for its responses to a piece of prompts, or for a figure in full."""

    def responses(self, kind: str, piece: int) -> Sequence[Response]: ...

    def figure(self, constraint: Constraint) -> float: ...


@dataclass(frozen=True)
class Piece:
    """The outcome of one piece of prompts; `num_wrong` is by the first constraint on their kind."""

    kind: str
    index: int
    num_wrong: int
    num_prompts: int


@dataclass(frozen=True)
class Verdict:
    """The outcome of an examination.

    Attributes:
        holds: Whether the requirement is met; early stopping does not change it.
        complaint: The first violated limit that was found; None if it holds.
        pieces: The pieces that were asked.
        num_prompts: The number of prompts in a full examination.
    """

    holds: bool
    complaint: str | None
    pieces: tuple[Piece, ...]
    num_prompts: int

    @property
    def num_asked(self) -> int:
        """The number of prompts that were asked."""
        return sum(piece.num_prompts for piece in self.pieces)


class Examiner:
    """Asks candidates the cheapest question first, and stops as soon as the verdict is certain.

    The prompts come in fixed pieces; only the order of the pieces changes. So a verdict depends on the candidate alone,
    except for near-ties between two tokens, which fast generation may round differently (see `measure/decode.py`).
    """

    def __init__(
        self, requirement: Requirement, pieces: Mapping[str, Sequence[int]], costs: Mapping[str, float]
    ) -> None:
        """Make an examiner that has learned nothing yet.

        Args:
            requirement: The limits.
            pieces: For each kind of prompts, the number of prompts in every piece.
            costs: The cost of each check: per piece for a kind of prompts, in total for a figure.
        """
        self._checks: dict[str, list[tuple[Constraint, float]]] = {}
        for constraint, limit in requirement.limits:
            # Without a limit there is nothing to check.
            if not math.isnan(limit):
                self._checks.setdefault(constraint.check, []).append((constraint, limit))
        self._pieces = {kind: sizes for kind, sizes in pieces.items() if kind in self._checks}
        self._costs = costs
        self._num_prompts = sum(map(sum, self._pieces.values()))
        self._rejections: Counter[str] = Counter()
        self._wrong: Counter[tuple[str, int]] = Counter()
        self._asked: Counter[tuple[str, int]] = Counter()

    def examine(self, candidate: Examinee, *, stop_early: bool = True) -> Verdict:
        """Ask until the verdict is certain; with `stop_early` off, ask everything and reach the same verdict."""
        found: list[Piece] = []
        complaint: str | None = None
        for check in sorted(self._checks, key=self._urgency):
            if check in self._pieces:
                problem = self._ask(check, candidate, found, stop_early)
            else:
                figures = ((one, candidate.figure(one), limit) for one, limit in self._checks[check])
                problem = _first(one.complaint(figure, figure, limit) for one, figure, limit in figures)
            if problem is not None and complaint is None:
                complaint = problem
                self._rejections[check] += 1
                if stop_early:
                    break
        self.learn(found)
        return Verdict(complaint is None, complaint, tuple(found), self._num_prompts)

    def learn(self, pieces: Iterable[Piece]) -> None:
        """Remember which pieces tend to go wrong; they are asked first from now on."""
        for piece in pieces:
            self._wrong[piece.kind, piece.index] += piece.num_wrong
            self._asked[piece.kind, piece.index] += piece.num_prompts

    def _urgency(self, check: str) -> tuple[float, bool, str]:
        """Sort key of the checks: cost over past rejections; on a tie, checks without prompts come first."""
        return self._costs[check] / (1 + self._rejections[check]), check in self._pieces, check

    def _ask(self, kind: str, candidate: Examinee, found: list[Piece], stop_early: bool) -> str | None:
        """Ask pieces of one kind, those most likely to fail first; returns the violation, if any."""
        sizes, checks = self._pieces[kind], self._checks[kind]
        total = unasked = sum(sizes)
        counted = [0] * len(checks)
        problem: str | None = None
        for index in sorted(range(len(sizes)), key=lambda index: -self._share_wrong(kind, index)):
            responses = candidate.responses(kind, index)
            unasked -= len(responses)
            is_met = True
            for number, (constraint, limit) in enumerate(checks):
                num_counted = sum(map(constraint.counts, responses))
                if number == 0:
                    num_wrong = num_counted if constraint.bound == "max" else len(responses) - num_counted
                    found.append(Piece(kind, index, num_wrong, len(responses)))
                counted[number] += num_counted
                # Whatever the remaining responses are, the share lies between these two.
                lowest, highest = counted[number] / total, (counted[number] + unasked) / total
                problem = problem or constraint.complaint(lowest, highest, limit)
                is_met = is_met and constraint.is_met(lowest, limit) and constraint.is_met(highest, limit)
            if stop_early and (problem or is_met):
                break
        return problem

    def _share_wrong(self, kind: str, index: int) -> float:
        # Laplace's rule: a piece that was never asked is as likely to go wrong as not.
        return (self._wrong[kind, index] + 1) / (self._asked[kind, index] + 2)


def _first(complaints: Iterable[str | None]) -> str | None:
    return next((complaint for complaint in complaints if complaint is not None), None)
