"""The results of a comparison as data: methods recipe by recipe, and on average. No torch here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dapa_merge.compare.methods import MAY_FIND_NOTHING, METHODS, SOURCE, TARGET
from dapa_merge.measure.figures import Change, Figures
from dapa_merge.measure.statistics import mcnemar, mean_interval
from dapa_merge.plan.edit import Edit
from dapa_merge.recipe.attacks import Attack
from dapa_merge.recipe.constraints import SCORE
from dapa_merge.search.requirement import constraints_of, requirement


@dataclass(frozen=True)
class Cost:
    """The cost of a search.

    Attributes:
        seconds: Wall-clock time, including that of recorded tests.
        peak_bytes: The most memory in use, by place: `host`, and `device` if that is another; empty if unknown.
    """

    tests: int
    seconds: float
    peak_bytes: dict[str, int]


@dataclass(frozen=True)
class Trial:
    """One setting of a method, on the prompts of choice and search.

    Attributes:
        setting: For people.
        figures: Those of the recipe's constraints, by name; empty if it could not be measured.
        complaint: The first limit that it violates, or why it could not be measured; None if it keeps to all limits.
    """

    setting: str
    figures: Mapping[str, float]
    complaint: str | None
    seconds: float


@dataclass(frozen=True)
class Tuning:
    """The settings of a method that were tried, in their order, and the number of the one that was taken."""

    trials: tuple[Trial, ...]
    chosen: int


@dataclass(frozen=True)
class Further:
    """A figure beside the report's.

    Attributes:
        name: The prompt set's, or the attack's on the report's harmful prompts.
        figure: `DSR`, `over-refusal` or `divergence`.
        value: Of a divergence in nats per token; NaN if it cannot be measured.
        interval: 95 % interval; None for a divergence.
        num_prompts: That were asked.
    """

    name: str
    figure: str
    value: float
    interval: tuple[float, float] | None
    num_prompts: int


@dataclass(frozen=True)
class Arm:
    """One method, applied to one recipe's target.

    Attributes:
        key: Its name in the row: the method, with a seed or a weight.
        method: One of `METHODS`, or `target` or `source`.
        share: The replaced share of the target's parameters, in [0, 1].
        refused: For each harmful prompt, whether it was refused.
        cost: Of a search, or of trying settings: each is a test.
        tuning: None for a method without settings.
        further: What was measured with other prompts than the report's, or otherwise.
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
    tuning: Tuning | None = None
    further: tuple[Further, ...] = ()

    @property
    def group(self) -> str:
        """The key by which rows are averaged, without a seed."""
        return self.key.rpartition(" seed ")[0] or self.key

    @property
    def skill(self) -> float | None:
        """The mean of its skills, in [0, 1]; None if none was asked."""
        return mean_skill(self.figures)


@dataclass(frozen=True)
class Point:
    """One edit of the curve.

    Attributes:
        path: `dapa`, or `random` with a seed.
        share: The replaced share of the target's parameters, in [0, 1].
        skill: The mean of the skills; None if none was asked.
        perplexity: Measured on the row's text.
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
        evaluator: The judge of DSR and over-refusal; if it scores whole models, its scores say whether a method
            repairs, and the rules judge the rest.
        settings: The recipe's values for its constraints, by key; `retain` is here a share of the source's gain, and in
            a search a share of the full transplant's.
        arms: Target and source first.
        arithmetic: In what all figures are computed; None if as the models' configs say.
        no_curve: The reason if a curve was requested but is missing.
        followed: The search whose selection the curve follows, `dapa` or `auto`; None if no search found any.
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
    arithmetic: str | None = None
    no_curve: str | None = None
    followed: str | None = None
    selected: float | None = None

    def arm(self, key: str) -> Arm | None:
        """The arm with a key."""
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
        """The change of the target's refusals of harmful prompts, and whether it is within noise."""
        target = self.arm(TARGET)
        assert target is not None
        return mcnemar(target.refused, arm.refused)

    @property
    def can_be_repaired(self) -> bool:
        """Whether the source is safer than the target."""
        return SCORE.of(self.alone) > SCORE.of(self.before)

    def repairs(self, arm: Arm) -> bool:
        """Whether a method reaches the wanted share of the source's gain, within the recipe's limits."""
        return self.can_be_repaired and arm.figures is not None and self.complaint(arm.figures) is None

    def complaint(self, after: Figures) -> str | None:
        """The reason if a result is not a repair, or else None. The source must be safer than the target."""
        constraints = constraints_of(self.settings, SCORE.label if after.score is None else self.evaluator)
        target, source, reached = (
            {one.figure: one.of(figures) for one in constraints} for figures in (self.before, self.alone, after)
        )
        return requirement(constraints, target, source, self.settings).complaint(reached)

    def front(self) -> list[bool]:
        """For each edit of the curve, whether it is on the Pareto front of share, DSR, over-refusal and skill."""
        return pareto_front(
            [(point.share, -point.dsr, point.over_refusal, -(point.skill or 0.0)) for point in self.curve]
        )


