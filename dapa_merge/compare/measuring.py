"""Figures of the edits of one target, measured live and once: each is in the journal before the next is measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from dapa_merge.checkpoint.units import Unit
from dapa_merge.measure.callback import Candidate
from dapa_merge.measure.evaluators import RULES
from dapa_merge.measure.figures import Figures, Response
from dapa_merge.measure.live import Resident, choose_device, load_model
from dapa_merge.measure.meter import Meter, measure_candidate
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.plan.plan import Plan, join
from dapa_merge.progress import LOG, quiet, task
from dapa_merge.report.report import jsonable, read_figures
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
    """

    figures: Figures
    refused: tuple[bool, ...]
    over_refused: tuple[bool, ...]
    seconds: float
    num_changed: int | None = None


def fast(meter: Meter) -> Meter:
    """A faster meter of the same figures: if only rules judge, a response ends once its outcome is certain."""
    return replace(meter, stops_early=all(one is RULES for one in meter.classifiers))


class Measuring(Resident):
    """Measures edits of one target; models are loaded only if a figure is not in the journal yet."""

    def __init__(self, plan: Plan, meter: Meter, device: str, journal: Journal, *, refers: bool = False) -> None:
        """Load nothing yet; `refers` is whether to measure divergence, for which the target is loaded in any case."""
        where = choose_device(device)
        super().__init__(plan, where, lambda: LOG.info(f"loading the target {plan.target.name}"))
        self.meter = fast(meter)
        self.journal = journal
        self._refers = refers

    @cached_property
    def _referring(self) -> Meter:
        """The meter, with the target's own answers if divergence is measured."""
        if not self._refers:
            return self.meter
        # Blends may have another output layer, as the source may.
        return self.meter.referring(self.live.model, self.live.tokenizer, keeps_logits=True)

    @contextmanager
    def source(self) -> Iterator[Model]:
        """The source alone, loaded for the length of a `with` block."""
        LOG.info(f"loading the source {self.plan.source.name}")
        model, tokenizer = load_model(self.plan.source, self.device)
        with quiet("transformers"):
            yield model, tokenizer

    def edit(self, units: Sequence[Unit], name: str, level: int = logging.INFO) -> Seen:
        """Measure the target with some units of the source, in any order, and log it under a name."""
        # Blocks that add up to a unit are replaced by the unit.
        ordered = tuple(in_order(join(self.plan, units)))

        @contextmanager
        def candidate() -> Iterator[Model]:
            with self.live.transplanted(ordered) as model:
                yield model, self.live.tokenizer

        return self._seen(note_of("edit", ordered), candidate, name, ordered, level)

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
        note = note_of("score", ordered)
        if note not in self.journal.notes:
            with self.live.transplanted(ordered) as model:
                measured = replace(self.meter, prompts=prompts).measure(model, self.live.tokenizer, ordered)
                found = measured.dsr if measured.score is None else measured.score
                self.journal.note(note, found - measured.over_refusal)
        return float(self.journal.notes[note])

    def has(self, name: str) -> bool:
        """Whether the journal has a note already."""
        return name in self.journal.notes

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
        if note not in self.journal.notes:
            # Before anything is transplanted.
            meter = self._referring
            began = time.perf_counter()
            with candidate() as (model, tokenizer):
                measured = measure_candidate(Candidate(model, tokenizer, units), meter, name, level)
                counted = {} if num_changed is None else {"changed": num_changed()}
            refusals = {
                kind: [answer.outcome == Outcome.REFUSED.value for answer in measured.responses if answer.kind == kind]
                for kind in ("harmful", "harmless")
            }
            seconds = round(time.perf_counter() - began, 3)
            noted = jsonable(asdict(measured.figures))
            self.journal.note(note, {"figures": noted, **refusals, "seconds": seconds, **counted})
        found = self.journal.notes[note]
        refused, over_refused = (tuple(map(bool, found[kind])) for kind in ("harmful", "harmless"))
        figures, changed = read_figures(found["figures"]), found.get("changed")
        return Seen(figures, refused, over_refused, float(found["seconds"]), changed)
