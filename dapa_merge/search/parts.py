"""Looks for as much of a transplant as the limits allow, where all of it violates one.

A source that over-refuses is the normal case: with all of its gates the target over-refuses too, with some of them it
need not. Units are added in the order of what they are expected to do for refusing (`delta/fill.py`). Each selection
that is tried is measured in full, and is a point that a user may pick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from dapa_merge.checkpoint.units import Unit
from dapa_merge.delta.fill import fill
from dapa_merge.progress import LOG
from dapa_merge.recipe.constraints import SCORE
from dapa_merge.search.bench import Bench
from dapa_merge.search.identity import data_digest
from dapa_merge.search.journal import Journal
from dapa_merge.search.requirement import Requirement
from dapa_merge.search.result import Baseline, Point
from dapa_merge.search.workers import in_order, note_of

# Selections that are measured at most, all units included.
MAX_PARTS = 20


@dataclass(frozen=True)
class Part:
    """A selection, its figures, and the point that they are."""

    point: Point
    units: tuple[Unit, ...]
    baseline: Baseline


@dataclass(frozen=True)
class Parts:
    """Measures parts of a transplant, unless the journal has their figures.

    Attributes:
        bench: Holds the target.
        journal: Every measurement is recorded before it is used.
        limits: The recipe's, for the verdict of each point.
    """

    bench: Bench
    journal: Journal
    limits: Requirement

    def measured(self, units: Iterable[Unit], number: int, part_of: int | None = None) -> Part:
        """Measure some units as the point of this number."""
        selection = tuple(in_order(units))
        # Other keep prompts are the same search where no limit is set on them, but have another divergence.
        meter = self.bench.meter
        name = note_of("part", [*selection, data_digest([meter.keep, [asdict(skill) for skill in meter.skills]])])
        baseline = self.bench.recorded(self.journal, name, selection, f"point {number}")
        complaint = self.limits.complaint(baseline.figures)
        names = tuple(map(str, selection))
        point = Point(number, dict(baseline.figures), 0, complaint, part_of=part_of, units=names)
        LOG.info(point.text(self.limits))
        return Part(point, selection, baseline)

    def within_limits(self, units: Sequence[Unit], effects: Mapping[Unit, float] | None) -> list[Part]:
        """All of the units, and the parts that were tried for one that keeps to every limit but that of the score.

        Args:
            units: All units.
            effects: What each is expected to do for refusing; of those that do nothing for it none is tried. None if
                unknown.
        """
        found = [self.measured(units, 1)]

        def fits(some: frozenset[Unit]) -> bool:
            if some != frozenset(units):
                found.append(self.measured(some, len(found) + 1))
            return self.limits.split(found[-1].baseline.figures)[1]

        fill(_order(units, effects or {}), fits, max_tests=MAX_PARTS - 1)
        return found


def _order(units: Sequence[Unit], effects: Mapping[Unit, float]) -> Sequence[Unit]:
    ranked = sorted(units, key=lambda unit: -effects.get(unit, 0.0))
    return [unit for unit in ranked if effects.get(unit, 0.0) > 0] or units


def best_part(parts: Sequence[Part], limits: Requirement, min_score: float) -> Part | None:
    """The part that keeps to all other limits and scores highest, of those that score alike the smallest one.

    None if each of them violates a limit, or scores `min_score` or less.
    """
    fitting = [part for part in parts if limits.split(part.baseline.figures)[1] and part.baseline.score > min_score]
    return max(fitting, key=lambda part: (part.baseline.figures[SCORE.figure], -len(part.units)), default=None)


def nearest(points: Sequence[Point], limits: Requirement) -> Point | None:
    """The point whose violations of the limits sum to least, the first one on a tie; None if all change nothing.

    See `Constraint.violation`: each is a share of the worst that there is, so that a DSR of 0 weighs as much as an
    over-refusal of 1.
    """
    some = [point for point in points if point.num_directions or point.units]
    return min(some, key=lambda point: limits.violation(point.figures), default=None)


def how_to_pick(point: Point) -> str:
    """The rest of a sentence that names a point."""
    return f"`--pick {point.number}` takes it (DAPA_PICK for mergekit-yaml)"
