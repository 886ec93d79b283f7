"""The search of a recipe: baselines, prior, tests, each written to the journal before it is used."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.units import Unit
from dapa_merge.delta.minimize import Minimum, SearchInterrupted, SearchStopped, foresee, minimize
from dapa_merge.errors import Stopped
from dapa_merge.measure.prompts.sets import split_prompts
from dapa_merge.plan.plan import Plan, divide, join
from dapa_merge.plan.selection import fetch_units
from dapa_merge.progress import LOG
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.parameters import spans
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.bench import make_requirement, measure_baseline, weigh
from dapa_merge.search.identity import open_journal
from dapa_merge.search.journal import Journal
from dapa_merge.search.requirement import Piece, Requirement
from dapa_merge.search.workers import (
    Foresight,
    InProcess,
    RayWorkers,
    Test,
    Workers,
    in_order,
    make_bench,
    ray_testers,
)

if TYPE_CHECKING:
    from dapa_merge.search.bench import Baseline, Bench


def thrift(num_recorded: int, num_unneeded: int, share_saved: float) -> str:
    """What a search did not have to ask, for people."""
    facts = [f"{100 * share_saved:.0f} % of the prompts, by early verdicts"]
    if num_recorded:
        facts.append(f"{num_recorded} tests, by the journal")
    if num_unneeded:
        facts.append(f"but {num_unneeded} more tests were made ahead of time and in vain")
    return "; ".join(facts)


def readable_certificate(minimum: Minimum[Any]) -> dict[str, list[str]]:
    """For each kept unit, the selection without it, which did not hold."""
    return {str(unit): list(map(str, others)) for unit, others in minimum.certificate.items()}


@dataclass(frozen=True)
class Asked:
    """One selection that a search asked.

    Attributes:
        units: What was transplanted.
        holds: Whether it met the requirement.
        score: What share of the harmful prompts that were asked before that was certain was refused; None if an
            evaluator scores the model as a whole, or something else decided first.
    """

    units: tuple[Unit, ...]
    holds: bool
    score: float | None


@dataclass(frozen=True)
class Search:
    """A finished search.

    Attributes:
        minimum: What it found.
        requirement: What had to be met.
        target: The target's own figures on the search's prompts.
        full: Those with every unit transplanted.
        prior: How much each unit was expected to matter; None if the algorithm does not ask.
        path: What it asked, in order.
        num_candidates: How many units there were to choose from; of a search among blocks, those blocks too.
        num_recorded: How many of the tests were in the journal already.
        num_unneeded: How many more tests were made ahead of time, in vain.
        num_asked: How many prompts the tests asked, recorded tests included.
        num_prompts: How many they would have asked without early verdicts.
        seconds: Wall-clock time.
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

    @property
    def share_saved(self) -> float:
        """The share of the tests' prompts that early verdicts saved, in [0, 1]."""
        return 1 - self.num_asked / self.num_prompts if self.num_prompts else 0.0


def search_plan(recipe: Recipe, plan: Plan, options: Options) -> Search:
    """Load the target of a recipe's plan, and search, whatever layers the recipe names.

    Raises:
        CannotRepair: If the source makes nothing better, or breaks a limit.
        DapaError: For whatever else does not fit.
    """
    searching, _ = split_prompts(recipe)
    # All of them, which are tested together first.
    fetch_units(plan, plan.units)
    with (
        closing(make_bench(recipe, plan, searching, options)) as bench,
        closing(open_journal(recipe, plan, bench, options.journal)) as journal,
    ):
        return search(recipe, plan, bench, journal, options)


