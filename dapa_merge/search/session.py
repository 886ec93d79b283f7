"""What the steps of a search share, and what all its limits rest on: figures of target and full transplant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dapa_merge.checkpoint.units import Unit
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure.figures import SEARCH_PROMPTS
from dapa_merge.measure.live import mapped_values
from dapa_merge.measure.prompts.sets import PromptSet
from dapa_merge.plan.edit import not_finite
from dapa_merge.plan.plan import Plan
from dapa_merge.progress import LOG
from dapa_merge.recipe.constraints import shown
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.bench import Bench
from dapa_merge.search.journal import Journal, MarkedJournal
from dapa_merge.search.requirement import Requirement
from dapa_merge.search.result import Baseline
from dapa_merge.search.rounds import Helpers


@dataclass(frozen=True)
class Session:
    """The objects that the steps of one search share.

    Attributes:
        choice: The prompts that an edit that chooses makes its choice by.
        possible: The score that another edit reaches with all that it can change; None if that does not matter. What
            a selection must reach depends on it.
        helpers: The workers, where an edit that chooses shares its work.
    """

    recipe: Recipe
    plan: Plan
    bench: Bench
    journal: Journal | MarkedJournal
    options: Options
    choice: PromptSet | None = None
    possible: float | None = None
    helpers: Helpers | None = None


class _Wanted(NamedTuple):
    """A baseline: its name in the journal, its units, and what messages call it."""

    name: str
    units: tuple[Unit, ...]
    told: str


def _wanted(session: Session) -> tuple[_Wanted, _Wanted]:
    units, done = session.plan.units, session.plan.reference.edit.done
    full = f"target with all {len(units)} units {done}"
    return _Wanted("target", (), "target"), _Wanted("full transplant", units, full)


def baselines(session: Session) -> tuple[Baseline, Baseline]:
    """All figures of the target, and of its full transplant."""
    of_target, of_full = _wanted(session)
    target = _baseline(session, *of_target)
    session.bench.use(session.plan.reference)
    full = _baseline(session, *of_full)
    session.bench.use(session.plan)
    return target, full


@dataclass(frozen=True)
class Scores:
    """The scores of a search's target and of its full transplant, without measuring more than each takes.

    `baselines` then measures the rest.
    """

    session: Session

    @property
    def are_own(self) -> bool:
        """Whether nobody else recorded them: such are measured again, with all figures."""
        assert isinstance(self.session.journal, Journal)
        return not self.session.journal.foreign & {wanted.name for wanted in _wanted(self.session)}

    def target(self) -> float:
        """The target's."""
        return self._bounds(_wanted(self.session)[0], self.session.plan)[0]

    def full(self, *, is_begun: bool = False) -> tuple[float, float]:
        """Two bounds of the full transplant's: the same, or what the first piece of the prompts tells."""
        return self._bounds(_wanted(self.session)[1], self.session.plan.reference, is_begun=is_begun)

    def _bounds(self, wanted: _Wanted, plan: Plan, *, is_begun: bool = False) -> tuple[float, float]:
        bench, journal = self.session.bench, self.session.journal
        assert isinstance(journal, Journal)
        bench.use(plan)
        found = bench.recorded_score(journal, wanted.name, wanted.units, f"the {wanted.told}", is_begun=is_begun)
        bench.use(self.session.plan)
        return found


def _baseline(session: Session, name: str, units: Sequence[Unit], told: str) -> Baseline:
    """All figures of the target with some units, from the journal if recorded under `name`; messages say `told`."""
    recipe, bench, journal = session.recipe, session.bench, session.journal
    baseline = bench.recorded(journal, name, units, f"the {told}")
    assert isinstance(journal, Journal)
    if name in journal.foreign:
        _check_recorded(session, told, units, baseline)
        journal.confirm(name)
    figures = [(one.label, baseline.figures[one.figure]) for one in bench.constraints]
    found = [f"{label} {shown(figure)}" for label, figure in figures if not math.isnan(figure)]
    asked = " and ".join(f"{number} {kind}" for kind, number in bench.num_of_kind.items())
    LOG.info(f"the {told}{'' if units else f', on {asked} {SEARCH_PROMPTS}'}: {', '.join(found)}")
    if math.inf in baseline.figures.values():
        _check_finite(session.plan, ["source"] if units else ["target"])
        edited = f", with every unit edited by the source {recipe.source}," if units else ""
        raise CheckpointError(f"the target {recipe.target}{edited} computes infinities or NaN; its weights are damaged")
    return baseline


def _check_recorded(session: Session, name: str, units: Sequence[Unit], recorded: Baseline) -> None:
    """Measure a baseline again that others may have made up, since every limit rests on it.

    Raises:
        UsageError: If its figures are others.
    """
    bench = session.bench
    now = bench.baseline(units, what=f"measuring the {name} again").figures
    check_same(session, name, recorded.figures, now)


def check_same(session: Session, name: str, recorded: Mapping[str, float], now: Mapping[str, float]) -> None:
    """Raise `UsageError` if figures that a journal recorded are others now, by more than noise."""
    bench, journal = session.bench, session.journal
    for one in bench.constraints:
        was, found = recorded.get(one.figure, math.nan), now[one.figure]
        # As far as noise goes, each is within the limit that the other would be.
        pairs = ((was, now), (found, {one.figure: was}))
        differs = any(
            Requirement(((one, limit),)).loosened(bench.num_of_kind).complaint(figures) for limit, figures in pairs
        )
        if math.isnan(was) != math.isnan(found) or differs:
            raise UsageError(
                f"the journal {journal.path} is not true of these models on this machine: in it the {one.label} of the "
                f"{name} is {shown(was)}, but measured now it is {shown(found)}; remove the journal to search again"
            )


def _check_finite(plan: Plan, names: Sequence[str]) -> None:
    """Raise `CheckpointError` for the first of the plan's tensors, of these models, with values that are not finite."""
    for regions in plan.regions(plan.units):
        for name in names:
            if not bool(mapped_values(plan.models[name], regions[name]).float().isfinite().all()):
                raise not_finite(regions[name].name, plan.models, name)


def scores_text(session: Session, target: float, full: float) -> str:
    """The scores of the full transplant and of the target, as a part of a sentence."""
    done = session.plan.reference.edit.done
    return (
        f"with all {len(session.plan.units)} units {done} the {session.bench.measure} is {full:.3f}, and without "
        f"them {target:.3f}"
    )
