"""A comparison as a page in Markdown, as LaTeX for a paper, and as CSV for programs. No torch here."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from tabulate import tabulate

from dapa_merge.compare import charts
from dapa_merge.compare.methods import AUTO, DAPA, METHODS, NEEDS, RULE, declared
from dapa_merge.compare.result import Arm, Average, Cost, Further, Row, averages, groups, mean_skill, points
from dapa_merge.compare.sentences import choices, nothing_to_repair, sentences
from dapa_merge.errors import markdown, markdown_code, printable
from dapa_merge.report.drawing import Chart
from dapa_merge.report.tables import span
from dapa_merge.search.requirement import constraints_of, limited

HOW = (
    "DSR: the share of harmful prompts that are refused, as judged by the recipe's evaluator; if that scores a model "
    "as a whole, the rules judge, and the score decides what repairs. Figures are measured on the target in memory, "
    "with prompts that the search did not ask (all prompts, if the recipe names its layers), the same for all methods "
    "of a recipe. *Repairs*: reaches at least the share `retain` of the source's gain, within the recipe's limits of "
    "{limited} (random selections: with more than half of the seeds). A search asks for that share of the gain of all "
    "its units, so it may find less. A row in which a search found nothing counts as its untouched target, also for "
    "methods that use its selection: the whole MLP of its layers; random units of the same modules and size (*random "
    "like*); and the best of as many of these as the search made tests, by the prompts of the search (*best random "
    "like*). Skill is the mean of all skills that the recipe asks; changes are in percentage points. Intervals are "
    "95 %: Wilson's for the figures of a row, for more prompts like these; Student's t for averages over recipes, "
    "which are taken as independent. Seconds and tests are those of the search; of a method with settings, they "
    "are those of trying these on the prompts of choice and search, none of which the report has (unless the recipe "
    f"names its layers). Such a method is measured with one setting: {RULE}."
)
FRONT = (
    "Edits of every size: first the selection of {whose} (without a selection, blocks of all units of its search), "
    "then the other units of the search, then the rest of the MLPs, each in the order of their attribution; and random "
    "edits of the same sizes. On the Pareto front: no edit that is as small refuses as many harmful and as few "
    "harmless prompts, keeps as much skill, and is better in one of these."
)


def page(rows: Sequence[Row], failures: Mapping[str, str], pictures: Collection[str]) -> str:
    """Write the page of the rows, the failures by name, and the existing pictures."""
    parts = ["# Comparison", HOW.format(limited=limited({key for row in rows for key in row.settings}))]
    if rows:
        parts += ["\n".join(f"- {_safe(sentence)}" for sentence in sentences(rows))]
        for key, title in ((DAPA, "## Before and after"), (AUTO, "## Before and after, `modules: auto`")):
            if any(row.arm(key) for row in rows):
                parts += [title, paper_table(rows, key).text(MARKDOWN)]
        parts += ["## Methods", methods_table(rows).text(MARKDOWN)]
        parts += _pictures([chart for chart in charts.CHARTS if chart.parts is None], rows, pictures)
        applied = {arm.method for row in rows for arm in row.arms}
        parts += ["## What the methods are", "\n".join(declared(key for key in METHODS if key in applied))]
    for row in rows:
        parts += _row(row, pictures)
    if failures:
        parts += ["## Not measured", "\n".join(f"- {_safe(name)}: {_safe(why)}" for name, why in failures.items())]
    return "\n\n".join(parts) + "\n"


def _row(row: Row, pictures: Collection[str]) -> list[str]:
    parts = [
        f"## {_safe(row.name)}",
        f"Target {markdown_code(row.target)}, source {markdown_code(row.source)}: {_safe(row.architecture)}, "
        f"{row.num_parameters:,} parameters, prompts {markdown_code(row.prompts)}, {row.before.num_harmful} harmful "
        f"and {row.before.num_harmless} harmless, judged by {markdown_code(row.evaluator)}"
        f"{'' if row.arithmetic is None else f'; all models with {row.arithmetic}'}.",
        arms_table(row).text(MARKDOWN),
    ]
    parts += [f"{arm.label}: {_safe(arm.why_not)}" for arm in row.arms if arm.why_not is not None]
    if (further := further_table(row)) is not None:
        parts += ["The same with other prompts, under attacks, and by divergence:", further.text(MARKDOWN)]
    if needs := _needs(row):
        parts.append(needs)
    if any(arm.tuning is not None for arm in row.arms):
        parts += ["Settings that were tried, on the prompts of choice and search:", trials_table(row).text(MARKDOWN)]
    if row.edit.note:
        parts.append(row.edit.note)
    if row.before.score is not None:
        scored = [(arm.label, arm.figures.score) for arm in row.arms if arm.figures is not None]
        scores = [f"{label} {score:.3f}" for label, score in scored if score is not None]
        parts.append(f"Score of {markdown_code(row.evaluator)}: {', '.join(scores)}.")
    parts.append(_verdict(row))
    if memory := _memory(row):
        parts.append(memory)
    if row.no_curve is not None:
        parts.append(f"No edits of every size, because {_safe(row.no_curve)}.")
    shown = _pictures([chart for chart in charts.CHARTS if chart.parts is not None], [row], pictures)
    if shown:
        parts.append(FRONT.format(whose="`modules: auto`" if row.followed == AUTO else "DAPA"))
    return parts + shown


def _needs(row: Row) -> str | None:
    """Name the special requirements of the applied methods, in a sentence."""
    takers: dict[str, dict[str, None]] = {need: {} for need in NEEDS}
    for arm in row.arms:
        if arm.figures is not None and arm.method in METHODS:
            for need in METHODS[arm.method].needs:
                takers[need][arm.label] = None
    told = [f"{NEEDS[need]} ({', '.join(labels)})" for need, labels in takers.items() if labels]
    return f"Besides target, source and prompts, methods take {'; '.join(told)}." if told else None


def _verdict(row: Row) -> str:
    """The methods that repair a row's target, in a sentence."""
    if not row.can_be_repaired:
        return f"There is {nothing_to_repair(row)}."
    if able := choices(row):
        named = [arm.label if arm.skill is None else f"{arm.label} ({arm.skill:.3f})" for arm in able]
        return f"Methods that repair it, most skill first: {', '.join(named)}."
    if (why := row.complaint(row.alone)) is None:
        return "None of these methods but the source repairs it within the recipe's limits (single random draws aside)."
    return f"None of these methods repairs it within the recipe's limits, nor does the source itself: {_safe(why)}."


