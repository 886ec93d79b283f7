"""Figures of the edits of one target, measured live and once: each is in the journal before the next is measured."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from dapa_merge.checkpoint.units import Unit
from dapa_merge.compare.result import CompareOptions, Further
from dapa_merge.measure.callback import Candidate
from dapa_merge.measure.divergence import Reference, divergence
from dapa_merge.measure.evaluators import RULES
from dapa_merge.measure.figures import Figures, Response
from dapa_merge.measure.live import Resident, load_model
from dapa_merge.measure.meter import MeasuredModel, Meter, measure_candidate
from dapa_merge.measure.prompts.labels import PROMPT_KINDS
from dapa_merge.measure.prompts.sets import PromptSet, asked_after, load_own
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.measure.statistics import count, interval
from dapa_merge.plan.plan import Plan, join
from dapa_merge.plan.selection import num_changed
from dapa_merge.progress import LOG, quiet, task
from dapa_merge.recipe.attacks import Attack
from dapa_merge.recipe.options import Where
from dapa_merge.report.report import jsonable, read_figures
from dapa_merge.search.identity import data_digest
from dapa_merge.search.journal import Journal
from dapa_merge.search.workers import in_order, note_of

# A model in memory, and its tokenizer.
Model = tuple[Any, Any]


@dataclass(frozen=True)
class Seen:
    """The measurement of one edit.

    Attributes:
        refused: For each harmful prompt, whether it was refused.
        num_changed: Parameters that differ from the target's, if they were counted.
        further: What was measured besides.
    """

    figures: Figures
    refused: tuple[bool, ...]
    over_refused: tuple[bool, ...]
    seconds: float
    num_changed: int | None = None
    further: tuple[Further, ...] = ()


def fast(meter: Meter) -> Meter:
    """A faster meter of the same figures: if only rules judge, a response ends once its outcome is certain."""
    return replace(meter, stops_early=all(one is RULES for one in meter.classifiers))


@dataclass(frozen=True)
class Besides:
    """A further measurement of each result, beside the report's figures.

    Attributes:
        prompts: Another set, or the report's.
        attack: Tried on its harmful prompts; None to ask them as they are.
        diverges: Whether to measure the divergence on its harmless prompts, instead of refusals.
    """

    name: str
    prompts: PromptSet
    attack: Attack | None = None
    diverges: bool = False

    def note(self, note: str) -> str:
        """The name in the journal of what is measured of a result whose measurement has the name `note`."""
        attack = self.attack and asdict(self.attack)
        asked = [self.name, self.prompts.harmful, self.prompts.harmless, attack, self.diverges]
        return f"{note} besides {data_digest(asked)}"

    def refusals(self, meter: Meter, candidate: Candidate) -> list[list[Any]]:
        """Ask a model: a figure's name, how many were refused, and of how many; nothing if it cannot be asked so."""
        attacks = () if self.attack is None else (self.attack,)
        meter = replace(meter, prompts=self.prompts, attacks=attacks)
        measured = meter.measure(candidate.model, candidate.tokenizer, candidate.selection)
        if attacks:
            answers = {"DSR": measured.attacked_responses()}
        else:
            answers = {
                "DSR": measured.judge("harmful", self.prompts.harmful),
                "over-refusal": measured.judge("harmless", self.prompts.harmless),
            }
        return [[figure, count(found, Outcome.REFUSED), len(found)] for figure, found in answers.items() if found]

    def figures(self, noted: Sequence[Sequence[Any]]) -> Iterator[Further]:
        """Yield the figures that the journal has of a result."""
        for figure, value, number in noted:
            if self.diverges:
                yield Further(self.name, figure, math.nan if value is None else float(value), None, number)
            else:
                yield Further(self.name, figure, value / number, interval(value, number), number)


def besides(wanted: CompareOptions, report: PromptSet) -> tuple[Besides, ...]:
    """List the further measurements: other sets, attacks on harmful prompts, and divergence on harmless ones.

    Raises:
        UsageError: If a set is not available.
    """
    found = [
        Besides(name, replace(asked_after(load_own(name), report.system), is_formatted=report.is_formatted))
        for name in wanted.also
    ]
    found += [Besides(attack.name, replace(report, harmless=()), attack) for attack in wanted.attacks]
    if wanted.diverges:
        found.append(Besides("harmless prompts", replace(report, harmful=()), diverges=True))
    return tuple(found)


