"""What edits do: groups of units put in and taken out, beside random ones; and edits of every size. Asked once each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.architecture import DIVISIBLE_MODULES, Unit
from dapa_merge.checkpoint.plan import Plan, cut, divide
from dapa_merge.progress import Reporter
from dapa_merge.search.journal import Journal
from dapa_merge.search_testers import in_order, note_of
from dapa_merge.trace.groups import Finding, Group, examine, make_groups, selections_of
from dapa_merge.trace_options import TraceOptions
from dapa_merge.trace_result import CurvePoint

if TYPE_CHECKING:
    from dapa_merge.bench import Bench
    from dapa_merge.evaluate.measure import Meter


class Edits:
    """Edits of one target, measured with all prompts of a bench's meter."""

    def __init__(self, bench: Bench, journal: Journal, reporter: Reporter) -> None:
        self._bench = bench
        self._journal = journal
        self._reporter = reporter

    def findings(self, groups: Sequence[Group], wanted: TraceOptions) -> tuple[list[Finding], float]:
        """What the groups do, and the target's own score."""
        how = (wanted.num_controls, wanted.seed)
        asked = selections_of(groups, *how)
        self._reporter.say(f"putting {len(groups)} groups in and taking them out: {len(asked)} selections")
        with self._reporter.task("putting groups in and taking them out", len(asked) + 1) as done:
            scores = {units: self._score(units, done) for units in asked}
            target = self._score(frozenset(), done)
        return examine(groups, scores.__getitem__, *how), target

    def curve(
        self, units: Sequence[Unit], selection: Sequence[Unit], attribution: Mapping[Unit, float], meter: Meter
    ) -> list[CurvePoint]:
        """Edits of more and more units: those that something is selected of first, then by descending attribution.

        Args:
            units: What an edit may have.
            selection: Some of them, or blocks of some.
            attribution: How much each unit is expected to do.
            meter: Measures DSR, over-refusal and skills.
        """
        kept = {unit.whole for unit in selection}
        order = sorted(units, key=lambda unit: (unit not in kept, -attribution[unit]))
        sizes = curve_sizes(len(order), sum(unit in kept for unit in order))
        points = []
        total = len(sizes) * (len(meter.prompts.harmful) + len(meter.prompts.harmless))
        with self._reporter.task("measuring edits of every size", total) as done:
            for size in sizes:
                edit = tuple(in_order(order[:size]))
                name = note_of("edit", edit)
                if name not in self._journal.notes:
                    self._journal.note(name, self._measure(edit, replace(meter, progress=done)))
                share = self._bench.plan.share(edit)
                points.append(CurvePoint(tuple(map(str, edit)), share, **self._journal.notes[name]))
        return points

    def _score(self, units: frozenset[Unit], progress: Callable[[int], None]) -> float:
        ordered = in_order(units)
        name = note_of("score", ordered)
        if name not in self._journal.notes:
            self._journal.note(name, self._bench.score(ordered))
        progress(1)
        return float(self._journal.notes[name])

    def _measure(self, edit: tuple[Unit, ...], meter: Meter) -> dict[str, Any]:
        from dapa_merge.evaluate.figures import refusal_figures

        with self._bench.live.transplanted(edit) as model:
            measurement = meter.measure(model, self._bench.live.tokenizer, edit)
            figures = refusal_figures(measurement.responses())
            return {
                "dsr": (figures["dsr"], figures["dsr_interval"]),
                "over_refusal": (figures["over_refusal"], figures["over_refusal_interval"]),
                "skills": {skill.name: (skill.score, skill.interval) for skill in measurement.skills},
            }


def groups_of(units: Sequence[Unit], chosen: Plan, selection: Sequence[Unit]) -> list[Group]:
    """Layers, thirds and modules of a model, and the selection.

    Args:
        units: Of all modules, none of which is part of another.
        chosen: The plan of the recipe, whose units it selects from.
        selection: Some of those units, or blocks of some.
    """
    groups = make_groups(units)
    if not selection:
        return groups
    name = "selection"
    blocks = [unit for unit in selection if unit.rows is not None]
    if not blocks:
        return [*groups, Group(name, name, tuple(selection), _without(chosen.units, selection), chosen.units)]
    # Random blocks of the same size, as many as have as many parameters.
    rows = max(chosen.rows(unit)[1] - chosen.rows(unit)[0] for unit in blocks)
    divisible = [unit for unit in chosen.units if unit.module in DIVISIBLE_MODULES]
    pool = divide(chosen, divisible, rows).units
    number = max(1, min(len(pool), round(chosen.num_parameters(selection) / chosen.num_parameters(pool[:1]))))
    rest = _without(cut(chosen, selection).units, selection)
    among = (*pool, *_without(chosen.units, divisible))
    return [*groups, Group(name, name, tuple(selection), rest, among, number)]


def curve_sizes(total: int, kept: int) -> list[int]:
    """How many units the edits of the curve have: few at first, then in larger steps; and as many as were kept."""
    sizes = {0, kept, total}
    step = 1.0
    while step < total:
        sizes.add(round(step))
        step *= 2**0.5
    return sorted(sizes)


def _without(units: Sequence[Unit], others: Sequence[Unit]) -> tuple[Unit, ...]:
    left_out = set(others)
    return tuple(unit for unit in units if unit not in left_out)