def _memory(row: Row) -> str | None:
    costs: list[Cost] = [arm.cost for arm in row.arms if arm.cost is not None]
    peaks = (
        {place: max(cost.peak_bytes.get(place, 0) for cost in costs) for place in ("host", "device")} if costs else {}
    )
    texts = [f"{num_bytes / 1e6:,.0f} MB ({place})" for place, num_bytes in peaks.items() if num_bytes]
    return f"Peak memory of the search: {', '.join(texts)}." if texts else None


def _pictures(wanted: Iterable[Chart], rows: Sequence[Row], pictures: Collection[str]) -> list[str]:
    return [
        f"![{_safe(chart.caption_of(shown))}](figures/{quote(name)}.png)"
        for chart in wanted
        for name, shown in chart.shown(rows).items()
        if f"{name}.png" in pictures
    ]


def _safe(text: str | None) -> str:
    """Untrusted text in one line, without markup."""
    return markdown(" ".join((text or "").split()))


NONE = "-"
MARKDOWN, LATEX = "pipe", "latex_booktabs"
PAPER_HEAD = (
    "recipe", "DSR", "repaired", "95 %", "gain", "over-refusal", "perplexity", "skill", "parameters", "tests",
    "seconds",
)  # fmt: skip
METHOD_HEAD = (
    "method", "repairs", "DSR gain", "95 %", "over-refusal", "perplexity", "skill", "95 %", "parameters",
    "tests", "seconds",
)  # fmt: skip
ARM_HEAD = (
    "method", "what", "DSR", "95 %", "over-refusal", "perplexity", "divergence", "skill", "parameters", "tests",
    "seconds",
)  # fmt: skip
ARM_KEYS = (
    "recipe", "architecture", "evaluator", "method", "key", "label", "detail", "why_not", "score", "num_harmful", "dsr",
    "dsr_low", "dsr_high", "dsr_gain", "dsr_p_value", "num_harmless", "over_refusal", "over_refusal_low",
    "over_refusal_high", "perplexity", "perplexity_ratio", "divergence", "skill", "parameters_changed", "share_changed",
    "repairs", "search_tests", "search_seconds", "search_peak_host_bytes", "search_peak_device_bytes",
    "measuring_seconds",
)  # fmt: skip
POINT_KEYS = (
    "recipe", "path", "share_changed", "num_pieces", "dsr", "dsr_low", "dsr_high", "over_refusal", "skill",
    "perplexity", "on_front",
)  # fmt: skip


