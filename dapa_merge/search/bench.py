"""The test bench: a resident target, and the figures and verdicts of its candidates, tested here or in workers."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import UsageError
from dapa_merge.measure.evaluators import RULES
from dapa_merge.measure.figures import Response
from dapa_merge.measure.live import Resident, choose_device
from dapa_merge.measure.meter import Measurement, Meter, search_meter
from dapa_merge.measure.placement import is_spread, spread_over
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.plan.plan import Plan
from dapa_merge.plan.selection import open_plan, with_pinned_models
from dapa_merge.progress import LOG, task
from dapa_merge.recipe.constraints import Constraint
from dapa_merge.recipe.options import Options, Where
from dapa_merge.recipe.parameters import spans
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.cluster import Actors, Shared
from dapa_merge.search.journal import Journal, MarkedJournal
from dapa_merge.search.requirement import (
    DIVERGENCE_KEY,
    PROMPT_KINDS,
    Examiner,
    Requirement,
    Verdict,
    constraints_of,
    settings_of,
)
from dapa_merge.search.result import Baseline
from dapa_merge.search.workers import RayWorkers, Selection, Test, Workers, in_order

# A verdict can stop early only between two pieces, and each piece, however small, costs a run through the model's
# layers per token.
MIN_PIECES = 2
# Prompts of a baseline that are run at once: a processor takes half as long for each as for those of a small piece. If
# the job is stopped, they are run again.
AT_ONCE = 64
LIMITED_JUDGE = "workers do not share a limit of requests to the judge; leave out --workers or the limit"


class Bench(Resident):
    """A target that is loaded on first use, and measured with one meter.

    Attributes:
        constraints: The active ones, as the meter measures their figures; the score's first.
    """

    def __init__(
        self,
        plan: Plan,
        meter: Meter,
        device: str | Where,
        settings: Collection[str],
        on_load: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a bench; `settings` are the keys of the active constraints. A device alone is the only one."""
        super().__init__(plan, device if isinstance(device, Where) else choose_device(device), on_load)
        self.meter = meter
        self.constraints = self._constraints(settings)
        self._pieces = {kind: pieces_of(getattr(meter.prompts, kind), meter.batch_size.limit) for kind in PROMPT_KINDS}
        self._examiner: Examiner | None = None

    def measure_all(self) -> None:
        """Measure divergence and, if answers to keep prompts are known, skill from now on, limited or not."""
        self.meter = self.meter.asking_keep()
        keys = {one.key for one in self.constraints} | {DIVERGENCE_KEY}
        self.constraints = self._constraints(keys | ({"min_skill"} if self.meter.skills else set()))
        self.__dict__.pop("_referring", None)

    def _constraints(self, settings: Collection[str]) -> tuple[Constraint, ...]:
        return constraints_of(settings, self.measure, is_whole=self.meter.scorer is not None)

    @property
    def measure(self) -> str:
        """The name of a candidate's score."""
        classifier = self.meter.classifiers[0]
        if self.meter.scorer is not None:
            return self.meter.scorer.name
        return "DSR" if classifier is RULES else f"DSR by {classifier.name}"

    @property
    def device_kind(self) -> str:
        """The name of the device's kind; devices of one kind give the same verdicts."""
        if (devices := spread_over(self.plan.target, self.where)) is not None:
            return devices
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def sizes(self) -> dict[str, list[int]]:
        """The number of prompts in each piece, by kind."""
        return {kind: [len(piece) for piece in pieces] for kind, pieces in self._pieces.items()}

    @property
    def num_of_kind(self) -> dict[str, int]:
        """The number of prompts of each kind."""
        return {kind: sum(sizes) for kind, sizes in self.sizes.items()}

    @property
    def num_scored(self) -> int:
        """The number of prompts that a score is a share of; 0 if it is none."""
        return self.num_of_kind.get(self.constraints[0].kind or "", 0)

    @property
    def num_prompts(self) -> int:
        """The number of prompts in a full examination."""
        checks = {constraint.check for constraint in self.constraints}
        num_questions = sum(skill.num_questions for skill in self.meter.skills)
        return sum(self.num_of_kind.get(check, 0) for check in checks) + num_questions

    @cached_property
    def _referring(self) -> Meter:
        """The meter, with the target's own answers if a constraint compares with them."""
        if not any(one.refers for one in self.constraints):
            return self.meter
        return self.meter.referring(self.live.model, self.live.tokenizer)

    def require(self, requirement: Requirement) -> Examiner:
        """Set the requirement for candidates."""
        costs = {constraint.check: constraint.cost(self.meter) for constraint in self.constraints}
        self._examiner = Examiner(requirement, self.sizes, costs)
        return self._examiner

    def baseline(
        self, selection: Iterable[Unit], journal: Journal | MarkedJournal | None = None, name: str = "", what: str = ""
    ) -> Baseline:
        """The figures of all constraints for the target with a selection transplanted.

        Args:
            selection: The units.
            journal: Each piece of prompts and each other figure is in it before the next is measured, and only those
                that it lacks are measured.
            name: Of the measurement in the journal.
            what: The measurement as progress shows it; empty if the caller shows it.
        """
        journal = Journal() if journal is None else journal
        wanted = {f"{name}: {piece}": one for piece, one in self._measurements.items()}
        self._measure(wanted, selection, journal, what)
        responses: dict[str, list[Response]] = {kind: [] for kind in PROMPT_KINDS}
        for piece, one in wanted.items():
            if one.piece is not None:
                responses[one.piece[0]] += _responses_in(journal, piece)
        figures = {
            limited.figure: journal.pieces[f"{name}: {limited.figure}"]
            if limited.kind is None
            else _share(limited, responses[limited.kind])
            for limited in self.constraints
        }
        return Baseline(figures, tuple(responses["harmful"]))

    def _measure(
        self, wanted: Mapping[str, _Measurement], selection: Iterable[Unit], journal: Journal | MarkedJournal, what: str
    ) -> None:
        """Make the measurements of a selection that the journal lacks, whose names there are the keys."""
        missing = {piece: one for piece, one in wanted.items() if piece not in journal.pieces}
        if missing:
            total = sum(one.num_prompts for one in missing.values())
            refers = any(one.refers for one in missing.values())
            shown = task(what, total, "prompts") if what else nullcontext()
            with shown, self._candidate(selection, refers=refers) as candidate:
                candidate.wanted = [one.piece for one in missing.values() if one.piece is not None]
                for piece, one in missing.items():
                    began = time.monotonic()
                    value = one.make(candidate)
                    journal.piece(piece, value, time.monotonic() - began)

    def recorded(self, journal: Journal | MarkedJournal, name: str, selection: Sequence[Unit], what: str) -> Baseline:
        """The `baseline` of a selection from a journal's note of this name; if absent, it is measured and noted."""
        if name not in journal.notes:
            journal.note(name, self.baseline(selection, journal, name, f"measuring {what}").to_json())
        return Baseline.from_json(journal.notes[name])

    def recorded_score(
        self, journal: Journal, name: str, selection: Sequence[Unit], what: str, *, is_begun: bool = False
    ) -> tuple[float, float]:
        """Two bounds of the score of such a baseline; if the note is absent, only what that takes is measured.

        Args:
            journal: Where the note is or the pieces are.
            name: Of the note.
            selection: The units.
            what: The measurement as progress shows it.
            is_begun: Measure only the first piece of the prompts that the score is a share of; else the bounds are the
                same.
        """
        if name in journal.notes:
            return (Baseline.from_json(journal.notes[name]).score,) * 2
        limited = self.constraints[0]
        wanted = {
            f"{name}: {piece}": one
            for piece, one in self._measurements.items()
            if (piece == limited.figure if one.piece is None else one.piece[0] == limited.kind)
        }
        if is_begun:
            wanted = dict(list(wanted.items())[:1])
        self._measure(wanted, selection, journal, f"measuring {what}")
        if limited.kind is None:
            return (float(journal.pieces[f"{name}: {limited.figure}"]),) * 2
        found = [response for piece in wanted for response in _responses_in(journal, piece)]
        number, num_counted = self.num_scored, sum(map(limited.counts, found))
        return num_counted / number, (num_counted + number - len(found)) / number

    @property
    def _measurements(self) -> dict[str, _Measurement]:
        """What a baseline consists of, by the names of its pieces, in the order of the constraints."""
        found: dict[str, _Measurement] = {}
        num_questions = sum(skill.num_questions for skill in self.meter.skills)
        for one in self.constraints:
            if one.kind is None:
                number = num_questions if one.figure == "skill" else 0
                found[one.figure] = _Measurement(functools.partial(_figure_of, one), None, number, one.refers)
            else:
                found |= self._of_kind(one.kind)
        return found | self._of_kind("harmful")

    def _of_kind(self, kind: str) -> dict[str, _Measurement]:
        pieces = self._pieces[kind]
        return {
            f"{kind} {number + 1} of {len(pieces)}": _Measurement(
                functools.partial(_responses_of, kind, number), (kind, number), len(piece)
            )
            for number, piece in enumerate(pieces)
        }

    def score(self, selection: Iterable[Unit]) -> float:
        """The score of the target with a selection transplanted, measured as every test measures it."""
        with self._candidate(selection) as candidate:
            return candidate.figure(self.constraints[0])

    def examine(self, selection: Iterable[Unit], *, stop_early: bool = True) -> Verdict:
        """Whether the target with a selection transplanted meets the requirement."""
        assert self._examiner is not None, "require first"
        with self._candidate(selection) as candidate:
            return self._examiner.examine(candidate, stop_early=stop_early)

    @contextmanager
    def _candidate(self, selection: Iterable[Unit], *, refers: bool = True) -> Iterator[_LiveExaminee]:
        units = tuple(selection)
        # Before anything is transplanted.
        meter = self._referring if refers else self.meter
        with self.live.transplanted(units) as model:
            measurement = meter.measure(model, self.live.tokenizer, units)
            yield _LiveExaminee(measurement, self._pieces)


