"""The test bench: the resident target, and what a search wants to know of it and of its candidates.

What a search rests on: the figures of the target and its full transplant, the requirement, and the prior.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dapa_merge.checkpoint.units import AUTO_MODULES, Unit
from dapa_merge.errors import CannotRepair, CheckpointError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.evaluators import RULES
from dapa_merge.measure.figures import Response
from dapa_merge.measure.live import LiveModel, Resident, choose_device
from dapa_merge.measure.meter import Measurement, Meter
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import LOG, task
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.attribution import Contrast, attribute
from dapa_merge.search.journal import Journal
from dapa_merge.search.requirement import PROMPT_KINDS, Examiner, Requirement, Verdict, requirement

# A verdict can stop early between two pieces only, and each piece costs a run through the model's layers per token,
# however small it is.
MIN_PIECES = 2
# How many tokens of a response come of one run through the model, roughly, most of them having been drafted.
TOKENS_FOR_EACH_RUN = 8
# Of the prior: how many prompts are weighed, and how many responses at once.
MAX_CONTRASTS = 32
MAX_BACKWARD = 8


@dataclass(frozen=True)
class Baseline:
    """What a search measures in full: the target, and its full transplant.

    Attributes:
        score: The DSR on the search's prompts, or what the evaluator gives the model as a whole; in [0, 1].
        over_refusal: In [0, 1], on the search's prompts.
        perplexity: NaN if the set has no passages.
        responses: To the harmful prompts.
    """

    score: float
    over_refusal: float
    perplexity: float
    responses: tuple[Response, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for the journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Baseline:
        """The same baseline again."""
        return cls(**{**data, "responses": tuple(Response(**response) for response in data["responses"])})


class Bench(Resident):
    """A target that is loaded when it is first needed, and asked with one meter.

    Attributes:
        plan: Target and source.
        meter: What is asked.
        device: Where the target is asked.
    """

    def __init__(self, plan: Plan, meter: Meter, device: str, on_load: Callable[[], None] = lambda: None) -> None:
        super().__init__(plan, choose_device(device), on_load)
        self.meter = meter
        self._pieces = {kind: pieces_of(getattr(meter.prompts, kind), meter.batch_size.limit) for kind in PROMPT_KINDS}
        self._examiner: Examiner | None = None

    @property
    def measure(self) -> str:
        """What a candidate's score is."""
        classifier = self.meter.classifiers[0]
        if self.meter.scorer is not None:
            return self.meter.scorer.name
        return "DSR" if classifier is RULES else f"DSR by {classifier.name}"

    @property
    def evaluator(self) -> str:
        """Everything of the evaluator that decides a verdict."""
        return self.meter.identity

    @property
    def device_kind(self) -> str:
        """What the device is, where another of its kind would give the same verdicts."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def sizes(self) -> dict[str, list[int]]:
        """The numbers of prompts in the pieces of each kind."""
        return {kind: [len(piece) for piece in pieces] for kind, pieces in self._pieces.items()}

    @property
    def num_prompts(self) -> int:
        """How many prompts a full examination asks."""
        return sum(sum(sizes) for kind, sizes in self.sizes.items() if kind in costs_of(self.meter))

    def require(self, requirement: Requirement) -> Examiner:
        """Set what candidates must meet."""
        self._examiner = Examiner(requirement, self.sizes, costs_of(self.meter))
        return self._examiner

    def baseline(self, selection: Iterable[Unit]) -> Baseline:
        """All figures that a requirement is about, of the target with a selection transplanted."""
        with self._candidate(selection) as candidate:
            return Baseline(
                candidate.score,
                candidate.share_refused("harmless"),
                candidate.perplexity,
                tuple(itertools.chain.from_iterable(candidate.judged("harmful"))),
            )

    def score(self, selection: Iterable[Unit]) -> float:
        """The score of the target with a selection transplanted, measured as every test measures it."""
        with self._candidate(selection) as candidate:
            return candidate.score

    def attribute(
        self, units: Sequence[Unit], target: Sequence[Response], full: Sequence[Response]
    ) -> dict[Unit, float]:
        """How much each unit matters, to first order, where the full transplant refuses and the target does not.

        Args:
            units: Of the plan, or blocks of its units.
            target: The target's responses to the harmful prompts.
            full: The full transplant's, in the same order.

        Raises:
            ValueError: If no prompt tells the two apart.
            CheckpointError: If an effect is not a finite number.
        """
        return effects_between(self.live, units, target, full, self.meter.batch_size.limit)

    def examine(self, selection: Iterable[Unit], *, stop_early: bool = True) -> Verdict:
        """Whether the target with a selection transplanted meets the requirement."""
        assert self._examiner is not None, "require first"
        with self._candidate(selection) as candidate:
            return self._examiner.examine(candidate, stop_early=stop_early)

    @contextmanager
    def _candidate(self, selection: Iterable[Unit]) -> Iterator[_LiveExaminee]:
        units = tuple(selection)
        with self.live.transplanted(units) as model:
            measurement = self.meter.measure(model, self.live.tokenizer, units)
            yield _LiveExaminee(measurement, self._pieces)


class _LiveExaminee:
    """A measurement, seen piece by piece."""

    def __init__(self, measurement: Measurement, pieces: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
        self._measurement = measurement
        self._pieces = pieces
        self._judged: dict[tuple[str, int], list[Response]] = {}

    def judged(self, kind: str) -> list[list[Response]]:
        return [self._judge(kind, index) for index in range(len(self._pieces[kind]))]

    def refused(self, kind: str, piece: int) -> list[bool]:
        return [response.outcome == Outcome.REFUSED.value for response in self._judge(kind, piece)]

    def share_refused(self, kind: str) -> float:
        refusals = [refused for index in range(len(self._pieces[kind])) for refused in self.refused(kind, index)]
        return sum(refusals) / len(refusals)

    @property
    def perplexity(self) -> float:
        return self._measurement.perplexity

    @property
    def score(self) -> float:
        """The evaluator's, of the model as a whole, if it gives one; else the DSR."""
        score = self._measurement.score
        return self.share_refused("harmful") if score is None else score

    def _judge(self, kind: str, piece: int) -> list[Response]:
        if (kind, piece) not in self._judged:
            self._judged[kind, piece] = self._measurement.judge(kind, self._pieces[kind][piece])
        return self._judged[kind, piece]


