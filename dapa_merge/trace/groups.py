"""Sufficient or necessary? Which groups of units are put into the target, and taken out of the full transplant.

A group is *sufficient* as far as the target refuses with it alone, and *necessary* as far as the full transplant
refuses less without it. Both are compared with random selections of as many units: any group may do something by its
size alone.
Pure: who scores a selection is handed in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dapa_merge.checkpoint.architecture import Unit

THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class Group:
    """Some units that belong together.

    Attributes:
        name: As `layer 3`, `middle`, `gate` or `selection`.
        family: What it is one of: `layer`, `third`, `module` or `selection`.
        units: What is put in, or taken out.
        rest: What of the full transplant is left without them.
        among: All of the full transplant, of which the random controls are drawn.
        number: How many of `among` a control has; None for as many as `units` are.
    """

    name: str
    family: str
    units: tuple[Unit, ...]
    rest: tuple[Unit, ...]
    among: tuple[Unit, ...]
    number: int | None = None


@dataclass(frozen=True)
class Finding:
    """What the scores say of a group; all of them in [0, 1].

    Attributes:
        group: The group.
        inserted: The target's score with the group alone.
        reverted: The full transplant's score without it.
        full: The full transplant's score.
        control_inserted: The target's scores with random selections of as many units.
        control_reverted: The full transplant's scores without these.
    """

    group: Group
    inserted: float
    reverted: float
    full: float
    control_inserted: tuple[float, ...]
    control_reverted: tuple[float, ...]

    def sufficiency(self, target: float) -> float | None:
        """The share of the full transplant's gain that the group alone brings; None if there is no gain."""
        return (self.inserted - target) / (self.full - target) if self.full > target else None

    def control_sufficiency(self, target: float) -> list[float]:
        """The shares of the gain that the controls bring; none if there is no gain."""
        gain = self.full - target
        return [(score - target) / gain for score in self.control_inserted] if gain > 0 else []

    def control_necessity(self, target: float) -> list[float]:
        """The shares of the gain that are lost without the controls; none if there is no gain."""
        gain = self.full - target
        return [(self.full - score) / gain for score in self.control_reverted] if gain > 0 else []

    def necessity(self, target: float) -> float | None:
        """The share of the full transplant's gain that is lost without the group; None if there is no gain."""
        return (self.full - self.reverted) / (self.full - target) if self.full > target else None


def make_groups(units: Sequence[Unit]) -> list[Group]:
    """The groups of a model: each layer; early, middle and late layers; each module.

    Args:
        units: Of all modules, none of which is part of another.
    """
    num_layers = max(unit.layer for unit in units) + 1

    def group(name: str, family: str, belongs: Callable[[Unit], bool]) -> Group:
        inside, outside = (tuple(unit for unit in units if belongs(unit) == wanted) for wanted in (True, False))
        return Group(name, family, inside, outside, tuple(units))

    groups = [group(f"layer {layer}", "layer", lambda unit, at=layer: unit.layer == at) for layer in range(num_layers)]  # type: ignore[misc]
    edges = [round(third * num_layers / 3) for third in range(4)]
    for name, first, stop in zip(THIRDS, edges, edges[1:], strict=False):
        groups.append(group(name, "third", lambda unit, low=first, high=stop: low <= unit.layer < high))  # type: ignore[misc]
    for module in dict.fromkeys(unit.module for unit in units):
        groups.append(group(module, "module", lambda unit, of=module: unit.module == of))  # type: ignore[misc]
    return [group for group in groups if group.units]


def examine(
    groups: Sequence[Group], score: Callable[[frozenset[Unit]], float], num_seeds: int, seed: int = 0
) -> list[Finding]:
    """Score every group and its controls.

    Args:
        groups: As `make_groups` gives them.
        score: The score of the target with a selection transplanted. It is asked for the same selection again.
        num_seeds: How many random selections of each size; each seed draws one of its own.
        seed: The first of the seeds.
    """
    findings = []
    for group in groups:
        full = frozenset(group.among)
        size = len(group.units) if group.number is None else group.number
        drawn = [draw(group.among, size, seed + number) for number in range(num_seeds)]
        findings.append(
            Finding(
                group,
                inserted=score(frozenset(group.units)),
                reverted=score(frozenset(group.rest)),
                full=score(full),
                control_inserted=tuple(score(units) for units in drawn),
                control_reverted=tuple(score(full - units) for units in drawn),
            )
        )
    return findings


def selections_of(groups: Sequence[Group], num_seeds: int, seed: int = 0) -> list[frozenset[Unit]]:
    """Every selection that `examine` asks for, each once."""
    asked: dict[frozenset[Unit], None] = {}

    def note(selection: frozenset[Unit]) -> float:
        asked[selection] = None
        return 0.0

    examine(groups, note, num_seeds, seed)
    return list(asked)


def draw(units: Iterable[Unit], number: int, seed: int) -> frozenset[Unit]:
    """A random selection of so many units; the same for the same seed."""
    return frozenset(random.Random(f"{seed} {number}").sample(list(units), number))
