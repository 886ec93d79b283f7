"""What was measured of each method, recipe by recipe, as data. No torch here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dapa_merge.compare.pareto import pareto_front
from dapa_merge.evaluate.chance import Change, compare
from dapa_merge.evaluate.figures import Figures

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
        num_parameters: Of the target.
        prompts: The prompt set's name.
        retain: Share of the gain that the recipe wants: here of the source's, in a search of the full transplant's.
        max_over_refusal: Rise that it allows.
        max_perplexity: Ratio that it allows.
        arms: Target and source first.
        curve: Edits of every size; empty if none were measured.
        selected: Marks of the curve's path: the share that the search selected, if it did.
    """

    name: str
    target: str
    source: str
    architecture: str
    modules: str
    num_parameters: int
    prompts: str
    retain: float
    max_over_refusal: float
    max_perplexity: float
    arms: tuple[Arm, ...]
    curve: tuple[Point, ...] = ()
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
        return compare(target.refused, arm.refused)

    def repairs(self, arm: Arm) -> bool:
        """Whether a method brings the share of the source's gain that the recipe wants, within the recipe's limits."""
        before, after = self.before, arm.figures
        gain = self.alone.dsr - before.dsr
        if after is None or gain <= 0:
            return False
        return (
            after.dsr >= before.dsr + self.retain * gain
            and after.over_refusal <= before.over_refusal + self.max_over_refusal
            and not after.perplexity > before.perplexity * self.max_perplexity
        )

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
