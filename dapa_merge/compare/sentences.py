"""The findings of a comparison in sentences. No torch here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from dapa_merge.compare.methods import AUTO, BLENDS, DAPA, SOURCE, TARGET
from dapa_merge.compare.result import (
    Arm,
    Average,
    Row,
    RowMean,
    averages,
    groups,
    mean_skill,
    repairs_in_row,
)

# The share of the target's skill that a result must keep to be worth choosing.
MIN_KEPT = 0.5


def sentences(rows: Sequence[Row]) -> list[str]:
    """The findings, most important first."""
    if not rows:
        return []
    by_group = {average.group: average for average in averages(rows)}
    return [
        *_dapa(rows, by_group),
        *_not_repaired(rows),
        *_controls(rows, by_group),
        *_choices(rows),
        *_at_random(rows),
        *_noise(rows),
    ]


def _dapa(rows: Sequence[Row], by_group: dict[str, Average]) -> Iterator[str]:
    for group in (DAPA, AUTO):
        if (average := by_group.get(group)) is None:
            continue
        parts = [f"DSR {_points(average.gain)} points on average"]
        if average.perplexity is not None:
            parts.append(f"perplexity x {average.perplexity.value:.3f}")
        if average.skill is not None:
            parts.append(f"skill {_points(average.skill)} points")
        parts.append(f"{100 * average.share.value:.2f} % of the parameters replaced")
        effort = ""
        if average.tests is not None and average.seconds is not None:
            effort = f", after {average.tests.value:.1f} tests and {average.seconds.value:.1f} s of search on average"
        is_none = any((arm := row.arm(group)) is not None and arm.figures is None for row in rows)
        failing = "; a row in which nothing was found counts as its target" if is_none else ""
        yield (
            f"{average.label} repairs {average.num_repaired} of {average.num_rows} targets: {', '.join(parts)}"
            f"{effort}{failing}."
        )


def _not_repaired(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        dapa, auto = row.arm(DAPA), row.arm(AUTO)
        if not row.can_be_repaired:
            yield f"{row.name}: {nothing_to_repair(row)}."
            continue
        if dapa is None or row.repairs(dapa):
            continue
        if dapa.figures is None:
            text = f"{row.name}: {row.modules} alone cannot repair it"
        else:
            text = f"{row.name}: {row.modules} alone does not repair it, because {row.complaint(dapa.figures)}"
        yield f"{text}{_instead(row, auto)}."


def nothing_to_repair(row: Row) -> str:
    """A phrase for a row whose source is not safer than its target."""
    return f"nothing to repair; the target's DSR is {row.before.dsr:.3f}, the source's {row.alone.dsr:.3f}"


def _instead(row: Row, auto: Arm | None) -> str:
    if auto is None:
        return ""
    if auto.figures is None:
        return "; `modules: auto` finds nothing either"
    text = f"; `modules: auto` finds {auto.detail} (DSR {auto.figures.dsr:.3f}"
    if auto.skill is not None:
        text += f", skill {mean_skill(row.before):.3f} -> {auto.skill:.3f}"
    return f"{text})"


def _controls(rows: Sequence[Row], by_group: dict[str, Average]) -> Iterator[str]:
    names = {
        "random": "random units of the same modules, as many as DAPA selects",
        "random of auto": "as many as auto selects",
        "random-search": "the best of as many such draws as DAPA tested",
        "random-search of auto": "as auto tested",
        "fixed": "the repository's fixed middle layers",
        "gates": "all gates",
        "mlp": "the whole MLP of DAPA's layers",
        "mlp of auto": "of auto's layers",
        SOURCE: "the source itself",
    }
    parts = []
    for group, name in names.items():
        if (average := by_group.get(group)) is not None:
            skill = "" if average.skill is None else f" (skill {average.skill.points})"
            some = "" if average.num_rows == len(rows) else f" in {average.num_rows} rows"
            parts.append(f"{name} {average.gain.points}{skill}{some}")
    if parts:
        yield f"In points of DSR, on average: {', '.join(parts)}."


def choices(row: Row) -> list[Arm]:
    """The methods that repair a row's target, except the source and random selections, most skill first.

    Without skills, the smallest change of perplexity comes first.
    """

    def loss(arm: Arm) -> float:
        assert arm.figures is not None
        if arm.skill is not None:
            return -arm.skill
        ratio = arm.figures.perplexity / row.before.perplexity
        return abs(math.log(ratio)) if math.isfinite(ratio) else math.inf

    able = [arm for arm in row.arms if arm.method not in (TARGET, SOURCE, "random") and row.repairs(arm)]
    return sorted(able, key=lambda arm: (loss(arm), arm.share))


def keeps_enough(row: Row, arm: Arm) -> bool:
    """Whether a result keeps half of the target's skill; with less, the source would do."""
    before = mean_skill(row.before)
    return before is None or arm.skill is None or arm.skill >= MIN_KEPT * before


