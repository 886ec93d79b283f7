"""The outcome of a search as data; no torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dapa_merge.checkpoint.units import Unit
from dapa_merge.delta.minimize import Minimum
from dapa_merge.errors import UsageError, one_line
from dapa_merge.imports import Shown
from dapa_merge.measure.figures import Number, Response
from dapa_merge.plan.plan import Plan
from dapa_merge.recipe.constraints import SCORE, shown
from dapa_merge.recipe.parameters import spans
from dapa_merge.search.requirement import Requirement


@dataclass(frozen=True)
class Baseline:
    """The target or its full transplant: the figures of the constraints, and the responses to harmful prompts."""

    figures: Mapping[str, float]
    responses: tuple[Response, ...]

    @property
    def score(self) -> float:
        """The DSR, or the evaluator's score of the model as a whole; in [0, 1]."""
        return self.figures[SCORE.figure]

    def to_json(self) -> dict[str, Any]:
        """Plain data for the journal."""
        return {**self.figures, "responses": [asdict(response) for response in self.responses]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Baseline:
        """The baseline that `to_json` was called on.

        Raises:
            UsageError: If it is other data, of a journal that somebody made up.
        """
        try:
            figures = {name: float(value) for name, value in data.items() if name != "responses"}
            return cls(figures, tuple(Response.from_json(response) for response in data["responses"]))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise UsageError(
                f"the journal has no figures where they should be ({one_line(error)}); remove it to search again"
            ) from error


@dataclass(frozen=True)
class Asked:
    """One selection that a search asked about, and whether it met the requirement.

    `score` is the share refused of the harmful prompts asked; None if none was asked.
    """

    units: tuple[Unit, ...]
    holds: bool
    score: float | None


@dataclass(frozen=True)
class Point:
    """A candidate that may be picked, measured on the search's prompts.

    An edit that chooses offers several; where all units of another edit violate a limit, so do parts of them.

    Attributes:
        number: From 1.
        figures: Of the active constraints, by name.
        num_directions: The rank that it uses, in all matrices together; 0 for an edit that adds none.
        complaint: The first limit of the recipe that it violates; None if it is within all.
        on_front: Whether no other point has less divergence and a score as high, or as little and a higher one.
        part_of: The number of the point that it is a part of, if the search left matrices out; None for a round.
        line: The numbers of the points between which it lies, the one that scores less first and 0 for the target, and
            the share of the way; None for other points.
        is_whole: Whether it is the transplant of the directions as they are.
        units: Of a part of a transplant: what is transplanted.
    """

    number: int
    figures: Mapping[str, Number]
    num_directions: int
    complaint: str | None
    on_front: bool = False
    part_of: int | None = None
    line: tuple[int, int, float] | None = None
    is_whole: bool = False
    units: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its number, with those of the points that it is a part of or between."""
        if self.is_whole:
            return f"{self.number} (all directions)"
        if self.line is not None:
            start, end, _ = self.line
            return f"{self.number} ({start or 'target'} to {end})"
        return str(self.number) if self.part_of is None else f"{self.number} (part of {self.part_of})"

    def text(self, limits: Requirement) -> str:
        """The point as one line."""
        told = [
            f"{one.label} {shown(self.figures[one.figure])}" for one, _ in limits.limits if one.figure in self.figures
        ]
        verdict = "within the limits" if self.complaint is None else self.complaint
        of_what = spans(self.units) if self.units else f"{self.num_directions} directions"
        return f"point {self.name}: {', '.join(told)}, {of_what} ({verdict})"


@dataclass(frozen=True)
class Limit:
    """A limit of a recipe on one figure, and what was found of the result.

    Attributes:
        prompts: Of which prompts the figure is: `search prompts`, by which the result was taken, or `held-out prompts`.
        figure: Its name for people.
        is_floor: Whether it must be at least the limit, rather than at most.
        limit: Set by the target's figure on the same prompts; a score's is that of the search.
        value: What was found; None if a search ended before it was known exactly, or if it is not finite.
        is_met: Whether the limit is met.
        why: Where the limit comes from, as the rest of a phrase; empty where the recipe's parameters say it.
    """

    prompts: str
    figure: str
    is_floor: bool
    limit: float
    value: float | None
    is_met: bool
    why: str = ""

    def __str__(self) -> str:
        bound = f"{'at least' if self.is_floor else 'at most'} {shown(self.limit)}{self.why}"
        return f"{self.figure} {bound}" if self.value is None else f"{self.figure} {shown(self.value)} ({bound})"


@dataclass(frozen=True)
class Search(Shown):
    """A finished search.

    Attributes:
        minimum: The selection found, and its certificate.
        requirement: The limits.
        target: The target's own figures on the search's prompts.
        full: The same figures with every unit transplanted.
        prior: The expected effect of each unit; None if the algorithm uses none.
        path: The selections asked about, in order.
        num_candidates: Units to choose from, including the blocks of a search among blocks.
        num_recorded: Tests that were already in the journal.
        num_unneeded: Further tests that were made ahead of time, but not needed.
        num_asked: Prompts asked by the tests, including recorded ones.
        num_prompts: Prompts that they would have asked without early verdicts.
        seconds: Wall-clock time.
        plan: The plan that the selection belongs to, with what the edit chose.
        points: What there was to pick from, in order.
        picked: The number of the point that was taken, before the search left anything out; None without points.
        by_hand: Whether the user picked it, so that nothing was searched.
        limits: The recipe's limits, which a point must meet: `requirement`, but for what a search adds.
        reference: The figures of the full transplant, if there are points and none of them is that.
        measured: The selection's figures as this process measured them, if parts of the search come from another one.
    """

    minimum: Minimum[Unit]
    requirement: Requirement
    target: Baseline
    full: Baseline
    prior: Mapping[Unit, float] | None
    path: tuple[Asked, ...]
    num_candidates: int
    num_recorded: int
    num_unneeded: int
    num_asked: int
    num_prompts: int
    seconds: float
    plan: Plan
    points: tuple[Point, ...] = ()
    picked: int | None = None
    by_hand: bool = False
    limits: Requirement | None = None
    reference: Baseline | None = None
    measured: Mapping[str, float] | None = None

    @property
    def result(self) -> Point | None:
        """The point of the selection: the last one if the search left something out; None without points."""
        if self.picked is None:
            return None
        return self.points[-1] if self.points[-1].part_of is not None else self.points[self.picked - 1]

    @property
    def share_saved(self) -> float:
        """Share of the tests' prompts that early verdicts saved, in [0, 1]."""
        return 1 - self.num_asked / self.num_prompts if self.num_prompts else 0.0


def thrift(num_recorded: int, num_unneeded: int, share_saved: float) -> str:
    """The prompts and tests that a search saved, as text."""
    facts = [f"{100 * share_saved:.0f} % of the prompts, by early verdicts"]
    if num_recorded:
        facts.append(f"{num_recorded} tests, by the journal")
    if num_unneeded:
        facts.append(f"but {num_unneeded} more tests were made ahead of time and in vain")
    return "; ".join(facts)


def readable_certificate(minimum: Minimum[Any]) -> dict[str, list[str]]:
    """For each kept unit, the selection without it or without its bundle, which did not hold."""
    return {str(unit): list(map(str, others)) for unit, others in minimum.certificate.items()}


def needed(certificate: Mapping[str, Sequence[str]]) -> list[tuple[list[str], Sequence[str]]]:
    """The entries of a readable certificate: units that were left out together, and the selection that did not hold."""
    found: dict[tuple[str, ...], list[str]] = {}
    for unit, others in certificate.items():
        found.setdefault(tuple(others), []).append(unit)
    return [(units, others) for others, units in found.items()]


def is_of_bundles(certificate: Mapping[str, Sequence[str]]) -> bool:
    """Whether a certificate is of bundles of units that were left out together (`search/bundles.py`)."""
    return any(len(units) > 1 for units, _ in needed(certificate))
