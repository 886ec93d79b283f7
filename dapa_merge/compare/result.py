"""What was measured of each method, recipe by recipe, as data. No torch here.

What a method does on average over the recipes. No torch here.

What is compared, beside what the recipes say. Imports nothing heavy.

Which of many points are worth having, where several things count. Standard library only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dapa_merge.measure.figures import Change, Figures
from dapa_merge.measure.statistics import mcnemar, mean_interval
from dapa_merge.plan.edit import Edit
from dapa_merge.search.requirement import SCORE, constraints_of, requirement

TARGET, SOURCE, DAPA, AUTO = "target", "source", "dapa", "auto"


@dataclass(frozen=True)
class Cost:
    """What it took to find a selection.

    Attributes:
        tests: Selections that the search tested; a model evaluation each, most of them broken off early.
        seconds: Wall-clock time, that of recorded tests included.
        peak_bytes: The most memory that was in use meanwhile, by its place: `host`, and `device` if that is another;
            empty where the system does not say.
    """

    tests: int
    seconds: float
    peak_bytes: dict[str, int]


@dataclass(frozen=True)
class Arm:
    """One method, applied to one recipe's target.

    Attributes:
        key: Its name in this row: the method's, with a seed or a weight behind it.
        method: One of `METHODS`, or `target` or `source`.
        label: What it is, for people.
        detail: Which units or settings.
        figures: What was measured; None if the method found nothing or cannot be applied.
        why_not: Why there are none.
        share: The share of the target's parameters that it replaces, in [0, 1].
        num_parameters: How many those are.
        refused: For each harmful prompt, whether it was refused.
        over_refused: For each harmless one.
        seconds: What measuring took.
        cost: What finding it took; None if nothing had to be searched.
    """

    key: str
    method: str
    label: str
    detail: str
    figures: Figures | None = None
    why_not: str | None = None
    share: float = 0.0
    num_parameters: int = 0
    refused: tuple[bool, ...] = ()
    over_refused: tuple[bool, ...] = ()
    seconds: float = 0.0
    cost: Cost | None = None

    @property
    def group(self) -> str:
        """What rows are averaged by: random selections of all seeds are one."""
        return self.key.rpartition(" seed ")[0] or self.key

    @property
    def skill(self) -> float | None:
        """The mean of its skills, in [0, 1]; None if none was asked."""
        return mean_skill(self.figures)


@dataclass(frozen=True)
class Point:
    """One edit of the curve.

    Attributes:
        path: `dapa`, or `random` with a seed behind it.
        share: The share of the target's parameters that it replaces, in [0, 1].
        num_units: Units and blocks.
        dsr: As all figures here, with the row's prompts.
        dsr_interval: 95 %.
        over_refusal: In [0, 1].
        skill: The mean of the skills; None if none was asked.
        perplexity: Of the row's text.
    """

    path: str
    share: float
    num_units: int
    dsr: float
    dsr_interval: tuple[float, float]
    over_refusal: float
    skill: float | None
    perplexity: float


@dataclass(frozen=True)
class Row:
    """One recipe of the table.

    Attributes:
        name: The recipe's.
        target: As the recipe names it.
        source: Likewise.
        architecture: Of both.
        modules: What the recipe's search may choose from.
        evaluator: Whose verdicts DSR and over-refusal are; of one that scores a model as a whole, its scores say
            whether a method repairs, and the rules' verdicts the rest.
        edit: How every transplanted value is computed.
        num_parameters: Of the target.
        prompts: The prompt set's name.
        settings: The recipe's values for its constraints, by their keys; the gain of which `retain` is a share is here
            the source's, and in a search that of the full transplant.
        arms: Target and source first.
        curve: Edits of every size; empty if none were measured.
        no_curve: Why there are none, though they were asked for.
        followed: Whose selection the curve grows through first, `dapa` or `auto`; None if no search found any.
        selected: The share of the parameters that this selection replaces.
    """

    name: str
    target: str
    source: str
    architecture: str
    modules: str
    evaluator: str
    edit: Edit
    num_parameters: int
    prompts: str
    settings: Mapping[str, float]
    arms: tuple[Arm, ...]
    curve: tuple[Point, ...] = ()
    no_curve: str | None = None
    followed: str | None = None
    selected: float | None = None

    def arm(self, key: str) -> Arm | None:
        """The arm of a name."""
        return next((arm for arm in self.arms if arm.key == key), None)

    @property
    def before(self) -> Figures:
        """The untouched target's figures."""
        return self._figures(TARGET)

    @property
    def alone(self) -> Figures:
        """The source's figures."""
        return self._figures(SOURCE)

    def _figures(self, key: str) -> Figures:
        arm = self.arm(key)
        assert arm is not None
        assert arm.figures is not None
        return arm.figures

    def change(self, arm: Arm) -> Change:
        """What became of the target's harmful prompts, and whether chance alone does as much."""
        target = self.arm(TARGET)
        assert target is not None
        return mcnemar(target.refused, arm.refused)

    @property
    def can_be_repaired(self) -> bool:
        """Whether the source is safer than the target, so that there is something to bring over."""
        return SCORE.of(self.alone) > SCORE.of(self.before)

    def repairs(self, arm: Arm) -> bool:
        """Whether a method brings the wanted share of the source's gain, within the recipe's limits."""
        return self.can_be_repaired and arm.figures is not None and self.complaint(arm.figures) is None

    def complaint(self, after: Figures) -> str | None:
        """What keeps a result from being a repair, where there is something to repair; None if nothing does."""
        constraints = constraints_of(self.settings, SCORE.label if after.score is None else self.evaluator)
        target, source, reached = (
            {one.figure: one.of(figures) for one in constraints} for figures in (self.before, self.alone, after)
        )
        return requirement(constraints, target, source, self.settings).complaint(reached)

    def front(self) -> list[bool]:
        """For each edit of the curve, whether it is on the Pareto front.

        It is if no other one that is as small refuses as many harmful and as few harmless prompts and keeps as much
        skill, and is better in one of these.
        """
        return pareto_front(
            [(point.share, -point.dsr, point.over_refusal, -(point.skill or 0.0)) for point in self.curve]
        )