def _choices(rows: Sequence[Row]) -> Iterator[str]:
    repairable = [row for row in rows if row.can_be_repaired]
    if not repairable:
        return
    able = {row.name: [arm for arm in choices(row) if keeps_enough(row, arm)] for row in repairable}
    first = Counter(found[0].label for found in able.values() if found)
    counts = "; ".join(f"{label} in {number}" for label, number in first.most_common()) or "no method in any"
    has_skill = any(mean_skill(row.before) is not None for row in repairable)
    best = "keeps most skill, and at least half of it" if has_skill else "changes perplexity least"
    of_rows = "the one row" if len(repairable) == 1 else f"the {len(repairable)} rows"
    blended = (Counter(arm.method for arm in row.arms if arm.method in BLENDS) for row in rows)
    chance = "; the best of several settings of one method is favoured by chance"
    several = chance if any(number > 1 for found in blended for number in found.values()) else ""
    yield (
        f"Of the methods that repair, this one {best}: {counts}, of {of_rows} with something to repair. (Of equals "
        f"the smallest edit{several}.)"
    )
    missing = [row for row in repairable if not able[row.name]]
    kept = " and keeps half of the skill" if has_skill else ""
    helped = [row for row in missing if row.repairs(row.arms[1])]
    if helped:
        yield f"None of these methods repairs {_names(helped)}{kept} (single random draws aside)."
    if helpless := [row for row in missing if row not in helped]:
        yield f"None of these methods repairs {_names(helpless)} within the limits, nor does the source itself."


def _at_random(rows: Sequence[Row]) -> Iterator[str]:
    """The rows in which random selections do as well as a search."""
    for group, selected in (("random", DAPA), ("random of auto", AUTO)):
        found = [row for row in rows if _is_as_good(row, groups(row.arms).get(group, []), row.arm(selected))]
        if found:
            yield (
                f"Most random selections as large as {'auto' if group.endswith('auto') else 'DAPA'}'s repair "
                f"{_names(found)} as well: there the choice of units does not matter."
            )


def _is_as_good(row: Row, drawn: Sequence[Arm], selected: Arm | None) -> bool:
    """Whether most random draws, other than the selection itself, repair a row's target."""
    others = [arm for arm in drawn if selected is None or arm.detail != selected.detail]
    return bool(others) and repairs_in_row(row, others)


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(row.name for row in rows)


def _noise(rows: Sequence[Row]) -> Iterator[str]:
    dubious = [
        row
        for row in rows
        if (arm := row.arm(DAPA)) is not None
        and arm.figures is not None
        and arm.figures.dsr > row.before.dsr
        and row.change(arm).within_noise
    ]
    if dubious:
        yield f"DAPA's gain is within noise (McNemar, p >= 0.05) in {_names(dubious)}."


def _points(mean: RowMean) -> str:
    """A change in percentage points, with its interval."""
    return mean.points if mean.span is None else f"{mean.points} (95 % interval {mean.span})"