def effects_between(
    live: LiveModel,
    units: Sequence[Unit],
    answering: Sequence[Response],
    refusing: Sequence[Response],
    batch_limit: int,
) -> dict[Unit, float]:
    """How much each unit matters, to first order, where one model refuses and the live one does not.

    Args:
        live: The target.
        units: Of its plan, or blocks of its units.
        answering: The target's responses to some prompts.
        refusing: The other model's, in the same order.
        batch_limit: How many responses fit at once where nothing is kept for a backward pass.

    Raises:
        ValueError: If no prompt tells the two apart.
        CheckpointError: If an effect is not a finite number.
    """
    refused = Outcome.REFUSED.value
    contrasts = [
        Contrast(after.prompt, refusing=after.response, complying=before.response)
        for before, after in zip(answering, refusing, strict=True)
        if before.outcome != refused and after.outcome == refused
    ]
    # A few contrasts tell as much as many, and a backward pass needs far more memory than the answers did.
    few = contrasts[:: max(1, math.ceil(len(contrasts) / MAX_CONTRASTS))]
    batch_size = BatchSize(min(MAX_BACKWARD, batch_limit))
    return attribute(live, few, units=units, batch_size=batch_size)


def pieces_of(prompts: Sequence[str], batch_size: int) -> tuple[tuple[str, ...], ...]:
    """The fixed pieces in which prompts are asked: at most a batch each, and every one a sample of the whole set."""
    num_pieces = min(max(math.ceil(len(prompts) / batch_size), MIN_PIECES), len(prompts))
    return tuple(tuple(prompts[start::num_pieces]) for start in range(num_pieces))