class _LiveExaminee:
    """A measurement that is made piece by piece.

    Attributes:
        wanted: The pieces, each given by its kind and number, of which some are run together, in this order.
    """

    def __init__(self, measurement: Measurement, pieces: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
        self._measurement = measurement
        self._pieces = pieces
        self._judged: dict[tuple[str, int], list[Response]] = {}
        self.wanted: Sequence[tuple[str, int]] = ()

    def responses(self, kind: str, piece: int) -> list[Response]:
        if (kind, piece) not in self._judged:
            asked = self._together(kind, piece)
            found = self._measurement.judge_all([(one, self._pieces[one][number]) for one, number in asked])
            self._judged |= dict(zip(asked, found, strict=True))
        return self._judged[kind, piece]

    def _together(self, kind: str, piece: int) -> list[tuple[str, int]]:
        """A piece, and as many of those that are wanted with it as are run at once."""
        asked = [(kind, piece)]
        total = len(self._pieces[kind][piece])
        for one in self.wanted:
            if one in self._judged or one in asked:
                continue
            if (total := total + len(self._pieces[one[0]][one[1]])) > AT_ONCE:
                break
            asked.append(one)
        return asked

    def all_responses(self, kind: str) -> list[Response]:
        return [response for index in range(len(self._pieces[kind])) for response in self.responses(kind, index)]

    def figure(self, constraint: Constraint) -> float:
        if constraint.kind is None:
            return constraint.of(self._measurement)
        return _share(constraint, self.all_responses(constraint.kind))


@dataclass(frozen=True)
class _Measurement:
    """A piece of a baseline.

    Attributes:
        make: Measures it, as plain data.
        piece: The kind and number of the prompts whose responses it is; None for a figure.
        num_prompts: That are asked.
        refers: Whether it compares with the target's own answers.
    """

    make: Callable[[_LiveExaminee], Any]
    piece: tuple[str, int] | None
    num_prompts: int
    refers: bool = False


def _figure_of(constraint: Constraint, candidate: _LiveExaminee) -> float:
    return candidate.figure(constraint)


def _responses_of(kind: str, piece: int, candidate: _LiveExaminee) -> list[dict[str, Any]]:
    return [asdict(response) for response in candidate.responses(kind, piece)]


def _responses_in(journal: Journal | MarkedJournal, piece: str) -> list[Response]:
    return [Response.from_json(said) for said in journal.pieces[piece]]


def _share(constraint: Constraint, responses: Sequence[Response]) -> float:
    """The share of responses that a constraint counts."""
    return sum(map(constraint.counts, responses)) / len(responses)


def pieces_of(prompts: Sequence[str], batch_size: int) -> tuple[tuple[str, ...], ...]:
    """Split prompts into fixed pieces of at most a batch, each a sample of the whole set."""
    num_pieces = min(max(math.ceil(len(prompts) / batch_size), MIN_PIECES), len(prompts))
    return tuple(tuple(prompts[start::num_pieces]) for start in range(num_pieces))


def make_bench(recipe: Recipe, plan: Plan, prompts: PromptSet, options: Options) -> Bench:
    """The test bench of a recipe.

    Raises:
        UsageError: If the recipe's evaluator or the device is absent, or workers cannot share the evaluator.
    """
    if options.uses_ray and recipe.evaluator == "judge" and options.judge_requests is not None:
        raise UsageError(LIMITED_JUDGE)
    meter = search_meter(recipe, prompts, options, plan.models.values())
    told = functools.partial(LOG.info, f"loading the target, {plan.target.name}")
    return Bench(plan, meter, options.where, settings_of(recipe), told)


def start_workers(recipe: Recipe, plan: Plan, bench: Bench, limits: Requirement, options: Options) -> Workers:
    """Start the testing of a search's selections, here or in workers; the caller closes it."""
    if not options.uses_ray:
        return InProcess(bench)
    return workers_in(start_actors(recipe, plan, bench, options), plan, limits, owns=True)


def workers_in(actors: Actors, plan: Plan, limits: Requirement, *, owns: bool = False) -> Workers:
    """Test selections of a plan in actors; `owns` as for `RayWorkers`."""
    return RayWorkers(actors, functools.partial(ExamineSelection, actors.share(plan.edit), limits), owns=owns)


def start_actors(recipe: Recipe, plan: Plan, bench: Bench, options: Options) -> Actors:
    """Start Ray actors with a bench like this one each; their arguments are `Work`."""
    # Workers on other machines must load exactly these weights, even hours later.
    # A model that does not fit on one device does not fit on a worker's either.
    kind = options.device if is_spread(plan.target, options.where) else bench.device.type
    recipe, theirs = with_pinned_models(recipe, plan), options.for_worker(kind)
    make = functools.partial(_make_hand, recipe, bench.meter.prompts, theirs)
    return Actors(make, options.num_workers, uses_gpu=bench.device.type == "cuda")


class Work(Protocol):
    """What a worker does."""

    def do(self, hand: Hand) -> Any:
        """Do it with the worker's own model."""


@dataclass
class Hand:
    """A worker's own: a bench, and what it keeps from one piece of work to the next.

    Attributes:
        kept: With what it was made for, by the names of those who keep it.
    """

    bench: Bench
    kept: dict[str, tuple[object, Any]] = field(default_factory=dict)

    def __call__(self, work: Work) -> Any:
        """Do a piece of work."""
        return work.do(self)

    def once(self, name: str, key: object, make: Callable[[], Any]) -> Any:
        """What was made under a name for the same key, or else is made now."""
        if name not in self.kept or self.kept[name][0] != key:
            self.kept.pop(name, None)
            self.kept[name] = key, make()
        return self.kept[name][1]

    def use(self, edit: Shared) -> Bench:
        """The bench with an edit, which may have chosen what it adds."""
        self.bench.use(replace(self.bench.plan, edit=self.once("edit", edit, edit.get)))
        return self.bench


def _make_hand(recipe: Recipe, prompts: PromptSet, options: Options, num_threads: int) -> Hand:
    """Make what does a worker's work, and load its target; called in the worker."""
    torch.set_num_threads(num_threads)
    plan = open_plan(recipe, allow_pickle=options.allow_pickle)
    hand = Hand(make_bench(recipe, plan, prompts, options))
    _ = hand.bench.live
    return hand


@dataclass(frozen=True)
class ExamineSelection:
    """Tests a selection of an edit."""

    edit: Shared
    limits: Requirement
    selection: Selection

    def do(self, hand: Hand) -> Test:
        """The outcome, as a journal has it."""
        bench = hand.use(self.edit)
        # What tends to go wrong is remembered as long as the limits are the same.
        hand.once("limits", repr(self.limits), lambda: bench.require(self.limits))
        return _test(bench, self.selection)


@dataclass(frozen=True)
class MeasureSelection:
    """Measures all figures of a selection of an edit."""

    edit: Shared
    selection: tuple[Unit, ...]

    def do(self, hand: Hand) -> dict[str, Any]:
        """A baseline, as a journal has it."""
        return hand.use(self.edit).baseline(self.selection).to_json()


def _test(bench: Bench, selection: Selection) -> Test:
    began = time.monotonic()
    verdict = bench.examine(in_order(selection))
    return {**asdict(verdict), "seconds": round(time.monotonic() - began, 3)}


class InProcess:
    """Tests one selection at a time, in this process."""

    number = 1
    is_away = False

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.running: list[Selection] = []

    def submit(self, selection: Selection) -> None:
        self.running.append(selection)

    def wait(self) -> tuple[Selection, Test]:
        selection = self.running.pop()
        with task(f"testing {spans(in_order(selection))}", self._bench.num_prompts, "prompts"):
            return selection, _test(self._bench, selection)

    def close(self) -> None:
        """Do nothing: the bench is closed by its owner."""
