"""Scores of edits: groups of units put in and left out, with random controls; and edits of every size.

A group is *sufficient* as far as the target refuses with it alone, and *necessary* as far as the full transplant
refuses less without it. Both are compared with random selections of as many units, because size alone has an effect.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapa_merge.checkpoint.units import DIVISIBLE_MODULES, Unit
from dapa_merge.measure.meter import Meter
from dapa_merge.measure.statistics import refusal_figures
from dapa_merge.plan.plan import Plan, cut, divide
from dapa_merge.progress import LOG, advance, task
from dapa_merge.recipe.parameters import layer_spans
from dapa_merge.search.bench import Bench
from dapa_merge.search.journal import Journal
from dapa_merge.search.workers import in_order, note_of
from dapa_merge.trace.options import TraceOptions


class Edits:
    """Edits of one target, measured once each with all prompts of a bench's meter."""

    def __init__(self, bench: Bench, journal: Journal) -> None:
        self._bench = bench
        self._journal = journal

    def findings(self, groups: Sequence[UnitGroup], wanted: TraceOptions) -> tuple[list[Finding], float]:
        """The findings about the groups, and the target's own score."""
        how = (wanted.num_controls, wanted.seed)
        asked = selections_of(groups, *how)
        LOG.info(f"scoring {len(groups)} groups, put in and left out: {len(asked)} selections")
        with task("scoring groups, put in and left out", self.num_unscored(groups, wanted), "edits"):
            scores = {units: self._score(units) for units in asked}
            target = self._score(frozenset())
        return examine_groups(groups, scores.__getitem__, *how), target

    def num_unscored(self, groups: Sequence[UnitGroup], wanted: TraceOptions) -> int:
        """The number of edits that `findings` must score, because the journal does not have them."""
        asked = [*selections_of(groups, wanted.num_controls, wanted.seed), frozenset[Unit]()]
        return sum(note_of("score", in_order(units)) not in self._journal.notes for units in asked)

    def curve(
        self, units: Sequence[Unit], selection: Sequence[Unit], attribution: Mapping[Unit, float], meter: Meter
    ) -> list[CurvePoint]:
        """Measure edits of more and more units: first the selection, then the others by descending attribution."""
        kept = {unit.whole for unit in selection}
        order = sorted(units, key=lambda unit: (unit not in kept, -attribution[unit]))
        sizes = curve_sizes(len(order), sum(unit in kept for unit in order))
        points = []
        each = len(meter.prompts.harmful) + len(meter.prompts.harmless)
        with task("measuring edits of every size", len(sizes) * each, "prompts"):
            for size in sizes:
                edit = tuple(in_order(order[:size]))
                name = note_of("edit", edit)
                if name not in self._journal.notes:
                    self._journal.note(name, self._measure(edit, meter))
                share = self._bench.plan.share(edit)
                points.append(CurvePoint(tuple(map(str, edit)), share, **self._journal.notes[name]))
        return points

    def _score(self, units: frozenset[Unit]) -> float:
        ordered = in_order(units)
        name = note_of("score", ordered)
        if name not in self._journal.notes:
            self._journal.note(name, self._bench.score(ordered))
            advance(1, "edits")
        return float(self._journal.notes[name])

    def _measure(self, edit: tuple[Unit, ...], meter: Meter) -> dict[str, Any]:
        with self._bench.live.transplanted(edit) as model:
            measurement = meter.measure(model, self._bench.live.tokenizer, edit)
            figures = refusal_figures(measurement.responses())
            return {
                "dsr": (figures["dsr"], figures["dsr_interval"]),
                "over_refusal": (figures["over_refusal"], figures["over_refusal_interval"]),
                "skills": {skill.name: (skill.score, skill.interval) for skill in measurement.skills},
            }


def groups_of(units: Sequence[Unit], chosen: Plan, selection: Sequence[Unit]) -> list[UnitGroup]:
    """Layers, thirds and modules of a model, and the selection among the units of the recipe's plan `chosen`."""
    groups = make_groups(units)
    if not selection:
        return groups
    name = "selection"
    blocks = [unit for unit in selection if unit.rows is not None]
    if not blocks:
        return [*groups, UnitGroup(name, name, tuple(selection), _without(chosen.units, selection), chosen.units)]
    # Controls are random blocks of the same size, with as many parameters in all.
    rows = max(chosen.rows(unit)[1] - chosen.rows(unit)[0] for unit in blocks)
    divisible = [unit for unit in chosen.units if unit.module in DIVISIBLE_MODULES]
    pool = divide(chosen, divisible, rows).units
    number = max(1, min(len(pool), round(chosen.num_parameters(selection) / chosen.num_parameters(pool[:1]))))
    rest = _without(cut(chosen, selection).units, selection)
    among = (*pool, *_without(chosen.units, divisible))
    return [*groups, UnitGroup(name, name, tuple(selection), rest, among, number)]


def curve_sizes(total: int, kept: int) -> list[int]:
    """The numbers of units on the curve: `kept`, and others in growing steps."""
    sizes = {0, kept, total}
    step = 1.0
    while step < total:
        sizes.add(round(step))
        step *= 2**0.5
    return sorted(sizes)


