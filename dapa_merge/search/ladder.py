"""Climbs the ladder of edits: tries one after the other, and stops at the first that repairs within the limits.

Every rung must reach the same DSR: the recipe's share (`retain`) of what the last rung's full transplant gains. Else a
rung that can change little would be content with little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TypeVar

from dapa_merge.errors import CannotRepair
from dapa_merge.measure.prompts.parts import check_prompts, split_prompts
from dapa_merge.plan.ladder import Ladder, Tried
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import LOG, begin, end
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.bench import make_bench
from dapa_merge.search.forecast import forecast
from dapa_merge.search.identity import open_journal
from dapa_merge.search.requirement import is_noise
from dapa_merge.search.result import Search
from dapa_merge.search.search import search_plan
from dapa_merge.search.session import Session, baselines, scores_text

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Attempt:
    """What one rung takes to be tried.

    Attributes:
        recipe: Of one edit.
        plan: With all units.
        options: With a journal of its own, if one was named.
        possible: As `Session.possible`; None for the only or the last rung, which decides it.
    """

    recipe: Recipe
    plan: Plan
    options: Options
    possible: float | None = None

    def search(self) -> Search:
        """Search as `search_plan` does."""
        return search_plan(self.recipe, self.plan, self.options, possible=self.possible)


@dataclass(frozen=True)
class Climbed:
    """A search that succeeded.

    Attributes:
        recipe: Of the edit that repairs.
        search: Its outcome.
        rungs: All that were tried; empty unless the recipe's edit is `auto`.
    """

    recipe: Recipe
    search: Search
    rungs: tuple[Tried, ...]


def search_ladder(ladder: Ladder, options: Options) -> Climbed:
    """Search rung by rung among the units that edits would change, whatever layers are named; raises as `climb`."""
    check_prompts(replace(ladder.recipe, layers=None))
    ladder = ladder.without_equal_units()
    with forecast(ladder, options, reports=False).told():
        (recipe, found), rungs = climb(ladder, options, lambda attempt: (attempt.recipe, attempt.search()))
    return Climbed(recipe, found, rungs)


def climb(ladder: Ladder, options: Options, attempt: Callable[[Attempt], Outcome]) -> tuple[Outcome, tuple[Tried, ...]]:
    """Call `attempt` for the rungs in order until one does not raise `CannotRepair`.

    Returns:
        Its outcome, and all rungs that were tried; none for a recipe of one edit.

    Raises:
        CannotRepair: If no rung repairs the target: its own error for a recipe of one edit, or why each does not.
        DapaError: Whatever else `attempt` raises.
    """
    if options.pick is not None and ladder.is_auto:
        ladder = ladder.choosing()
        options = _own_journal(options, ladder.recipe.edit)
    if not ladder.is_auto:
        ((recipe, plan),) = ladder.rungs
        begin(recipe.edit)
        return attempt(Attempt(recipe, plan, options)), ()
    tried = list(ladder.skipped)
    for number, one in enumerate(_attempts(ladder, options), 1):
        edit, modules = one.recipe.edit, one.plan.modules
        LOG.info(f"try {number} of {len(ladder.rungs)}: the edit {edit} of {', '.join(modules)}")
        begin(edit)
        try:
            outcome = attempt(one)
        except CannotRepair as error:
            LOG.info(f"the edit {edit} does not repair this target: {error.why}")
            end()
            tried.append(Tried(edit, modules, error.why))
        else:
            return outcome, (*tried, Tried(edit, modules, "repairs within the limits"))
    raise ladder.no_repair(tried)


def _attempts(ladder: Ladder, options: Options) -> Iterator[Attempt]:
    *others, (recipe, plan) = ladder.rungs
    last = Attempt(recipe, plan, _own_journal(options, recipe.edit))
    if others:
        # It comes before the others, although its rung is the last.
        LOG.info("measuring what all units together can do")
        begin(recipe.edit)
        possible = _possible(last)
        for recipe, plan in others:
            yield Attempt(recipe, plan, _own_journal(options, recipe.edit), possible)
    yield last


def _own_journal(options: Options, edit: str) -> Options:
    """The options with a journal for one edit: `search.copy.jsonl` next to `search.jsonl`."""
    if options.journal is None:
        return options
    return replace(options, journal=options.journal.with_suffix(f".{edit}{options.journal.suffix}"))


def _possible(last: Attempt) -> float:
    """The score of the last rung's full transplant; it remains in that rung's journal.

    Raises:
        CannotRepair: If it is lower than the target's, so that no part of it needs to be tried.
    """
    recipe, plan, options = last.recipe, last.plan, last.options
    parts = split_prompts(recipe)
    with (
        closing(make_bench(recipe, plan, parts.search, options)) as bench,
        closing(open_journal(recipe, plan, bench, options.journal)) as journal,
        journal.telling(),
    ):
        session = Session(recipe, plan, bench, journal, options, parts.choice)
        target, full = baselines(session)
        loss = target.score - full.score
        if loss > 0 and not is_noise(loss, bench.num_scored):
            told = scores_text(session, target.score, full.score)
            raise CannotRepair(
                f"the source, {recipe.source}, makes the target, {recipe.target}, worse: {told}; were the two swapped?",
                told,
            )
        return full.score
