"""What a method does on average over the recipes. No torch here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dapa_merge.compare.result import AUTO, DAPA, SOURCE, TARGET, Arm, Row, groups, mean_skill
from dapa_merge.evaluate.chance import mean_interval

# What a method does in a row; None if it does not apply.
Value = Callable[[Row, Arm], "float | None"]
# Of these, a row in which a search found nothing counts as its untouched target: whoever relied on them has that.
MAY_FIND_NOTHING = (DAPA, AUTO, "mlp", "random", "random-search")


@dataclass(frozen=True)
class Mean:
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
    gain: Mean
    over_refusal: Mean
    perplexity: Mean | None
    skill: Mean | None
    share: Mean
    tests: Mean | None
    seconds: Mean | None


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

    def mean(value: Value, *, is_change: bool = False) -> Mean | None:
        found = mean_of([mean_in_row(row, arms, value) for row, arms in counted])
        if found is None or found.interval is None or not is_change:
            return found
        # No share changes by more than all.
        return Mean(found.value, (max(-1.0, found.interval[0]), min(1.0, found.interval[1])))

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


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """The mean of those that are there; None if none is."""
    there = [value for value in values if value is not None]
    return Mean(statistics.fmean(there), mean_interval(there)) if there else None
