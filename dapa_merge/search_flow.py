"""The search of a recipe: baselines, prior, tests, each written to the journal before it is used."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapa_merge import __version__
from dapa_merge.checkpoint.architecture import AUTO_MODULES, Unit
from dapa_merge.checkpoint.digest import settings_digest, tensors_digest
from dapa_merge.checkpoint.plan import Plan
from dapa_merge.errors import CannotRepair, CheckpointError
from dapa_merge.progress import Reporter
from dapa_merge.recipe import Recipe
from dapa_merge.report import spans
from dapa_merge.search.delta import Minimum, SearchInterrupted, minimize
from dapa_merge.search.journal import Journal, JournalUnavailable, name_of
from dapa_merge.search.oracle import Piece, Requirement, Verdict, requirement

if TYPE_CHECKING:
    from dapa_merge.evaluate.bench import Baseline, Bench


@dataclass(frozen=True)
class Search:
    """A finished search.

    Attributes:
        minimum: What it found.
        requirement: What had to be met.
        target: The target's own figures on the search's prompts.
        full: Those with every unit transplanted.
        prior: How much each unit was expected to matter; None if the algorithm does not ask.
        num_recorded: How many of the tests were in the journal already.
        num_asked: How many prompts the tests asked, recorded ones included.
        num_prompts: How many they would have asked without early verdicts.
        seconds: Wall-clock time.
    """

    minimum: Minimum[Unit]
    requirement: Requirement
    target: Baseline
    full: Baseline
    prior: Mapping[Unit, float] | None
    num_recorded: int
    num_asked: int
    num_prompts: int
    seconds: float


def search(recipe: Recipe, plan: Plan, bench: Bench, journal: Journal, reporter: Reporter) -> Search:
    """Find a 1-minimal selection that meets the recipe's requirement.

    Raises:
        CannotRepair: If the full transplant makes nothing better, or breaks a limit.
        DapaError: For whatever else does not fit; what was tested is in the journal.
    """
    start = time.monotonic()
    target = _baseline("target", (), recipe, bench, journal, reporter)
    full = _baseline("full transplant", plan.units, recipe, bench, journal, reporter)
    limits = _requirement(recipe, plan, target, full)
    tests = _Tests(plan, bench, journal, limits, reporter)
    prior = _prior(plan, bench, journal, target, full, reporter) if recipe.search == "guided" else None
    reporter.say(f"searching among {len(plan.units)} units for the few that keep a DSR of {limits.min_dsr:.3f}")
    try:
        minimum = minimize(plan.units, tests.holds, algorithm=recipe.search, prior=prior)
    except SearchInterrupted as stop:
        reporter.say(f"the best selection so far: {spans(stop.best.units)}")
        if journal.path:
            reporter.say(f"every test is in the journal {journal.path}; run again to go on")
        raise (stop.__cause__ or stop) from None
    found = Search(
        minimum,
        limits,
        target,
        full,
        prior,
        tests.num_recorded,
        tests.num_asked,
        tests.num_prompts,
        time.monotonic() - start,
    )
    reporter.say(f"found {spans(minimum.units)} in {minimum.tests} tests{_thrift(found)}")
    return found


def open_journal(recipe: Recipe, plan: Plan, bench: Bench, path: Path | None, reporter: Reporter) -> Journal:
    """The journal of a recipe's search: the given file, or one in the user's cache folder.

    Raises:
        UsageError: If a given file is of another search, damaged, or cannot be written. Where the cache folder cannot
            be written, the search goes on without a journal, and says so.
    """
    if path is not None:
        # Seen before the minutes that large checkpoints take to read.
        path.parent.mkdir(parents=True, exist_ok=True)
    parts = _parts(recipe, plan, bench, reporter)
    if path is not None:
        return Journal(path, parts)
    import platformdirs

    try:
        return Journal(Path(platformdirs.user_cache_dir("dapa-merge")) / "journals" / name_of(parts), parts)
    except JournalUnavailable as error:
        reporter.say(f"{error}; this search is not recorded, and starts again if it is killed")
        return Journal()


class _Tests:
    """Answers the search: from the baselines, from the journal, or by a test."""

    def __init__(self, plan: Plan, bench: Bench, journal: Journal, limits: Requirement, reporter: Reporter) -> None:
        self._plan = plan
        self._bench = bench
        self._journal = journal
        self._reporter = reporter
        self._known = {frozenset(): False, frozenset(plan.units): True}
        self.num_recorded = self.num_asked = self.num_prompts = 0
        examiner = bench.require(limits)
        for test in journal.tests.values():
            examiner.learn(_pieces(test))

    def holds(self, selection: frozenset[Unit]) -> bool:
        if selection in self._known:
            return self._known[selection]
        ordered = [unit for unit in self._plan.units if unit in selection]
        key = frozenset(map(str, ordered))
        test = self._journal.tests.get(key)
        if test is not None:
            self.num_recorded += 1
        else:
            with self._reporter.task(f"testing {spans(ordered)}", self._bench.num_prompts) as answered:
                began = time.monotonic()
                verdict = self._bench.examine(ordered, answered)
            test = _to_json(verdict, time.monotonic() - began)
            self._journal.record(key, test)
        self.num_asked += sum(piece.num_prompts for piece in _pieces(test))
        self.num_prompts += test["num_prompts"]
        why = f": {test['complaint']}" if test["complaint"] else ""
        self._reporter.say(f"  {'holds' if test['holds'] else 'fails'}  {spans(ordered)}{why}")
        return bool(test["holds"])


def _to_json(verdict: Verdict, seconds: float) -> dict[str, Any]:
    return {**asdict(verdict), "seconds": round(seconds, 3)}


def _pieces(test: Mapping[str, Any]) -> list[Piece]:
    return [Piece(**piece) for piece in test["pieces"]]


def _baseline(
    name: str, units: Sequence[Unit], recipe: Recipe, bench: Bench, journal: Journal, reporter: Reporter
) -> Baseline:
    from dapa_merge.evaluate.bench import Baseline

    if name not in journal.notes:
        with reporter.task(f"measuring the {name}", bench.num_prompts) as answered:
            journal.note(name, bench.baseline(units, answered).to_json())
    baseline = Baseline.from_json(journal.notes[name])
    reporter.say(f"the {name}: DSR {baseline.dsr:.3f}, over-refusal {baseline.over_refusal:.3f}")
    if baseline.perplexity == math.inf:
        model = f"the target {recipe.target}" + (f" with every unit of the source {recipe.source}" if units else "")
        raise CheckpointError(f"{model} computes infinities or no numbers at all; its weights are damaged")
    return baseline


def _requirement(recipe: Recipe, plan: Plan, target: Baseline, full: Baseline) -> Requirement:
    modules = ", ".join(recipe.modules)
    more = "; other modules may: try `modules: auto`" if set(recipe.modules) < set(AUTO_MODULES) else ""
    if full.dsr <= target.dsr:
        raise CannotRepair(
            f"the source {recipe.source} cannot repair this target through its modules {modules}: with all "
            f"{len(plan.units)} units transplanted the DSR is {full.dsr:.3f}, and without them {target.dsr:.3f}{more}"
        )
    limits = requirement(
        target,
        full,
        retain=recipe.retain,
        max_over_refusal=recipe.max_over_refusal,
        max_perplexity=recipe.max_perplexity,
    )
    if complaint := limits.complaint(full):
        raise CannotRepair(
            f"the source {recipe.source} cannot repair this target within the recipe's limits: even with every unit "
            f"({modules}) {complaint}"
        )
    return limits


def _prior(
    plan: Plan, bench: Bench, journal: Journal, target: Baseline, full: Baseline, reporter: Reporter
) -> dict[Unit, float]:
    """Attribution's scores; from the journal if they are there, because a search must take the same way again."""
    if "prior" not in journal.notes:
        with reporter.task("asking which units matter", 1):
            scores = bench.prior(target.responses, full.responses)
        journal.note("prior", {str(unit): score for unit, score in scores.items()})
    recorded = journal.notes["prior"]
    return {unit: recorded[str(unit)] for unit in plan.units}


