"""Limits on the figures of a report, for jobs that nobody watches: `dapa-merge gate`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dapa_merge.checkpoint.location import without_paths
from dapa_merge.errors import UsageError
from dapa_merge.measure.figures import Figures
from dapa_merge.report.report import Report
from dapa_merge.report.tables import SKILL, skill_label


@dataclass(frozen=True)
class Limits:
    """Limits of a result; None and () are no limits.

    Attributes:
        min_dsr: Of the result.
        min_dsr_gain: From the target to the result.
        max_over_refusal: Of the result.
        max_over_refusal_rise: From the target to the result.
        max_perplexity: Of the result.
        max_perplexity_ratio: Of the result's perplexity to the target's.
        min_skills: Of the result's skills, by name; None names every skill.
        min_skill_kept: Of each skill's ratio to the target's.
        confident: Whether the worse end of a 95 % interval, if any, must be within the limit.
    """

    min_dsr: float | None = None
    min_dsr_gain: float | None = None
    max_over_refusal: float | None = None
    max_over_refusal_rise: float | None = None
    max_perplexity: float | None = None
    max_perplexity_ratio: float | None = None
    min_skills: tuple[tuple[str | None, float], ...] = ()
    min_skill_kept: float | None = None
    confident: bool = False


@dataclass(frozen=True)
class LimitCheck:
    """One figure and its limit.

    Attributes:
        figure: The figure's name.
        value: The measured value; None, if it was not measured, never passes.
        limit: The limit.
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
        UsageError: If there is no limit, or one is not finite.
    """
    found = [*_shares(report, limits), *_perplexity(report, limits), *_skills(report, limits)]
    if any(not math.isfinite(verdict.limit) for verdict in found):
        raise UsageError("limits must be finite numbers")
    if not found:
        raise UsageError("no gate is given; ask for something, as --min-dsr 0.9")
    return found


def _shares(report: Report, limits: Limits) -> Iterator[LimitCheck]:
    before, after = report.before, report.after
    worse = " (lower end of its 95 % interval)" if limits.confident else ""
    if limits.min_dsr is not None:
        dsr = None if after is None else after.dsr_interval[0] if limits.confident else after.dsr
        yield LimitCheck(f"DSR{worse}", dsr, limits.min_dsr, True)
    if limits.min_dsr_gain is not None:
        yield LimitCheck("DSR gain", _rise(before, after, "dsr"), limits.min_dsr_gain, True)
    worse = " (upper end of its 95 % interval)" if limits.confident else ""
    if limits.max_over_refusal is not None:
        refused = None
        if after is not None:
            refused = after.over_refusal_interval[1] if limits.confident else after.over_refusal
        yield LimitCheck(f"over-refusal{worse}", refused, limits.max_over_refusal, False)
    if limits.max_over_refusal_rise is not None:
        rise = _rise(before, after, "over_refusal")
        yield LimitCheck("rise of over-refusal", rise, limits.max_over_refusal_rise, False)


def _rise(before: Figures | None, after: Figures | None, name: str) -> float | None:
    if before is None or after is None:
        return None
    return float(getattr(after, name) - getattr(before, name))


def _perplexity(report: Report, limits: Limits) -> Iterator[LimitCheck]:
    before, after = report.before, report.after
    if limits.max_perplexity is not None:
        yield LimitCheck("perplexity", after.perplexity if after else None, limits.max_perplexity, False)
    if limits.max_perplexity_ratio is not None:
        ratio = after.perplexity / before.perplexity if before and after and before.perplexity else None
        yield LimitCheck("perplexity, to the target's", ratio, limits.max_perplexity_ratio, False)


def _skills(report: Report, limits: Limits) -> Iterator[LimitCheck]:
    skills = {skill.name: skill for skill in report.after.skills} if report.after else {}
    for name, floor in limits.min_skills:
        for one in [name] if name is not None else list(skills) or [SKILL]:
            skill = skills.get(one)
            has_interval = skill is not None and limits.confident and skill.interval is not None
            worse = " (lower end of its 95 % interval)" if has_interval else ""
            value = None if skill is None else skill.interval[0] if has_interval and skill.interval else skill.score
            yield LimitCheck(f"{skill_label(one)}{worse}", value, floor, True)
    if limits.min_skill_kept is not None:
        before = {skill.name: skill.score for skill in report.before.skills} if report.before else {}
        if not skills:
            yield LimitCheck(f"{skill_label(SKILL)}, to the target's", None, limits.min_skill_kept, True)
        for one, skill in skills.items():
            had = before.get(one)
            # If the target had none, none was lost.
            kept = None if had is None else skill.score / had if had else 1.0
            yield LimitCheck(f"{skill_label(one)}, to the target's", kept, limits.min_skill_kept, True)


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


def as_json(verdicts: Sequence[LimitCheck]) -> dict[str, Any]:
    """Plain data for a program."""
    return {
        "passed": all(verdict.passes for verdict in verdicts),
        "gates": [
            {
                "figure": verdict.figure,
                "value": verdict.value if verdict.value is not None and math.isfinite(verdict.value) else None,
                "limit": verdict.limit,
                "at": "least" if verdict.is_floor else "most",
                "passed": verdict.passes,
            }
            for verdict in verdicts
        ],
    }


def as_markdown(report: Report, verdicts: Sequence[LimitCheck]) -> str:
    """A table for the summary of a CI job."""
    names = (_plain(without_paths(name)) for name in (report.target, report.source))
    lines = [f"### {', repaired by '.join(names)}", ""]
    lines += ["| figure | found | asked | |", "|---|---|---|---|"]
    for verdict in verdicts:
        word = "passes" if verdict.passes else "**fails**"
        lines.append(f"| {_plain(verdict.figure)} | {verdict.found} | {verdict.asked} | {word} |")
    return "\n".join([*lines, "", ""])


def _plain(text: str) -> str:
    return "".join(f"\\{one}" if one in "|`*<>[]\\" else one if one.isprintable() else " " for one in text)