class Table(NamedTuple):
    """The cells of a table as text."""

    head: Sequence[str]
    cells: Sequence[Sequence[str]]

    def text(self, kind: str) -> str:
        """The table as `MARKDOWN` or `LATEX`; no cell can break the layout."""
        cells = [[_plain(cell) for cell in row] for row in self.cells]
        if kind == MARKDOWN:
            cells = [[markdown(cell) for cell in row] for row in cells]
        # Cells are shown as they are, never taken for numbers.
        columns = ["left", *["right"] * (len(self.head) - 1)]
        text = str(tabulate(cells, self.head, tablefmt=kind, disable_numparse=True, colalign=columns))
        return text.replace(r"-\ensuremath{>}", r"$\rightarrow$") if kind == LATEX else text


def paper_table(rows: Sequence[Row], group: str = DAPA) -> Table:
    """The paper's table 1: before and after by one method, a line for each recipe, and the average."""
    cells = []
    for row in rows:
        arm = row.arm(group)
        if arm is None or arm.figures is None:
            found = ["not asked", NONE, NONE, NONE] if arm is None else ["no repair", "+0.00", *_cost(arm)]
            blank = [NONE] * (len(PAPER_HEAD) - 7)
            cells.append([row.name, _share(row.before.dsr), found[0], NONE, found[1], *blank, *found[2:]])
        else:
            cells.append([row.name, *_paper_cells(row, arm)])
    average = next((one for one in averages(rows) if one.group == group), None)
    if average is not None and len(rows) > 1:
        cells.append(_average_line(average))
    return Table(PAPER_HEAD, cells)


def _paper_cells(row: Row, arm: Arm) -> list[str]:
    after = arm.figures
    assert after is not None
    return [
        _share(row.before.dsr),
        _share(after.dsr),
        span(after.dsr_interval),
        points(after.dsr - row.before.dsr),
        f"{row.before.over_refusal:.3f} -> {after.over_refusal:.3f}",
        f"{_perplexity(row.before.perplexity)} -> {_perplexity(after.perplexity)}",
        NONE if arm.skill is None else f"{_share(mean_skill(row.before))} -> {_share(arm.skill)}",
        _percent(arm.share),
        *_cost(arm),
    ]


def _average_line(average: Average) -> list[str]:
    return [
        f"average of {average.num_rows}",
        NONE,
        NONE,
        NONE,
        average.gain.points if average.gain.span is None else f"{average.gain.points} ({average.gain.span})",
        average.over_refusal.points,
        *_skill_and_cost(average, with_span=False),
    ]


def methods_table(rows: Sequence[Row]) -> Table:
    """Every method, averaged over the recipes; changes from the target in percentage points."""
    cells = [
        [
            one.label,
            f"{one.num_repaired} of {one.num_rows}",
            one.gain.points,
            one.gain.span or NONE,
            one.over_refusal.points,
            *_skill_and_cost(one, with_span=True),
        ]
        for one in averages(rows)
    ]
    return Table(METHOD_HEAD, cells)


def _skill_and_cost(one: Average, *, with_span: bool) -> list[str]:
    skill = [NONE, NONE] if one.skill is None else [one.skill.points, one.skill.span or NONE]
    return [
        NONE if one.perplexity is None else f"x {one.perplexity.value:.3f}",
        *skill[: 1 + with_span],
        _percent(one.share.value),
        *(NONE if mean is None else f"{mean.value:.1f}" for mean in (one.tests, one.seconds)),
    ]


def arms_table(row: Row) -> Table:
    """Every method on one target; random selections by their mean and range."""
    return Table(ARM_HEAD, [_arm_cells(arms) for arms in groups(row.arms).values()])


def further_table(row: Row) -> Table | None:
    """Further figures with their intervals; None if absent."""
    columns = list(dict.fromkeys((one.name, one.figure) for arm in row.arms for one in arm.further))
    if not columns:
        return None
    sizes = {(one.name, one.figure): one.num_prompts for arm in row.arms for one in arm.further}
    head = ["method", *(f"{figure}, {name} ({sizes[name, figure]})" for name, figure in columns)]
    cells = []
    for arm in row.arms:
        if arm.further:
            found = {(one.name, one.figure): one for one in arm.further}
            cells.append([f"{arm.label}{arm.key[len(arm.group) :]}", *(_further(found.get(key)) for key in columns)])
    return Table(head, cells)


def _further(one: Further | None) -> str:
    if one is None:
        return NONE
    return _divergence(one.value) if one.interval is None else f"{one.value:.3f} ({span(one.interval)})"