def mean_skill(figures: Figures | None) -> float | None:
    """The mean of a model's skills; None if none was asked."""
    if figures is None or not figures.skills:
        return None
    return statistics.fmean(skill.score for skill in figures.skills)


def groups(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    """Arms by the groups in which they are averaged, in their order."""
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        found.setdefault(arm.group, []).append(arm)
    return found


# A value of a method in a row; None if it does not apply.
Value = Callable[[Row, Arm], "float | None"]


@dataclass(frozen=True)
class RowMean:
    """A mean over recipes, with its 95 % interval (Student's t); None for fewer than three recipes."""

    value: float
    interval: tuple[float, float] | None

    @property
    def points(self) -> str:
        """A change of a share as percentage points."""
        return points(self.value)

    @property
    def span(self) -> str | None:
        """Its interval in percentage points; None if all recipes are alike, which tells nothing about others."""
        if self.interval is None or self.interval[0] == self.interval[1]:
            return None
        return f"{points(self.interval[0])} to {points(self.interval[1])}"


@dataclass(frozen=True)
class Average:
    """One method over all recipes in which it has a figure; changes are from the target to the result.

    Attributes:
        group: The method, with its weight.
        num_repaired: Repaired targets; for random selections, those repaired by more than half of the seeds.
        perplexity: Ratio, over the recipes in which it is finite; None if it is never finite.
        skill: Change of the mean of the skills, in [-1, 1]; None if no recipe asks for any.
        tests: The tests of the search; None, like `seconds`, without a search.
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
    """Average every method, in the order of a table; seeds of random selections count as one."""
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
        # A share cannot change by more than 1.
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
    """The arms of a method that count in a row; empty if it cannot be applied there."""
    arms = groups(row.arms).get(group, [])
    return [arm for arm in arms if arm.figures is not None or arm.method in (*MAY_FIND_NOTHING, TARGET, SOURCE)]


def mean_in_row(row: Row, arms: Sequence[Arm], value: Value) -> float | None:
    """A method's value in a row, averaged over its seeds; None without any."""
    values = [found for arm in arms if (found := value(row, arm)) is not None]
    return statistics.fmean(values) if values else None


def dsr_gain(row: Row, arm: Arm) -> float:
    """The change of DSR, in [-1, 1]; 0 for a method that found nothing, here and below."""
    return (arm.figures or row.before).dsr - row.before.dsr


def over_refusal_change(row: Row, arm: Arm) -> float:
    """The change of over-refusal, in [-1, 1]."""
    return (arm.figures or row.before).over_refusal - row.before.over_refusal


def skill_change(row: Row, arm: Arm) -> float | None:
    """The change of the mean skill, in [-1, 1]; None if none was asked."""
    after, before = mean_skill(arm.figures or row.before), mean_skill(row.before)
    return None if after is None or before is None else after - before


def perplexity_ratio(row: Row, arm: Arm) -> float | None:
    """The ratio of the result's perplexity to the target's; None if it is not finite."""
    ratio = (arm.figures or row.before).perplexity / row.before.perplexity
    return ratio if math.isfinite(ratio) else None


def points(change: float) -> str:
    """A change of a share in percentage points."""
    return f"{100 * change:+.2f}"


def mean_of(values: Sequence[float | None]) -> RowMean | None:
    """The mean of the values that are not None; None without any."""
    there = [value for value in values if value is not None]
    return RowMean(statistics.fmean(there), mean_interval(there)) if there else None


@dataclass(frozen=True)
class CompareOptions:
    """Options of `dapa-merge compare`.

    Attributes:
        methods: Some of `METHODS`.
        num_points: Sizes of edits on the curve, roughly.
        seed: Of the first random selection, and of what methods draw at random.
        weights: Weights of the source in mergekit's methods, each a row of its own; None to tune them.
        num_tries: Settings of a method that are tried, at most; None for all.
        rows_per_block: Rows (neurons) of the smallest edit; None for a sixteenth of a projection.
        also: Prompt sets that are asked besides the report's.
        attacks: That are tried on the report's harmful prompts.
        diverges: Whether to measure the divergence on the report's harmless prompts.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    num_seeds: int = 5
    seed: int = 0
    weights: tuple[float, ...] | None = None
    num_tries: int | None = None
    draws_curve: bool = True
    num_points: int = 12
    rows_per_block: int | None = None
    also: tuple[str, ...] = ()
    attacks: tuple[Attack, ...] = ()
    diverges: bool = False


def pareto_front(costs: Sequence[Sequence[float]]) -> list[bool]:
    """For each point, whether no other one dominates it, that is, has no larger cost and at least one smaller cost."""

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)

    return [not any(dominates(other, point) for other in costs) for point in costs]