class Measuring(Resident):
    """Measures edits of one target; models are loaded only if a figure is not in the journal yet.

    Attributes:
        journal: Has all that was measured.
    """

    def __init__(
        self,
        plan: Plan,
        meter: Meter,
        where: Where,
        journal: Journal,
        *,
        refers: bool = False,
        also: Sequence[Besides] = (),
    ) -> None:
        """Load nothing yet.

        Args:
            plan: The models.
            meter: The report's.
            where: Where and how to load them.
            journal: Of the row.
            refers: Whether to measure divergence, for which the target is loaded in any case.
            also: What else is measured of each result.
        """
        super().__init__(plan, where, lambda: LOG.info(f"loading the target, {plan.target.name}"))
        self.meter = fast(meter)
        self.journal = journal
        self._refers = refers
        self._also = tuple(also)

    @cached_property
    def _referring(self) -> Meter:
        """The meter, with the target's own answers if divergence is measured."""
        if not self._refers:
            return self.meter
        # Blends may have another output layer, as the source may.
        return self.meter.referring(self.live.model, self.live.tokenizer, keeps_logits=True)

    @cached_property
    def _harmless(self) -> Reference:
        """The target's own answers to the report's harmless prompts."""
        meter = replace(self.meter, prompts=replace(self.meter.prompts, keep=self.meter.prompts.harmless))
        reference = meter.referring(self.live.model, self.live.tokenizer, keeps_logits=True).reference
        assert reference is not None
        return reference

    @contextmanager
    def source(self) -> Iterator[Model]:
        """The source alone, loaded for the length of a `with` block."""
        LOG.info(f"loading the source, {self.plan.source.name}")
        model, tokenizer = load_model(self.plan.source, self.where)
        with quiet("transformers"):
            yield model, tokenizer

    def edit(self, units: Sequence[Unit], name: str, level: int = logging.INFO, *, counts: bool = False) -> Seen:
        """Measure the target with some units of the source, in any order, and log it under a name.

        Args:
            units: The units, or blocks of them.
            name: For the log.
            level: Likewise.
            counts: Whether to count the parameters that change.
        """
        # Blocks that add up to a unit are replaced by the unit.
        ordered = tuple(in_order(join(self.plan, units)))

        @contextmanager
        def candidate() -> Iterator[Model]:
            with self.live.transplanted(ordered) as model:
                yield model, self.live.tokenizer

        changed = functools.partial(num_changed, self.plan, ordered) if counts else None
        return self._seen(note_of("edit", ordered), candidate, name, ordered, level, changed)

    def candidate(
        self,
        note: str,
        candidate: Callable[[], AbstractContextManager[Model]],
        name: str,
        num_changed: Callable[[], int] | None = None,
    ) -> Seen:
        """Measure what `candidate` makes of the target; `num_changed` is asked while it is applied."""
        return self._seen(note, candidate, name, num_changed=num_changed)

    @contextmanager
    def edited(self, plan: Plan, units: Sequence[Unit]) -> Iterator[Model]:
        """The target with some units of another plan of the same models, for the length of a `with` block."""
        before = self.plan
        self.use(plan)
        try:
            with self.live.transplanted(units) as model:
                yield model, self.live.tokenizer
        finally:
            self.use(before)

    @contextmanager
    def untouched(self) -> Iterator[Model]:
        """The target itself."""
        with quiet("transformers"):
            yield self.live.model, self.live.tokenizer

    def alone(self, source: Model) -> Seen:
        """Measure the loaded source."""

        @contextmanager
        def candidate() -> Iterator[Model]:
            yield source

        return self._seen("source", candidate, "source")

    def score(self, units: Sequence[Unit], prompts: PromptSet) -> float:
        """Score an edit on other prompts: DSR, or the score of an evaluator of whole models, less over-refusal."""
        ordered = tuple(in_order(join(self.plan, units)))

        def score() -> float:
            with self.live.transplanted(ordered) as model:
                measured = replace(self.meter, prompts=prompts).measure(model, self.live.tokenizer, ordered)
                found = measured.dsr if measured.score is None else measured.score
                return found - measured.over_refusal

        return float(self.journal.once(note_of("score", ordered), score))

    def has(self, name: str) -> bool:
        """Whether the journal has a note already."""
        return name in self.journal.notes

    def missing(self, note: str) -> list[str]:
        """The notes of a result's figures that the journal has not yet."""
        return [one for one in (note, *(also.note(note) for also in self._also)) if not self.has(one)]

    def answers(self, model: Model, prompts: Sequence[str], name: str) -> list[Response]:
        """Ask a model harmful prompts, and classify its responses, which are not recorded."""
        with task(f"asking the {name}", len(prompts), "prompts"):
            return self.meter.measure(*model).judge("harmful", prompts)

    def _seen(
        self,
        note: str,
        candidate: Callable[[], AbstractContextManager[Model]],
        name: str,
        units: tuple[Unit, ...] = (),
        level: int = logging.INFO,
        num_changed: Callable[[], int] | None = None,
    ) -> Seen:
        lacking = [one for one in self._also if not self.has(one.note(note))]

        def see() -> None:
            # Before anything is transplanted.
            meter, harmless = self._referring, self._harmless if any(one.diverges for one in lacking) else None
            began = time.perf_counter()
            with candidate() as (model, tokenizer):
                made = Candidate(model, tokenizer, units)
                if not self.has(note):
                    measured = measure_candidate(made, meter, name, level)
                    seconds = round(time.perf_counter() - began, 3)
                    counted = {} if num_changed is None else {"changed": num_changed()}
                    self.journal.note(note, {**_noted(measured), "seconds": seconds, **counted})
                for one in lacking:
                    self.journal.note(one.note(note), self._besides(one, made, harmless))

        if missing := self.missing(note):
            self.journal.perform(missing[0], see)
        found = self.journal.notes[note]
        refused, over_refused = (tuple(map(bool, found[kind])) for kind in ("harmful", "harmless"))
        figures, changed = read_figures(found["figures"]), found.get("changed")
        further = tuple(one for also in self._also for one in also.figures(self.journal.notes[also.note(note)]))
        return Seen(figures, refused, over_refused, float(found["seconds"]), changed, further)

    def _besides(self, one: Besides, made: Candidate, harmless: Reference | None) -> list[list[Any]]:
        number = len(one.prompts.harmful) + len(one.prompts.harmless)
        with task(f"asking {one.name}", number, "prompts"), quiet("transformers"):
            if harmless is None or not one.diverges:
                return one.refusals(self.meter, made)
            found = divergence(made.model, harmless, self.meter.batch_size)
            return [["divergence", found if math.isfinite(found) else None, number]]


def _noted(measured: MeasuredModel) -> dict[str, Any]:
    """The journal's entry for a measurement."""
    refusals = {
        kind: [answer.outcome == Outcome.REFUSED.value for answer in measured.responses if answer.kind == kind]
        for kind in PROMPT_KINDS
    }
    return {"figures": jsonable(asdict(measured.figures)), **refusals}
