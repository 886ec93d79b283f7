"""Who tests the selections of a search: this process, or Ray actors with a target each."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.architecture import Unit
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.errors import UsageError
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Recipe
from dapa_merge.report import spans
from dapa_merge.search.oracle import Requirement
from dapa_merge.search.workers import RayWorkers
from dapa_merge.search_options import SearchOptions
from dapa_merge.selection import open_plan, pinned

if TYPE_CHECKING:
    from dapa_merge.bench import Bench
    from dapa_merge.evaluate.prompts import PromptSet

# What became of a test, as the journal has it: a `Verdict` as plain data, and its `seconds`.
Test = Mapping[str, Any]


def make_bench(recipe: Recipe, plan: Plan, prompts: PromptSet, options: SearchOptions, reporter: Reporter) -> Bench:
    """The test bench of a recipe; it loads the target when that is needed.

    Raises:
        UsageError: If the recipe's evaluator or the device is not there, or workers cannot go by the evaluator.
    """
    from dapa_merge.bench import Bench
    from dapa_merge.meters import search_meter

    if options.uses_ray and recipe.evaluator == "judge" and options.evaluators.judge_requests is not None:
        raise UsageError("workers do not share a limit of requests to the judge; leave out --workers or the limit")
    meter = search_meter(recipe, prompts, options.evaluators)
    return Bench(plan, meter, options.device, lambda: reporter.say(f"loading the target {plan.target.name}"))


class InProcess:
    """Tests one selection at a time, here."""

    number = 1

    def __init__(self, bench: Bench, reporter: Reporter) -> None:
        self._bench = bench
        self._reporter = reporter
        self.running: list[frozenset[Unit]] = []

    def submit(self, selection: frozenset[Unit]) -> None:
        self.running.append(selection)

    def wait(self) -> tuple[frozenset[Unit], Test]:
        selection = self.running.pop()
        with self._reporter.task(f"testing {spans(in_order(selection))}", self._bench.num_prompts) as answered:
            return selection, _test(self._bench, selection, answered)

    def close(self) -> None:
        """Nothing to let go of; the bench is its owner's."""


def ray_testers(
    recipe: Recipe, plan: Plan, bench: Bench, limits: Requirement, options: SearchOptions
) -> RayWorkers[Unit, Test]:
    """Ray actors that test selections, each with a target of its own."""
    # Other machines, other folders, and hours later: the same weights all the same.
    recipe = replace(recipe, target=pinned(recipe.target, plan.target), source=pinned(recipe.source, plan.source))
    file = options.evaluators.evaluator_file
    evaluators = replace(options.evaluators, evaluator_file=file and file.absolute())
    options = replace(options, device=bench.device.type, evaluators=evaluators)
    make = functools.partial(_make_tester, recipe, bench.meter.prompts, limits, options)
    return RayWorkers(make, options.num_workers, uses_gpu=bench.device.type == "cuda")


def _make_tester(
    recipe: Recipe, prompts: PromptSet, limits: Requirement, options: SearchOptions, num_threads: int
) -> Callable[[frozenset[Unit]], Test]:
    """Called in a worker: loads a target of its own there."""
    import torch

    torch.set_num_threads(num_threads)
    plan = open_plan(recipe, allow_pickle=options.allow_pickle)
    bench = make_bench(recipe, plan, prompts, options, Reporter())
    bench.require(limits)
    return functools.partial(_test, bench)


def _test(bench: Bench, selection: frozenset[Unit], progress: Callable[[int], None] = lambda _: None) -> Test:
    began = time.monotonic()
    verdict = bench.examine(in_order(selection), progress)
    return {**asdict(verdict), "seconds": round(time.monotonic() - began, 3)}


def in_order(selection: Iterable[Unit]) -> list[Unit]:
    """Always the same order, in which every process transplants."""
    return sorted(selection, key=lambda unit: (unit.layer, unit.module, unit.rows or (0, 0)))


def note_of(what: str, units: Iterable[Unit]) -> str:
    """A journal's name of what was measured with some units, short however many they are."""
    return f"{what} {hashlib.sha256(' '.join(map(str, units)).encode()).hexdigest()[:32]}"
