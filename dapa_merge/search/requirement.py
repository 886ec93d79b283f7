"""The requirement of a search, and an examination that asks as few prompts as possible.

The constraints are declared in `recipe/constraints.py`; search, journal, report, card and comparison iterate over that
table. No models here: figures come in, a verdict goes out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from dapa_merge.measure.figures import Response
from dapa_merge.plan.edit import EDITS, Edit
from dapa_merge.recipe import constraints as declared
from dapa_merge.recipe.constraints import SCORE, Constraint, shown
from dapa_merge.recipe.recipe import Recipe

PROMPT_KINDS = ("harmful", "harmless")
DIVERGENCE_KEY = "max_divergence"
# What measuring the same weights again may change, where two tokens are nearly as likely: so many prompts, at most this
# share of them (tests/benchmarks/RESULTS.md, "Real models repaired"); of other figures so much of their limit.
NOISE_PROMPTS, NOISE_SHARE = 2, 0.05
NOISE_RATIO, NOISE_LEAST = 0.02, 0.001


def noisy_prompts(number: int) -> int:
    """Of so many prompts, how many measuring the same weights again may judge otherwise."""
    return min(NOISE_PROMPTS, int(NOISE_SHARE * number))


def is_noise(gain: float, number: int) -> bool:
    """Whether a gain in the share of `number` prompts may be noise; a gain of a score without prompts never is."""
    return 0 < gain * number < noisy_prompts(number) + 0.5


def settings_of(recipe: Recipe) -> dict[str, float]:
    """A recipe's values for the constraints that it sets, by their keys."""
    values = {constraint.key: getattr(recipe, constraint.key) for constraint in declared.CONSTRAINTS}
    if EDITS.get(recipe.edit, Edit).chooses and values[DIVERGENCE_KEY] is None:
        # Measured all the same: it decides among an edit's points.
        values[DIVERGENCE_KEY] = math.nan
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
    return tuple(score if one is SCORE else one for one in declared.CONSTRAINTS if one.key in settings)


def refers(recipe: Recipe) -> bool:
    """Whether a recipe sets a constraint that compares with the target's own answers."""
    return any(one.refers for one in constraints_of(settings_of(recipe)))


def identity_of(recipe: Recipe) -> str:
    """The constraint settings that affect a verdict, as text for the journal."""
    settings = settings_of(recipe)
    return ", ".join(f"{one.label} {settings[one.key]}" for one in constraints_of(settings))


def limited(settings: Collection[str]) -> str:
    """The limited figures other than the score, as text; without settings, all that can be limited."""
    constraints = constraints_of(settings or [one.key for one in declared.CONSTRAINTS])
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

    def tightened(self, figure: str, limit: float) -> Requirement:
        """The same requirement with a limit of one figure, unless it is as strict already."""

        def tighter(one: Constraint, old: float) -> float:
            if one.figure != figure:
                return old
            # An old limit that a figure at the new one would violate stays.
            return limit if math.isnan(old) or one.is_met(limit, old) else old

        return Requirement(tuple((one, tighter(one, old)) for one, old in self.limits))

    def loosened(self, sizes: Mapping[str, int]) -> Requirement:
        """The requirement that the same weights still meet when they are measured again.

        Args:
            sizes: The number of prompts of each kind.
        """

        def looser(one: Constraint, limit: float) -> float:
            number = sizes.get(one.kind or "", 0)
            noise = noisy_prompts(number) / number if number else max(NOISE_RATIO * abs(limit), NOISE_LEAST)
            return limit - noise if one.bound == "min" else limit + noise

        return Requirement(tuple((one, looser(one, limit)) for one, limit in self.limits))

    def complaint(self, figures: Mapping[str, float]) -> str | None:
        """The first limit that these figures violate, and by how much; None if they meet the requirement."""
        found = ((one, figures[one.figure], limit) for one, limit in self.limits)
        return _first(one.complaint(figure, figure, limit) for one, figure, limit in found)

    def split(self, figures: Mapping[str, float]) -> tuple[bool, bool]:
        """Whether these figures meet the score's limit, and whether all others."""
        score, *others = (one.is_met(figures[one.figure], limit) for one, limit in self.limits)
        return score, all(others)

    def violation(self, figures: Mapping[str, float]) -> float:
        """The sum of `Constraint.violation` over the limits; 0 if these figures meet the requirement."""
        return sum(one.violation(figures[one.figure], limit) for one, limit in self.limits)

    def to_json(self) -> dict[str, float | str]:
        """Plain data for the report."""
        return {**{one.name: limit for one, limit in self.limits}, "measure": self.measure}


def limits_text(requirement: Mapping[str, float | str] | None, sizes: Mapping[str, int] | None = None) -> str:
    """The limits of a report, as text.

    Args:
        requirement: As `Requirement.to_json` makes it; None if unknown.
        sizes: The number of prompts of each kind, to say how many of them a limit allows or requires.
    """
    found = requirement or {}
    measure = str(found.get("measure", "score"))
    keys = [one.key for one in declared.CONSTRAINTS]
    constraints = constraints_of(keys, measure, is_whole=not measure.startswith(SCORE.label))
    limits = [(one, float(limit)) for one in constraints if isinstance(limit := found.get(one.name), (int, float))]
    texts = [
        f"{one.label} at {'least' if one.bound == 'min' else 'most'} {shown(limit)}"
        f"{_in_prompts(one, limit, (sizes or {}).get(one.kind or '', 0))}"
        for one, limit in limits
        if not math.isnan(limit)
    ]
    return ", ".join(texts) or "as the recipe says"


def _in_prompts(one: Constraint, limit: float, number: int) -> str:
    """What a limit on a share means in prompts, as the rest of a phrase; empty for other limits, or without prompts."""
    if not number or one.kind is None:
        return ""
    count = math.ceil(limit * number) if one.bound == "min" else math.floor(limit * number)
    return f" ({count if count > 0 else 'none'} of {number} {one.kind} prompts)"


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