def costs_of(meter: Meter) -> dict[str, float]:
    """The checks of a candidate, and what they cost in runs through the model's layers.

    A piece of prompts, the whole perplexity, and the score of an evaluator that scores the candidate as a whole.
    """
    num_batches = math.ceil(len(meter.prompts.passages) / meter.batch_size.limit)
    # One for the prompts.
    piece = 1 + meter.max_new_tokens / TOKENS_FOR_EACH_RUN
    # What an evaluator of the user's own costs is unknown; it is taken for as much.
    main = "harmful" if meter.scorer is None else "score"
    return {"perplexity": float(num_batches), main: piece, "harmless": piece}


def measure_baseline(name: str, units: Sequence[Unit], recipe: Recipe, bench: Bench, journal: Journal) -> Baseline:
    """All figures of the target with some units, from the journal if they are there.

    Raises:
        CheckpointError: If the model computes no numbers.
    """
    if name not in journal.notes:
        with task(f"measuring the {name}", bench.num_prompts, "prompts"):
            journal.note(name, bench.baseline(units).to_json())
    baseline = Baseline.from_json(journal.notes[name])
    LOG.info(f"the {name}: {bench.measure} {baseline.score:.3f}, over-refusal {baseline.over_refusal:.3f}")
    if baseline.perplexity == math.inf:
        model = f"the target {recipe.target}" + (f" with every unit of the source {recipe.source}" if units else "")
        raise CheckpointError(f"{model} computes infinities or no numbers at all; its weights are damaged")
    return baseline


def make_requirement(recipe: Recipe, plan: Plan, target: Baseline, full: Baseline, measure: str) -> Requirement:
    """What a recipe's selection must meet; `measure` is what its score is.

    Raises:
        CannotRepair: If the full transplant makes nothing better, or breaks a limit.
    """
    modules = ", ".join(recipe.modules)
    more = "; other modules may: try `modules: auto`" if set(recipe.modules) < set(AUTO_MODULES) else ""
    if full.score <= target.score:
        raise CannotRepair(
            f"the source {recipe.source} cannot repair this target through its modules {modules}: with all "
            f"{len(plan.units)} units transplanted the {measure} is {full.score:.3f}, and without them "
            f"{target.score:.3f}{more}"
        )
    limits = requirement(
        target,
        full,
        retain=recipe.retain,
        max_over_refusal=recipe.max_over_refusal,
        max_perplexity=recipe.max_perplexity,
        measure=measure,
    )
    if complaint := limits.complaint(full):
        raise CannotRepair(
            f"the source {recipe.source} cannot repair this target within the recipe's limits: even with every unit "
            f"({modules}) {complaint}"
        )
    return limits


def weigh(
    units: Sequence[Unit], name: str, target: Baseline, full: Baseline, bench: Bench, journal: Journal
) -> Mapping[Unit, float] | None:
    """Attribution's scores; from the journal if they are there, because a search must take the same way again.

    Returns:
        A score for each unit; None if they cannot be weighed.
    """
    from dapa_merge.measure.decode import DoesNotFit

    scores = journal.notes.get(name, {})
    # A search with another outcome before may have weighed blocks of other units.
    if scores is not None and not all(str(unit) in scores for unit in units):
        scores = None
        try:
            with task("weighing the units by one backward pass", 2 * MAX_CONTRASTS, "responses"):
                found = bench.attribute(units, target.responses, full.responses)
            scores = {str(unit): score for unit, score in found.items()}
        except (ValueError, CheckpointError, DoesNotFit) as error:
            LOG.info(f"searching without a prior, because {error}")
        journal.note(name, scores)
    return None if scores is None else {unit: scores[str(unit)] for unit in units}