def mean_skill(figures: Figures | None) -> float | None:
    """The mean of a model's skills; None if none was asked."""
    if figures is None or not figures.skills:
        return None
    return statistics.fmean(skill.score for skill in figures.skills)


def groups(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    """Arms by what they are averaged by, in the order of the arms."""
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        found.setdefault(arm.group, []).append(arm)
    return found


# What a method does in a row; None if it does not apply.
Value = Callable[[Row, Arm], "float | None"]
# Of these, a row in which a search found nothing counts as its untouched target: whoever relied on them has that.
MAY_FIND_NOTHING = (DAPA, AUTO, "mlp", "random", "random-search")


@dataclass(frozen=True)
class RowMean:
    """A mean over recipes, and where that of many more recipes like these lies with 95 % confidence (Student's t).

    Attributes:
        value: The mean.
        interval: None for fewer than three recipes.
    """

    value: float
    interval: tuple[float, float] | None

    @property
    def points(self) -> str:
        """A change of a share as percentage points."""
        return points(self.value)

    @property
    def span(self) -> str | None:
        """Its interval, likewise; none where all recipes are alike, which tells nothing of others."""
        if self.interval is None or self.interval[0] == self.interval[1]:
            return None
        return f"{points(self.interval[0])} to {points(self.interval[1])}"


@dataclass(frozen=True)
class Average:
    """One method over all recipes in which it has a figure; changes are from the target to the method's result.

    Attributes:
        group: The method, with its weight.
        label: For people.
        num_rows: Recipes.
        num_repaired: Those with as much of the source's gain as their recipe wants, within its limits; by random
            selections, those that more than half of the seeds repair.
        gain: In DSR, in [-1, 1].
        over_refusal: Change, in [-1, 1].
        perplexity: As a ratio, over the recipes in which it is finite; None if that is none.
        skill: Change of the mean of the skills, in [-1, 1]; None if no recipe asks for any.
        share: Of the parameters replaced, in [0, 1].
        tests: Of the search; None if there was none, as the next.
        seconds: Of the search.
    """

    group: str
    label: str
    num_rows: int
    num_repaired: int
    gain: RowMean
    over_refusal: RowMean
    perplexity: RowMean | None
    skill: RowMean | None
    share: RowMean
    tests: RowMean | None
    seconds: RowMean | None


def averages(rows: Sequence[Row]) -> tuple[Average, ...]:
    """Every method that a row has, in the order of a table; the seeds of random selections count as one."""
    labels: dict[str, str] = {}
    order: dict[str, tuple[int, str]] = {}
    for row in rows:
        for index, (group, arms) in enumerate(groups(row.arms).items()):
            labels.setdefault(group, arms[0].label)
            order[group] = max(order.get(group, (0, group)), (index, group))
    found = (_average(group, labels[group], rows) for group in sorted(labels, key=order.__getitem__))
    return tuple(average for average in found if average is not None)


def _average(group: str, label: str, rows: Sequence[Row]) -> Average | None:
    counted = [(row, arms) for row in rows if (arms := counted_arms(row, group))]
    if not counted:
        return None

    def mean(value: Value, *, is_change: bool = False) -> RowMean | None:
        found = mean_of([mean_in_row(row, arms, value) for row, arms in counted])
        if found is None or found.interval is None or not is_change:
            return found
        # No share changes by more than all.
        return RowMean(found.value, (max(-1.0, found.interval[0]), min(1.0, found.interval[1])))

    gain, refusal = mean(dsr_gain, is_change=True), mean(over_refusal_change, is_change=True)
    share = mean(lambda _, arm: arm.share)
    assert gain is not None
    assert refusal is not None
    assert share is not None
    return Average(
        group=group,
        label=label,
        num_rows=len(counted),
        num_repaired=sum(repairs_in_row(row, arms) for row, arms in counted),
        gain=gain,
        over_refusal=refusal,
        perplexity=mean(perplexity_ratio),
        skill=mean(skill_change, is_change=True),
        share=share,
        tests=mean(lambda _, arm: arm.cost.tests if arm.cost else None),
        seconds=mean(lambda _, arm: arm.cost.seconds if arm.cost else None),
    )


def repairs_in_row(row: Row, arms: Sequence[Arm]) -> bool:
    """Whether a method repairs a row's target; with several seeds, whether more than half of them do."""
    return sum(map(row.repairs, arms)) > len(arms) / 2


def counted_arms(row: Row, group: str) -> list[Arm]:
    """The arms of a method that count in a row; none if it cannot be applied there."""
    arms = groups(row.arms).get(group, [])
    return [arm for arm in arms if arm.figures is not None or arm.method in (*MAY_FIND_NOTHING, TARGET, SOURCE)]


def mean_in_row(row: Row, arms: Sequence[Arm], value: Value) -> float | None:
    """A method's value in a row: the mean of its seeds; None if none has one."""
    values = [found for arm in arms if (found := value(row, arm)) is not None]
    return statistics.fmean(values) if values else None


def dsr_gain(row: Row, arm: Arm) -> float:
    """From the target to a method's result, in [-1, 1], as the next two; of one that found nothing, none."""
    return (arm.figures or row.before).dsr - row.before.dsr


def over_refusal_change(row: Row, arm: Arm) -> float:
    """Likewise."""
    return (arm.figures or row.before).over_refusal - row.before.over_refusal


def skill_change(row: Row, arm: Arm) -> float | None:
    """Likewise; None if no skill was asked."""
    after, before = mean_skill(arm.figures or row.before), mean_skill(row.before)
    return None if after is None or before is None else after - before


def perplexity_ratio(row: Row, arm: Arm) -> float | None:
    """The result's perplexity as a ratio to the target's; None where it is not finite."""
    ratio = (arm.figures or row.before).perplexity / row.before.perplexity
    return ratio if math.isfinite(ratio) else None


def points(change: float) -> str:
    """A change of a share in percentage points."""
    return f"{100 * change:+.2f}"


def mean_of(values: Sequence[float | None]) -> RowMean | None:
    """The mean of those that are there; None if none is."""
    there = [value for value in values if value is not None]
    return RowMean(statistics.fmean(there), mean_interval(there)) if there else None


# In the order of a table. The target untouched and the source itself are always there.
METHODS = {
    "dapa": "DAPA: what the search finds of the recipe's modules",
    "auto": "DAPA among gate, up and down projections (`modules: auto`)",
    "fixed": "the DAPA repository's fixed middle layers, whole MLP",
    "gates": "all gates; where a model has none, every unit of the recipe's modules",
    "mlp": "the whole MLP of the layers that a search selects, for each of the two",
    "random": "random selections of the modules and size of each",
    "random-search": "the best of as many random selections as each search tested, by the prompts of the search",
    "linear": "mergekit's linear blend of target and source",
    "task-arithmetic": "mergekit's task arithmetic; needs `pretrained` in the recipe",
    "ties": "mergekit's TIES",
}
BLENDS = ("linear", "task-arithmetic", "ties")
# Of the entries that TIES keeps of each difference; Yadav et al. 2023, section 5.
TIES_DENSITY = 0.2


@dataclass(frozen=True)
class CompareOptions:
    """What to compare.

    Attributes:
        methods: Some of `METHODS`.
        num_seeds: Random selections of each size.
        seed: The first of the seeds.
        weights: Of the source, in mergekit's methods.
        draws_curve: Whether edits of every size are measured.
        num_points: Sizes of edits on the curve, roughly.
        rows_per_block: Rows (neurons) of the smallest edit; None for a sixteenth of a projection.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    num_seeds: int = 5
    seed: int = 0
    weights: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    draws_curve: bool = True
    num_points: int = 12
    rows_per_block: int | None = None


def pareto_front(costs: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other one dominates: is nowhere worse, and somewhere better.

    Args:
        costs: Of each point, what should be small, as many for each.
    """

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)

    return [not any(dominates(other, point) for other in costs) for point in costs]