def _without(units: Sequence[Unit], others: Sequence[Unit]) -> tuple[Unit, ...]:
    left_out = set(others)
    return tuple(unit for unit in units if unit not in left_out)


@dataclass(frozen=True)
class CurvePoint:
    """An edit on the curve; rates are in [0, 1], with their 95 % intervals."""

    units: tuple[str, ...]
    share: float
    dsr: tuple[float, tuple[float, float]]
    over_refusal: tuple[float, tuple[float, float]]
    skills: dict[str, tuple[float, tuple[float, float] | None]]


THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class UnitGroup:
    """Units that belong together.

    Attributes:
        family: `layer`, `third`, `module` or `selection`.
        rest: The other units of the full transplant.
        among: The full transplant, from which random controls are drawn.
        number: The size of a control, in units of `among`; None for as many as `units`.
    """

    name: str
    family: str
    units: tuple[Unit, ...]
    rest: tuple[Unit, ...]
    among: tuple[Unit, ...]
    number: int | None = None

    @property
    def label(self) -> str:
        """Its name, with its layers if the name does not tell them."""
        if self.family != "third":
            return self.name
        return f"{self.name} ({layer_spans(sorted({unit.layer for unit in self.units}))})"


@dataclass(frozen=True)
class Finding:
    """The scores of a group, in [0, 1].

    Attributes:
        inserted: The target's score with the group alone.
        reverted: The full transplant's score without it.
        control_inserted: The target's scores with random selections of as many units.
        control_reverted: The full transplant's scores without these.
    """

    group: UnitGroup
    inserted: float
    reverted: float
    full: float
    control_inserted: tuple[float, ...]
    control_reverted: tuple[float, ...]

    def sufficiency(self, target: float) -> tuple[float | None, list[float]]:
        """The share of the gain that the group alone brings, and its controls' shares; None and [] without a gain."""
        return _shares(self.full - target, [score - target for score in (self.inserted, *self.control_inserted)])

    def necessity(self, target: float) -> tuple[float | None, list[float]]:
        """The share of the gain that is lost without the group, and its controls' shares; None and [] if no gain."""
        return _shares(self.full - target, [self.full - score for score in (self.reverted, *self.control_reverted)])

    def to_json(self, target: float) -> dict[str, Any]:
        """Plain data for the summary, given the target's score."""
        return {
            "group": self.group.name,
            "family": self.group.family,
            "num_units": len(self.group.units),
            "inserted": self.inserted,
            "reverted": self.reverted,
            "full": self.full,
            "sufficiency": self.sufficiency(target)[0],
            "necessity": self.necessity(target)[0],
            "random_inserted": list(self.control_inserted),
            "random_reverted": list(self.control_reverted),
        }


def _shares(gain: float, parts: Sequence[float]) -> tuple[float | None, list[float]]:
    """Divide the parts by the gain: that of the group, and those of its controls."""
    if gain <= 0:
        return None, []
    group, *controls = (part / gain for part in parts)
    return group, controls


def third_of(num_layers: int) -> list[str]:
    """The third of a model that each of its layers is in, of `THIRDS`."""
    edges = [round(third * num_layers / 3) for third in (1, 2)]
    return [THIRDS[sum(layer >= edge for edge in edges)] for layer in range(num_layers)]


def make_groups(units: Sequence[Unit]) -> list[UnitGroup]:
    """The groups of a model: each layer, each third of the layers, and each module."""
    num_layers = max(unit.layer for unit in units) + 1

    def group(name: str, family: str, belongs: Callable[[Unit], bool]) -> UnitGroup:
        inside, outside = (tuple(unit for unit in units if belongs(unit) == wanted) for wanted in (True, False))
        return UnitGroup(name, family, inside, outside, tuple(units))

    groups = [group(f"layer {layer}", "layer", lambda unit, at=layer: unit.layer == at) for layer in range(num_layers)]  # type: ignore[misc]
    thirds = third_of(num_layers)
    for name in THIRDS:
        groups.append(group(name, "third", lambda unit, third=name: thirds[unit.layer] == third))  # type: ignore[misc]
    for module in dict.fromkeys(unit.module for unit in units):
        groups.append(group(module, "module", lambda unit, of=module: unit.module == of))  # type: ignore[misc]
    return [group for group in groups if group.units]


def examine_groups(
    groups: Sequence[UnitGroup], score: Callable[[frozenset[Unit]], float], num_seeds: int, seed: int = 0
) -> list[Finding]:
    """Score every group and its controls, one for each seed; `score` may get the same selection again."""
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


def selections_of(groups: Sequence[UnitGroup], num_seeds: int, seed: int = 0) -> list[frozenset[Unit]]:
    """The selections that `examine_groups` scores, each once."""
    asked: dict[frozenset[Unit], None] = {}

    def note(selection: frozenset[Unit]) -> float:
        asked[selection] = None
        return 0.0

    examine_groups(groups, note, num_seeds, seed)
    return list(asked)


def draw(units: Iterable[Unit], number: int, seed: int) -> frozenset[Unit]:
    """A random selection of `number` units; the same for the same seed."""
    return frozenset(random.Random(f"{seed} {number}").sample(list(units), number))
