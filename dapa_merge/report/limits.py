"""Limits on the figures of a report, for unattended jobs: `dapa-merge gate`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dapa_merge.checkpoint.location import without_paths
from dapa_merge.errors import UsageError, markdown
from dapa_merge.measure.figures import Figures
from dapa_merge.report.report import Report
from dapa_merge.report.tables import SKILL, skill_label


@dataclass(frozen=True)
class Limits:
    """Limits of a result; None and () mean no limit.

    Attributes:
        max_divergence: Limit of the result's divergence from the target, in nats per token.
        max_perplexity_ratio: Limit of the result's perplexity divided by the target's.
        min_kept: Limit of the share of the keep prompts that are answered word for word as before.
        max_kept_refused: Limit of the share of them that the result refuses and the target does not.
        min_skills: Limits of the result's skills, by name; None stands for every skill.
        min_skill_kept: Limit of each skill divided by the target's.
        confident: Whether the worse end of a 95 % interval, if any, must be within the limit.
    """

    min_dsr: float | None = None
    min_dsr_gain: float | None = None
    max_over_refusal: float | None = None
    max_over_refusal_rise: float | None = None
    max_perplexity: float | None = None
    max_perplexity_ratio: float | None = None
    max_divergence: float | None = None
    min_kept: float | None = None
    max_kept_refused: float | None = None
    min_skills: tuple[tuple[str | None, float], ...] = ()
    min_skill_kept: float | None = None
    confident: bool = False


@dataclass(frozen=True)
class LimitCheck:
    """One figure and its limit.

    Attributes:
        value: The measured value; None, if it was not measured, never passes.
        is_floor: Whether the value must be at least the limit, rather than at most.
    """

    figure: str
    value: float | None
    limit: float
    is_floor: bool

    @property
    def passes(self) -> bool:
        if self.value is None or not math.isfinite(self.value):
            return False
        # A share of prompts right at the limit must not fail by the last bit of a division.
        return self.value >= self.limit - 1e-9 if self.is_floor else self.value <= self.limit + 1e-9

    @property
    def found(self) -> str:
        return "not measured" if self.value is None or not math.isfinite(self.value) else f"{self.value:.3f}"

    @property
    def asked(self) -> str:
        return f"{'at least' if self.is_floor else 'at most'} {self.limit:g}"


def judge(report: Report, limits: Limits) -> list[LimitCheck]:
    """Check every figure that has a limit.

    Raises:
        UsageError: If no limit is given, or one is not finite.
    """
    asked = [*_single_figures(report, limits), *_skills(report, limits)]
    found = [LimitCheck(name, value, limit, is_floor) for name, value, limit, is_floor in asked if limit is not None]
    if any(not math.isfinite(check.limit) for check in found):
        raise UsageError("limits must be finite numbers")
    if not found:
        raise UsageError("no limit is given; add one, for example --min-dsr 0.9")
    return found


# A figure's name and value, its limit, and whether that is a floor.
Asked = tuple[str, "float | None", "float | None", bool]


def _single_figures(report: Report, limits: Limits) -> Iterator[Asked]:
    before, after = report.before, report.after
    low, high = (f" ({end} end of its 95 % interval)" if limits.confident else "" for end in ("lower", "upper"))
    dsr = refused = ratio = None
    if after is not None:
        dsr = after.dsr_interval[0] if limits.confident else after.dsr
        refused = after.over_refusal_interval[1] if limits.confident else after.over_refusal
    if before is not None and after is not None and before.perplexity:
        ratio = after.perplexity / before.perplexity
    yield f"DSR{low}", dsr, limits.min_dsr, True
    yield "DSR gain", _rise(before, after, "dsr"), limits.min_dsr_gain, True
    yield f"over-refusal{high}", refused, limits.max_over_refusal, False
    yield "rise of over-refusal", _rise(before, after, "over_refusal"), limits.max_over_refusal_rise, False
    yield "perplexity", after.perplexity if after else None, limits.max_perplexity, False
    yield "perplexity, to the target's", ratio, limits.max_perplexity_ratio, False
    yield "divergence", after.divergence if after else None, limits.max_divergence, False
    same = newly_refused = None
    if after is not None and after.kept is not None:
        same = after.kept.same_interval[0] if limits.confident else after.kept.share_same
        newly_refused = after.kept.share_newly_refused
    yield f"keep prompts answered as before{low}", same, limits.min_kept, True
    yield "keep prompts newly refused", newly_refused, limits.max_kept_refused, False


def _rise(before: Figures | None, after: Figures | None, name: str) -> float | None:
    if before is None or after is None:
        return None
    return float(getattr(after, name) - getattr(before, name))


def _skills(report: Report, limits: Limits) -> Iterator[Asked]:
    skills = {skill.name: skill for skill in report.after.skills} if report.after else {}
    for name, floor in limits.min_skills:
        for one in [name] if name is not None else list(skills) or [SKILL]:
            skill = skills.get(one)
            has_interval = skill is not None and limits.confident and skill.interval is not None
            worse = " (lower end of its 95 % interval)" if has_interval else ""
            value = None if skill is None else skill.interval[0] if has_interval and skill.interval else skill.score
            yield f"{skill_label(one)}{worse}", value, floor, True
    if limits.min_skill_kept is not None:
        before = {skill.name: skill.score for skill in report.before.skills} if report.before else {}
        if not skills:
            yield f"{skill_label(SKILL)}, to the target's", None, limits.min_skill_kept, True
        for one, skill in skills.items():
            had = before.get(one)
            # A target without skill cannot lose any.
            kept = None if had is None else skill.score / had if had else 1.0
            yield f"{skill_label(one)}, to the target's", kept, limits.min_skill_kept, True


def parse_skill(value: str) -> tuple[str | None, float]:
    """Read `0.5` or `NAME=0.5`.

    Raises:
        UsageError: If it is neither.
    """
    name, equals, number = value.rpartition("=")
    try:
        floor = float(number)
    except ValueError:
        floor = math.nan
    if not math.isfinite(floor) or (equals and not name):
        raise UsageError(f"--min-skill is {value!r}; write a number, or NAME=NUMBER")
    return name or None, floor


def as_json(checks: Sequence[LimitCheck]) -> dict[str, Any]:
    """Plain data for a program."""
    return {
        "passed": all(check.passes for check in checks),
        "gates": [
            {
                "figure": check.figure,
                "value": check.value if check.value is not None and math.isfinite(check.value) else None,
                "limit": check.limit,
                "at": "least" if check.is_floor else "most",
                "passed": check.passes,
            }
            for check in checks
        ],
    }


def as_markdown(report: Report, checks: Sequence[LimitCheck]) -> str:
    """A table for the summary of a CI job."""
    names = (markdown(without_paths(name)) for name in (report.target, report.source))
    lines = [f"### {', repaired by '.join(names)}", ""]
    lines += ["| figure | found | asked | |", "|---|---|---|---|"]
    for check in checks:
        word = "passes" if check.passes else "**fails**"
        lines.append(f"| {markdown(check.figure)} | {check.found} | {check.asked} | {word} |")
    return "\n".join([*lines, "", ""])