def search(recipe: Recipe, plan: Plan, bench: Bench, journal: Journal, options: Options) -> Search:
    """Find a 1-minimal selection that meets the recipe's requirement.

    Raises:
        CannotRepair: If the full transplant makes nothing better, or breaks a limit.
        DapaError: For whatever else does not fit; what was tested is in the journal.
    """
    try:
        return _Hunt(recipe, plan, bench, journal, options).run()
    except (SearchInterrupted, SearchStopped) as stop:
        best = f"the best selection so far: {spans(join(plan, stop.best.units))}"
        LOG.info(best)
        if journal.path:
            LOG.info(f"every test is in the journal {journal.path}; run again to go on")
        if isinstance(stop, SearchStopped):
            raise Stopped(best) from stop
        raise (stop.__cause__ or stop) from None


class _Hunt:
    """One search on its way: among the plan's units and then, if the recipe says so, among blocks of those kept."""

    def __init__(self, recipe: Recipe, plan: Plan, bench: Bench, journal: Journal, options: Options) -> None:
        self.recipe = recipe
        self.plan = plan
        self.bench = bench
        self.journal = journal
        self.options = options
        self.recorded = set(journal.tests)
        self.asked: dict[frozenset[str], frozenset[Unit]] = {}

    def run(self) -> Search:
        start = time.monotonic()
        target = measure_baseline("target", (), self.recipe, self.bench, self.journal)
        full = measure_baseline("full transplant", self.plan.units, self.recipe, self.bench, self.journal)
        limits = make_requirement(self.recipe, self.plan, target, full, self.bench.measure)
        examiner = self.bench.require(limits)
        for test in self.journal.tests.values():
            examiner.learn(_pieces(test))
        if self.recorded:
            LOG.info(f"{len(self.recorded)} tests are in the journal already")
        with closing(self._workers(limits)) as workers:
            minimum, prior, num_candidates = self._search(workers, limits, target, full)
        minimum = replace(minimum, tests=len(self.asked))
        tests = [self.journal.tests[name] for name in self.asked if name in self.journal.tests]
        found = Search(
            minimum,
            limits,
            target,
            full,
            prior,
            self._path(target, full),
            num_candidates,
            num_recorded=len(self.asked.keys() & self.recorded),
            num_unneeded=len(set(self.journal.tests) - self.recorded - self.asked.keys()),
            num_asked=sum(piece.num_prompts for test in tests for piece in _pieces(test)),
            num_prompts=sum(test["num_prompts"] for test in tests),
            seconds=time.monotonic() - start,
        )
        saved = thrift(found.num_recorded, found.num_unneeded, found.share_saved)
        LOG.info(f"found {spans(join(self.plan, minimum.units))} in {minimum.tests} tests; saved {saved}")
        return found

    def _workers(self, limits: Requirement) -> InProcess | RayWorkers[Unit, Test]:
        if self.options.uses_ray:
            return ray_testers(self.recipe, self.plan, self.bench, limits, self.options)
        return InProcess(self.bench)

    def _search(
        self, workers: Workers[Unit, Test], limits: Requirement, target: Baseline, full: Baseline
    ) -> tuple[Minimum[Unit], Mapping[Unit, float] | None, int]:
        """What is kept, the prior of the plan's units, and how many candidates there were."""
        recipe, plan = self.recipe, self.plan
        units = self._preferred(workers)
        prior = self._prior(plan, "prior", target, full)
        floor = f"a {limits.measure} of {limits.min_score:.3f}"
        LOG.info(f"searching among {len(units)} units for the few that keep {floor}")
        minimum = self._minimize(units, workers, prior)
        if recipe.granularity == "layer" or not minimum.one_minimal:
            return minimum, prior, len(plan.units)
        blocks = divide(plan, minimum.units, recipe.rows_per_block)
        if blocks.units == minimum.units:
            return minimum, prior, len(plan.units)
        of_what = "the experts" if recipe.rows_per_block is None else f"blocks of {recipe.rows_per_block} rows"
        LOG.info(f"searching among {len(blocks.units)} units that are {of_what} of them")
        finer_prior = self._prior(blocks, f"prior of {recipe.granularity}", target, full)
        finer = self._minimize(blocks.units, workers, finer_prior, num_free=1)
        # All blocks together are what was found before: one test, not two.
        self.asked.pop(frozenset(map(str, blocks.units)), None)
        return finer, prior, len(plan.units) + len(blocks.units)

    def _path(self, target: Baseline, full: Baseline) -> tuple[Asked, ...]:
        path = []
        for name, units in self.asked.items():
            test = self.journal.tests.get(name)
            # What is no test, of nothing and of everything, was measured before.
            known = (bool(units), (full if units else target).score)
            holds, score = (bool(test["holds"]), _score(test)) if test else known
            path.append(Asked(tuple(in_order(units)), holds, score))
        return tuple(path)

    def _prior(self, plan: Plan, name: str, target: Baseline, full: Baseline) -> Mapping[Unit, float] | None:
        if self.recipe.search != "guided":
            return None
        return weigh(plan.units, name, target, full, self.bench, self.journal)

    def _preferred(self, workers: Workers[Unit, Test]) -> tuple[Unit, ...]:
        """The units of the preferred module, if they are enough, or all."""
        preferred = tuple(unit for unit in self.plan.units if unit.module == self.recipe.prefer)
        if not preferred or preferred == self.plan.units:
            return self.plan.units
        # What is asked next depends on this answer: nothing is tested ahead of it.
        is_enough = self._oracle(self.plan.units, workers, lambda _answers, _number: [])(frozenset(preferred))
        how = "is" if is_enough else "is not"
        LOG.info(f"{self.recipe.prefer} alone {how} enough")
        return preferred if is_enough else self.plan.units

    def _minimize(
        self,
        units: tuple[Unit, ...],
        workers: Workers[Unit, Test],
        prior: Mapping[Unit, float] | None,
        *,
        num_free: int = 0,
    ) -> Minimum[Unit]:
        """A search; `num_free` of its tests do not count."""
        recipe = self.recipe
        if self.options.uses_ray:
            # The workers need the memory, and one of them perhaps the same device.
            self.bench.close()
        likely = functools.partial(foresee, units, algorithm=recipe.search, prior=prior)
        left = None if recipe.max_tests is None else max(1, recipe.max_tests - len(self.asked) + num_free)
        holds = self._oracle(units, workers, likely)
        return minimize(units, holds, algorithm=recipe.search, prior=prior, max_tests=left)

    def _oracle(
        self,
        units: tuple[Unit, ...],
        workers: Workers[Unit, Test],
        likely: Callable[[Mapping[frozenset[Unit], bool], int], list[frozenset[Unit]]],
    ) -> Callable[[frozenset[Unit]], bool]:
        """What answers a search, and writes down, by the names of the units, what it asked."""
        names = {str(unit): unit for unit in units}
        answers = {
            frozenset(names[name] for name in selection): test["holds"]
            for selection, test in self.journal.tests.items()
            if selection <= names.keys()
        }
        # Nothing, the target itself, never holds, and everything does: that is how the requirement was made.
        answers |= {frozenset(): False, frozenset(units): True}
        foresight = Foresight(workers, likely, self._settle, answers)

        def holds(selection: frozenset[Unit]) -> bool:
            self.asked[frozenset(map(str, selection))] = selection
            return foresight.holds(selection)

        return holds

    def _settle(self, selection: frozenset[Unit], test: Test) -> bool:
        self.journal.record(frozenset(map(str, selection)), test)
        why = f": {test['complaint']}" if test["complaint"] else ""
        LOG.info(f"  {'holds' if test['holds'] else 'fails'}  {spans(in_order(selection))}{why}")
        return bool(test["holds"])


def _score(test: Test) -> float | None:
    asked = [piece for piece in _pieces(test) if piece.kind == "harmful"]
    num_prompts = sum(piece.num_prompts for piece in asked)
    return 1 - sum(piece.num_wrong for piece in asked) / num_prompts if num_prompts else None


def _pieces(test: Test) -> list[Piece]:
    return [Piece(**piece) for piece in test["pieces"]]
