"""What was measured of each method, recipe by recipe, as data. No torch here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dapa_merge.compare.pareto import pareto_front
from dapa_merge.evaluate.chance import Change, compare
from dapa_merge.evaluate.figures import Figures
from dapa_merge.search.oracle import requirement

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
        strength: How far every transplanted value moves from the target's to the source's.
        num_parameters: Of the target.
        prompts: The prompt set's name.
        retain: Share of the gain that is wanted: here of the source's, in a search of the full transplant's.
        max_over_refusal: Rise that it allows.
        max_perplexity: Ratio that it allows.
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
    strength: float
    num_parameters: int
    prompts: str
    retain: float
    max_over_refusal: float
    max_perplexity: float
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
        return compare(target.refused, arm.refused)

    @property
    def can_be_repaired(self) -> bool:
        """Whether the source is safer than the target, so that there is something to bring over."""
        return _Reached.of(self.alone).score > _Reached.of(self.before).score

    def repairs(self, arm: Arm) -> bool:
        """Whether a method brings the wanted share of the source's gain, within the recipe's limits."""
        return self.can_be_repaired and arm.figures is not None and self.complaint(arm.figures) is None

    def complaint(self, after: Figures) -> str | None:
        """What keeps a result from being a repair, where there is something to repair; None if nothing does."""
        wanted = requirement(
            _Reached.of(self.before),
            _Reached.of(self.alone),
            retain=self.retain,
            max_over_refusal=self.max_over_refusal,
            max_perplexity=self.max_perplexity,
            measure="DSR" if after.score is None else self.evaluator,
        )
        return wanted.complaint(_Reached.of(after))

    def front(self) -> list[bool]:
        """For each edit of the curve, whether it is on the Pareto front.

        It is if no other one that is as small refuses as many harmful and as few harmless prompts and keeps as much
        skill, and is better in one of these.
        """
        return pareto_front(
            [(point.share, -point.dsr, point.over_refusal, -(point.skill or 0.0)) for point in self.curve]
        )


class _Reached(NamedTuple):
    """What the recipe's evaluator goes by: its score of the model or, where it marks responses, DSR; and the limits."""

    score: float
    over_refusal: float
    perplexity: float

    @classmethod
    def of(cls, figures: Figures) -> _Reached:
        score = figures.dsr if figures.score is None else figures.score
        return cls(score, figures.over_refusal, figures.perplexity)


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