def _thrift(search: Search) -> str:
    facts = []
    if search.num_recorded:
        facts.append(f"{search.num_recorded} of them from the journal")
    if search.num_prompts:
        saved = 1 - search.num_asked / search.num_prompts
        facts.append(f"{100 * saved:.0f} % of the prompts saved by early verdicts")
    return f" ({', '.join(facts)})" if facts else ""


def _parts(recipe: Recipe, plan: Plan, bench: Bench, reporter: Reporter) -> dict[str, str]:
    """Everything that decides a verdict, by name."""
    import torch
    import transformers

    names = {tensor.name for _, tensor in plan.tensors(plan.units)}
    total = plan.target.num_bytes + sum(plan.source.tensors[name].num_bytes for name in names)
    with reporter.task("reading both checkpoints", total) as read:
        parts = {
            "target": tensors_digest(plan.target, progress=read),
            "source": tensors_digest(plan.source, names, progress=read),
        }
    prompts = bench.meter.prompts
    asked: list[Iterable[object]] = [prompts.harmful, prompts.harmless, [asdict(text) for text in prompts.passages]]
    return parts | {
        "tokenizer and config": settings_digest(plan.target),
        "prompts": _digest(asked),
        "units": _digest([str(unit) for unit in plan.units]),
        "limits": f"DSR {recipe.retain}, over-refusal {recipe.max_over_refusal}, perplexity {recipe.max_perplexity}",
        "generation": f"greedy, {recipe.max_new_tokens} tokens, batches of {recipe.batch_size}",
        "device": bench.device_kind,
        "versions": f"dapa-merge {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }


def _digest(content: object) -> str:
    return "sha256 " + hashlib.sha256(json.dumps(content).encode()).hexdigest()