def trials_table(row: Row) -> Table:
    """Every setting that was tried, with the figures of the recipe's constraints; one of each method was taken."""
    constraints = constraints_of(row.settings)
    cells = []
    for arm in row.arms:
        tuning = arm.tuning
        for number, trial in enumerate(tuning.trials if tuning else ()):
            figures = [trial.figures.get(one.figure, math.nan) for one in constraints]
            shown = [NONE if math.isnan(figure) else f"{figure:.3f}" for figure in figures]
            is_taken = tuning is not None and number == tuning.chosen
            cells.append([arm.label, trial.setting, *shown, "yes" if is_taken else "", trial.complaint or "is within"])
    return Table(("method", "setting", *(one.label for one in constraints), "taken", "limits"), cells)


def _arm_cells(arms: Sequence[Arm]) -> list[str]:
    first = arms[0]
    if first.figures is None:
        return [first.label, first.detail, *[NONE] * (len(ARM_HEAD) - 4), *_cost(first)]
    figures = [arm.figures for arm in arms if arm.figures is not None]
    if first.method == "random":
        dsr = [one.dsr for one in figures]
        detail, between = f"{len(arms)} seed{'s' if len(arms) > 1 else ''}", f"range {min(dsr):.3f}-{max(dsr):.3f}"
    else:
        detail, between = first.detail, span(first.figures.dsr_interval)
    skills = [arm.skill for arm in arms if arm.skill is not None]
    return [
        first.label,
        detail,
        _share(_mean(one.dsr for one in figures)),
        between,
        _share(_mean(one.over_refusal for one in figures)),
        _perplexity(_mean(one.perplexity for one in figures)),
        _divergence(_mean(one.divergence for one in figures)),
        _share(_mean(skills) if skills else None),
        _percent(_mean(arm.share for arm in arms)),
        *_cost(first),
    ]


def arms_csv(rows: Sequence[Row]) -> str:
    """A line for each method, seed and weight of each recipe."""
    return _csv(
        ARM_KEYS,
        ([row.name, row.architecture, row.evaluator, *_arm_fields(row, arm)] for row in rows for arm in row.arms),
    )


def _arm_fields(row: Row, arm: Arm) -> list[Any]:
    fields: list[Any] = [arm.method, arm.key, arm.label, arm.detail, arm.why_not]
    figures = arm.figures
    if figures is None:
        fields += [None] * 18
    else:
        change = row.change(arm)
        fields += [
            figures.score, figures.num_harmful, figures.dsr, *figures.dsr_interval, figures.dsr - row.before.dsr,
            change.p_value,
            figures.num_harmless, figures.over_refusal, *figures.over_refusal_interval, figures.perplexity,
            figures.perplexity / row.before.perplexity, figures.divergence, arm.skill, arm.num_parameters, arm.share,
            row.repairs(arm),
        ]  # fmt: skip
    cost, peak = arm.cost, arm.cost.peak_bytes if arm.cost else {}
    fields += [cost and cost.tests, cost and cost.seconds, peak.get("host"), peak.get("device")]
    return [*fields, arm.seconds if figures else None]


def points_csv(rows: Sequence[Row]) -> str:
    """A line for each edit of each recipe's curve."""
    lines: list[list[Any]] = []
    for row in rows:
        for point, is_best in zip(row.curve, row.front(), strict=True):
            lines.append(
                [
                    row.name, point.path, point.share, point.num_units, point.dsr, *point.dsr_interval,
                    point.over_refusal, point.skill, point.perplexity, is_best,
                ]
            )  # fmt: skip
    return _csv(POINT_KEYS, lines)


def latex(rows: Sequence[Row]) -> str:
    """The paper's table and the table of methods, each as a `tabular` with the rules of the package booktabs."""
    parts = ["% Needs \\usepackage{booktabs}. Made by dapa-merge compare.\n% One line for each recipe."]
    if any(row.arm(DAPA) for row in rows):
        parts.append(paper_table(rows).text(LATEX))
    if any(row.arm(AUTO) for row in rows):
        parts += ["% The same with modules: auto.", paper_table(rows, AUTO).text(LATEX)]
    parts += ["% Every method, averaged; changes from the target in points.", methods_table(rows).text(LATEX)]
    return "\n".join(parts) + "\n"


def _csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_harmless(value) for value in line] for line in lines)
    return buffer.getvalue()


def _harmless(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    return f"'{printable(value)}" if value.startswith(("=", "+", "-", "@")) else printable(value)


def _plain(cell: str) -> str:
    return printable(" ".join(cell.split())) or NONE


def _mean(values: Iterable[float]) -> float:
    there = list(values)
    return sum(there) / len(there)


def _divergence(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.2g}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _perplexity(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.3f}"


def _cost(arm: Arm) -> list[str]:
    return [NONE, NONE] if arm.cost is None else [str(arm.cost.tests), f"{arm.cost.seconds:.1f}"]
