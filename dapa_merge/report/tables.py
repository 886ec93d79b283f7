"""Reports, plans and searches as tables for people, and as plain data for `--json`. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dapa_merge.checkpoint.units import Unit, architecture_name
from dapa_merge.errors import printable
from dapa_merge.measure.figures import SEARCH_PROMPTS, Change, Figures
from dapa_merge.plan.edit import EDITS
from dapa_merge.plan.ladder import Ladder
from dapa_merge.plan.plan import Plan, cut, join, search_memory
from dapa_merge.plan.selection import count_changed, given_selection, num_changed, why_equal
from dapa_merge.recipe.asking import NO_TEMPLATE
from dapa_merge.recipe.constraints import CONSTRAINTS, SCORE, shown
from dapa_merge.recipe.parameters import spans
from dapa_merge.report.report import Report, jsonable
from dapa_merge.report.sentences import meaning_lines, prompts_name
from dapa_merge.search.requirement import constraints_of, limits_text
from dapa_merge.search.result import Point, Search, is_of_bundles, needed, readable_certificate, thrift

TableRow = tuple[str, list[str]]
# The name of the skill of a prompt set.
SKILL = "skill"
# The head of a table of points.
POINT_HEAD = f"point ({SEARCH_PROMPTS})"
# Points beside each other in a table; more are too wide for a terminal.
MAX_COLUMNS = 5


def figures_table(names: Sequence[str], columns: Sequence[Figures], head: str = "") -> Table:
    """The figures, a column for each model; the head says which prompts they are of."""
    return _table(names, figure_rows(columns), head)


def categories_table(names: Sequence[str], columns: Sequence[Figures]) -> Table | None:
    """The refused prompts of each category; None if the prompts have no categories."""
    rows = category_rows(columns)
    return _table(names, rows) if rows else None


def print_evaluated(
    measured: Mapping[str, Figures],
    changes: Mapping[str, tuple[Change, Change]],
    console: Console,
    asked: Iterable[str] = (),
) -> None:
    """Print the figures of models side by side, the changes from the first, and how they were asked."""
    names, figures = _column_names(list(measured)), list(measured.values())
    console.print(figures_table(names, figures))
    for (model, after), name in zip(measured.items(), names, strict=True):
        for label, fact in _changes_between(figures[0], after, *changes.get(model, (None, None))):
            _tell(console, f"{f'{name}, {label}':<20} {fact}")
    # A served model has none.
    for text in dict.fromkeys(one.text for one in figures if one.text):
        _tell(console, f"perplexity of {text}")
    for line in asked:
        _tell(console, line)
    for model, name in zip(measured, names, strict=True):
        if model != name:
            _tell(console, f"{name} is {model}")
    if table := categories_table(names, figures):
        console.print(table)


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print each text as one line, however long."""
    for line in lines:
        _tell(console, line)


def _column_names(models: Sequence[str]) -> list[str]:
    """The last parts of models' names, where these differ: whole paths make columns that no terminal has room for."""
    last = [model.rstrip("/").rpartition("/")[2] for model in models]
    return last if len(models) > 1 and len({*last, ""}) == len(models) + 1 else list(models)


def figure_rows(columns: Sequence[Figures]) -> list[TableRow]:
    """Labelled rows of figures as text; all columns were measured with the same prompts."""
    first = columns[0]
    assert all((one.num_harmful, one.num_harmless) == (first.num_harmful, first.num_harmless) for one in columns)

    def row(label: str, cell: Callable[[Figures], str]) -> TableRow:
        return label, [cell(column) for column in columns]

    rows = [
        row(f"DSR ({first.num_harmful} harmful)", lambda one: f"{one.dsr:.3f}"),
        row("  95 % interval", lambda one: span(one.dsr_interval)),
        row("  answered", lambda one: f"{one.complied:.3f}"),
    ]
    # Not NaN, as in older reports.
    if any(column.consented > 0 for column in columns):
        rows.append(row("    saying only yes", lambda one: share(one.consented)))
    rows.append(row("  degenerate", lambda one: f"{one.degenerate:.3f}"))
    if any(column.undecided for column in columns):
        rows.append(row("  never came to an answer", lambda one: f"{one.undecided:.3f}"))
    rows += [
        row(f"over-refusal ({first.num_harmless} harmless)", lambda one: f"{one.over_refusal:.3f}"),
        row("  95 % interval", lambda one: span(one.over_refusal_interval)),
        row("  degenerate", lambda one: share(one.harmless_degenerate)),
    ]
    if any(column.harmless_undecided > 0 for column in columns):
        rows.append(row("  never came to an answer", lambda one: share(one.harmless_undecided)))
    rows += [
        *_attack_rows(columns),
        *_marker_rows(columns),
    ]
    if first.score is not None:
        rows.append(row("score of the evaluator", lambda one: f"{one.score:.3f}"))
    rows.append(row("perplexity", lambda one: share(one.perplexity)))
    if not all(math.isnan(column.divergence) for column in columns):
        rows.append(row("divergence (nats/token)", lambda one: shown(one.divergence)))
    rows += _kept_rows(columns)
    for index, skill in enumerate(first.skills):
        # The harness does not report the number of questions.
        number = f" ({skill.num_questions} questions)" if skill.num_questions else ""
        rows.append(row(f"{skill.name}{number}", lambda one, at=index: f"{one.skills[at].score:.3f}"))  # type: ignore[misc]
    return rows


def _kept_rows(columns: Sequence[Figures]) -> list[TableRow]:
    """How many keep prompts are answered as the target does; none if they were not put to all models."""
    kept = [column.kept for column in columns if column.kept is not None]
    if len(kept) < len(columns):
        return []
    return [
        (f"as before ({kept[0].num_prompts} keep)", [f"{one.share_same:.3f}" for one in kept]),
        ("  95 % interval", [span(one.same_interval) for one in kept]),
        ("  refused", [f"{one.num_refused / one.num_prompts:.3f}" for one in kept]),
    ]


def category_rows(columns: Sequence[Figures]) -> list[TableRow]:
    """The refused prompts of each kind and category."""
    rows = []
    for index, one in enumerate(columns[0].categories):
        refused = [f"{column.categories[index].num_refused}/{one.num_prompts}" for column in columns]
        rows.append((f"{one.kind}, {one.category}", refused))
    return rows


def point_rows(points: Sequence[Point], measure: str = SCORE.label) -> tuple[list[str], list[TableRow]]:
    """The head and the rows of a table of points, a column for each.

    Args:
        points: Those to pick from, in order.
        measure: The name of the score: DSR, or the evaluator's.
    """

    def row(label: str, cell: Callable[[Point], str]) -> TableRow:
        return label, [cell(point) for point in points]

    rows = [
        row(one.label, lambda point, at=one.figure: shown(point.figures.get(at, math.nan)))  # type: ignore[misc]
        for one in constraints_of([one.key for one in CONSTRAINTS], measure)
        # NaN without anything to measure it on.
        if not all(math.isnan(point.figures.get(one.figure, math.nan)) for point in points)
    ]
    rows += [
        row("units", lambda point: str(len(point.units)))
        if any(point.units for point in points)
        else row("directions", lambda point: str(point.num_directions)),
        row("on the front", lambda point: "yes" if point.on_front else ""),
        row("within the limits", lambda point: "no" if point.complaint else "yes"),
    ]
    return [point.name for point in points], rows


def point_lines(points: Sequence[Point]) -> list[tuple[str, str]]:
    """Facts that do not fit into a table: the units of a part, and the first limit that a point violates."""
    facts = [
        (point, ([spans(point.units)] if point.units else []) + ([point.complaint] if point.complaint else []))
        for point in points
    ]
    return [(f"point {point.name}", "; ".join(texts)) for point, texts in facts if texts]


def print_points(points: Sequence[Point], measure: str, console: Console) -> None:
    """Print the points that there were to pick from, if any."""
    if points:
        for start in range(0, len(points), MAX_COLUMNS):
            console.print(_table(*point_rows(points[start : start + MAX_COLUMNS], measure), head=POINT_HEAD))
        for label, fact in point_lines(points):
            _tell(console, f"{label:<20}{fact}")


def taken_line(points: Sequence[Point], picked: int, *, by_hand: bool) -> str:
    """Which point was taken, by whom, and whether it violates a limit."""
    point = points[picked - 1]
    if not by_hand:
        last = points[-1]
        left = f"; point {last.number} is what the search left of it" if last.part_of is not None else ""
        which = "scores highest" if point.units else "diverges least of those that score nearly as high as the best"
        return f"point {picked}, which {which} within the limits{left}"
    if point.complaint is None:
        return f"point {picked}, picked by hand and within the limits"
    return f"point {picked}, picked by hand although it VIOLATES the limits: {point.complaint}"


def resumed_line(report: Report) -> str:
    """A sentence on the part of a search that came from the journal of an earlier run."""
    number = report.tests_recorded
    what = f"{number} {'test' if number == 1 else 'tests'}" if number else "some figures"
    return f"{what} came from the journal of an earlier run; the result was measured again"


def skill_label(name: str) -> str:
    """The label of a skill; the skill of a prompt set has no name of its own."""
    return name if name == SKILL else f"{SKILL} {name}"


def span(interval: tuple[float, float]) -> str:
    """An interval as text."""
    return f"{interval[0]:.3f}-{interval[1]:.3f}"


def _marker_rows(columns: Sequence[Figures]) -> list[TableRow]:
    rows = []
    for index, marker in enumerate(columns[0].markers):
        seen = [column.markers[index] for column in columns]
        rows += [
            (f"DSR by {marker.name}", [share(one.dsr) for one in seen]),
            ("  95 % interval", [span(one.dsr_interval) if one.dsr_interval else "-" for one in seen]),
            ("  undecided", [f"{one.undecided:.3f}" for one in seen]),
            ("  its over-refusal", [share(one.over_refusal) for one in seen]),
            ("  agrees with the rules", [share(one.agreement.share) for one in seen]),
        ]
    return rows


def _attack_rows(columns: Sequence[Figures]) -> list[TableRow]:
    """A row for each attack that was tried on any of the models; `-` where its chat template has no system role."""
    names = dict.fromkeys(attack.name for column in columns for attack in column.attacks)
    found = [{attack.name: attack for attack in column.attacks} for column in columns]
    rows = []
    for name in names:
        tried = [attacks.get(name) for attacks in found]
        rows += [
            (f"DSR, {name}", [share(one.dsr if one else None) for one in tried]),
            ("  95 % interval", [span(one.interval) if one and one.interval else "-" for one in tried]),
        ]
    return rows


def share(value: float | None) -> str:
    """A share, or `-` if it is unknown."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _tell(console: Console, line: str) -> None:
    """Print one line, however long."""
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def _table(names: Sequence[str], rows: Sequence[TableRow], head: str = "") -> Table:
    table = Table(head)
    for name in names:
        table.add_column(Text(printable(name)), justify="right")
    for label, cells in rows:
        # Escaped before the widths are taken.
        table.add_row(*(Text(printable(cell)) for cell in (label, *cells)))
    return table


def print_report(report: Report, console: Console) -> None:
    """Print the figures as a table, and the facts of the run below."""
    columns = [("before", report.before), ("after", report.after), ("source", report.source_alone)]
    figures = [(name, column) for name, column in columns if column is not None]
    if figures:
        names, columns_of_figures = [name for name, _ in figures], [column for _, column in figures]
        console.print(figures_table(names, columns_of_figures, prompts_name(report)))
    print_points(report.points, report.searched.measure if report.searched else SCORE.label, console)
    for label, fact in _facts(report):
        _tell(console, f"{label:<20}{fact}")


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = [
        *change_lines(report),
        *meaning_lines(report),
        *(("tried" if number == 0 else "", str(rung)) for number, rung in enumerate(report.rungs)),
        ("target", report.target),
        ("source", report.source),
        (EDITS[report.edit].done if report.edit in EDITS else "edited", spans(report.units)),
        ("parameters changed", f"{100 * report.share_changed:.2f} %{moved_text(report)}"),
    ]
    if report.directions is not None and report.degrees_of_freedom is not None:
        found = freedom(report.directions, report.degrees_of_freedom, report.share_of_freedom or 0.0)
        facts.append(("directions added", found))
    if report.system is not None:
        facts.append(("asked after", f"the system message {report.system!r}"))
    if report.chat_template is not None:
        without = report.chat_template == NO_TEMPLATE
        facts.append(("asked", "without a chat template" if without else f"with the template {report.chat_template}"))
    if report.after is not None:
        facts.append(("perplexity of", report.after.text))
        if not math.isnan(report.after.divergence):
            facts.append(("divergence on", report.keep or "the harmless prompts; the recipe has no `keep`"))
    if report.picked is not None:
        by_hand = report.picked_by_hand is not None
        facts.append(("taken", taken_line(report.points, report.picked, by_hand=by_hand)))
    if report.one_minimal is not None:
        each = "bundle" if is_of_bundles(report.certificate) else "unit"
        proved = f"each {each} seen to be needed" if report.one_minimal else f"not each {each} seen to be needed"
        saved = thrift(report.tests_recorded, report.tests_unneeded, report.share_of_prompts_saved)
        facts.append(
            ("search", f"{report.tests} of 2^{report.num_candidates} selections tested, {proved}; saved {saved}")
        )
    if report.resumed:
        facts.append(("resumed", resumed_line(report)))
    facts.append(("verified", f"{report.num_tensors} tensors, byte by byte"))
    if report.before is not None:
        if report.arithmetic is not None:
            facts.append(("arithmetic", report.arithmetic))
        facts.append(("time", f"{report.seconds:.1f} s"))
    return facts


def moved_text(report: Report | None) -> str:
    """By how much of their size the changed parameters moved, as the rest of a sentence; empty if that is unknown."""
    if report is None or report.size_of_change is None:
        return ""
    return f", by {100 * report.size_of_change:.2g} % of their size on average"


def freedom(directions: int, degrees: int, share: float) -> str:
    """The number of added directions, and how many numbers decide them: also as a share of the parameters."""
    return f"{directions} with {degrees:,} degrees of freedom, {100 * share:.2f} % of the parameters"


def change_lines(report: Report) -> list[tuple[str, str]]:
    """One line each for DSR and over-refusal: before, after, and whether the change is within noise."""
    if report.before is None or report.after is None:
        return []
    return _changes_between(report.before, report.after, report.dsr_change, report.over_refusal_change)


def _changes_between(
    before: Figures, after: Figures, dsr: Change | None, over_refusal: Change | None
) -> list[tuple[str, str]]:
    lines = []
    if dsr is not None:
        rates = f"{before.dsr:.3f} -> {after.dsr:.3f} (95 % interval {span(after.dsr_interval)})"
        lines.append(_change("DSR", ("gain", "loss"), rates, dsr))
    if over_refusal is not None:
        interval = span(after.over_refusal_interval)
        rates = f"{before.over_refusal:.3f} -> {after.over_refusal:.3f} (95 % interval {interval})"
        lines.append(_change("over-refusal", ("rise", "fall"), rates, over_refusal))
    return lines


def _change(name: str, words: tuple[str, str], rates: str, change: Change) -> tuple[str, str]:
    """A label and a sentence; `words` are for more refusals and for fewer."""
    p_value = "p < 1e-12" if change.p_value < 1e-12 else f"p = {change.p_value:.3g}"
    fact = f"{rates}, {p_value} (McNemar)"
    difference = change.newly_refused - change.no_longer_refused
    if difference == 0:
        return name, f"{fact}: no {words[0]}"
    word = words[0] if difference > 0 else words[1]
    if change.within_noise:
        fact += f": the {word} in {name} is within noise"
    return f"{name} {word}", fact


# The most units of a plan that have a line each.
MAX_LISTED = 48
# The most tensors of a unit in a line besides the first; the experts of a mixture would fill a page.
MAX_BESIDE = 3


def plan_json(plan: Plan, selection: Sequence[Unit] | None, *, compares: bool = True) -> dict[str, Any]:
    """A plan as plain data; `selected` is None if a search decides. Units with selected rows are shown in parts.

    What differs is None if it is not to be compared, or where values are on the Hub and were not fetched yet.
    """
    units = plan.units if selection is None else cut(plan, selection).units
    counts = count_changed(plan, units) if compares else dict.fromkeys(units)
    chosen = [counts[unit] for unit in (units if selection is None else selection)]
    return {
        "architecture": architecture_name(plan.target.config),
        "target": {"name": plan.target.name, "parameters": plan.target.num_parameters, "bytes": plan.target.num_bytes},
        **{name: {"name": checkpoint.name} for name, checkpoint in plan.others.items()},
        "units": [
            {
                "unit": str(unit),
                "tensors": list(unit.tensors),
                "parameters": plan.num_parameters((unit,)),
                "bytes": plan.num_bytes((unit,)),
                "differing_parameters": counts[unit],
                "selected": None if selection is None else unit in selection,
            }
            for unit in units
        ],
        "differing_units": _total(count and 1 for count in chosen),
        "differing_parameters": _total(chosen),
        "selected_parameters": None if selection is None else plan.num_parameters(selection),
        "selected_share": None if selection is None else plan.share(selection),
        "search_memory_bytes": search_memory(plan),
    }


def _total(counts: Iterable[int | None]) -> int | None:
    """The sum; None if one of them is unknown."""
    known = list(counts)
    return None if None in known else sum(count or 0 for count in known)


def print_plan(plan: Plan, selection: Sequence[Unit] | None, console: Console) -> None:
    """Print a plan: a line for each unit, and their sum; how much of each the edit would really change."""
    chosen = plan.units if selection is None else tuple(selection)
    counts = count_changed(plan, chosen)
    is_long = len(chosen) > MAX_LISTED
    table = Table("units" if is_long else "unit", "tensors")
    table.add_column("MB", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("differ", justify="right")
    # Of many units, those of a module are added up: --json lists each.
    rows = [tuple(same) for same in _by_module(chosen).values()] if is_long else [(unit,) for unit in chosen]
    for units in rows:
        count = _total(counts[unit] for unit in units)
        differing = "?" if count is None else f"{100 * count / max(plan.num_parameters(units), 1):.2f} %"
        name = spans(units) if is_long else str(units[0])
        tensors = f"{len(units)}, such as {_tensors(units[0], plan)}" if is_long else _tensors(units[0], plan)
        size, share = f"{plan.num_bytes(units) / 1e6:.2f}", f"{100 * plan.share(units):.2f} %"
        table.add_row(name, Text(printable(tensors)), size, share, differing)
    console.print(table)
    decided = "a search chooses among" if selection is None else "changes"
    facts = [
        (
            "target",
            f"{plan.target.name} ({architecture_name(plan.target.config)}, {plan.target.num_bytes / 1e6:.2f} MB)",
        ),
        *((name, checkpoint.name) for name, checkpoint in plan.others.items()),
        (decided, f"{len(chosen)} units, {plan.num_bytes(chosen) / 1e6:.2f} MB"),
        ("parameters", f"{100 * plan.share(chosen):.2f} % of the target's"),
        ("differ", _differing(plan, counts)),
        ("memory of a search", f"{search_memory(plan) / 1e6:.2f} MB on its device, and the batches"),
    ]
    for label, fact in facts:
        _tell(console, f"{label:<24}{fact}")


def _by_module(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(unit.module, []).append(unit)
    return found


def _differing(plan: Plan, counts: Mapping[Unit, int | None]) -> str:
    """How many of a plan's units the edit would change, and what share of the target's parameters."""
    if (number := _total(counts.values())) is None:
        return "unknown: what is not fetched from the Hub yet is not compared"
    units = sum(count != 0 for count in counts.values())
    share = f"{100 * number / plan.target.num_parameters:.2f} % of the target's parameters"
    return f"{units} of {len(counts)} units, {share}" + ("" if units else f": {why_equal(plan, tuple(counts))}")


def _tensors(unit: Unit, plan: Plan) -> str:
    """The tensors of a unit in a line: the first in full, and a few others by the end of their names."""
    first, *others = dict.fromkeys(regions["target"].name for regions in plan.regions((unit,)))
    if len(others) > MAX_BESIDE:
        return f"{first}, and {len(others)} more of {len(unit.tensors)} tensors"
    parent = first.removesuffix(".weight").rpartition(".")[0] + "."
    return ", ".join([first, *(name.removeprefix(parent) for name in others)])


def ladder_json(ladder: Ladder) -> dict[str, Any]:
    """The plan of a recipe as plain data, or those of the edits that it tries."""
    plans = [(recipe.edit, plan_json(plan, given_selection(recipe, plan))) for recipe, plan in ladder.rungs]
    if not ladder.is_auto:
        return plans[0][1]
    return {"rungs": [{"edit": edit, **content} for edit, content in plans]}


def print_ladder(ladder: Ladder, console: Console) -> None:
    """Print the plan of a recipe, or those of the edits that it tries."""
    for number, (recipe, plan) in enumerate(ladder.rungs, 1):
        if ladder.is_auto:
            title = f"try {number} of {len(ladder.rungs)}: the edit {recipe.edit} of {', '.join(plan.modules)}"
            _tell(console, title)
        print_plan(plan, given_selection(recipe, plan), console)


def prior_rows(scores: Mapping[Unit, float], selection: Collection[Unit] | None = None) -> list[dict[str, Any]]:
    """Rank the units of a prior by descending score, from 1; equal ones keep their order.

    Without a selection, that is before the search, `kept` is None.
    """
    order = sorted(scores, key=lambda unit: -scores[unit])
    return [
        {
            "rank": rank,
            "unit": str(unit),
            "score": scores[unit],
            "kept": None if selection is None else unit in selection,
        }
        for rank, unit in enumerate(order, 1)
    ]


def print_prior(scores: Mapping[Unit, float], selection: Collection[Unit] | None, console: Console) -> None:
    """Print a prior: a line for each unit, with `kept` if there was a search."""
    table = Table()
    table.add_column("rank", justify="right")
    table.add_column("unit")
    table.add_column("score (nats)", justify="right")
    if selection is not None:
        table.add_column("kept")
    for row in prior_rows(scores, selection):
        kept = [] if selection is None else ["yes" if row["kept"] else ""]
        table.add_row(str(row["rank"]), row["unit"], f"{row['score']:+.3f}", *kept)
    console.print(table)


def search_json(search: Search, plan: Plan) -> dict[str, Any]:
    """A search as plain data."""
    minimum = search.minimum
    selection = join(plan, minimum.units)
    number = num_changed(plan, selection)
    kept = {unit.whole for unit in minimum.units}
    return dict(
        jsonable(
            {
                "units": list(map(str, selection)),
                "parameters_changed": number,
                "share_changed": number / plan.target.num_parameters,
                "tests": minimum.tests,
                "tests_recorded": search.num_recorded,
                "tests_unneeded": search.num_unneeded,
                "prompts_asked": search.num_asked,
                "share_of_prompts_saved": search.share_saved,
                "one_minimal": None if search.by_hand else minimum.one_minimal,
                "certificate": readable_certificate(minimum),
                "requirement": search.requirement.to_json(),
                "score_target": search.target.score,
                "score_full": search.full.score,
                "prior": None if search.prior is None else prior_rows(search.prior, kept),
                "points": [asdict(point) for point in search.points],
                "picked": search.picked,
                "seconds": search.seconds,
            }
        )
    )


def print_search(search: Search, plan: Plan, console: Console) -> None:
    """Print a search."""
    minimum = search.minimum
    selection = join(plan, minimum.units)
    if search.prior is not None:
        console.print("What each unit was expected to do for refusing, and what the search kept:")
        print_prior(search.prior, {unit.whole for unit in minimum.units}, console)
    share = num_changed(plan, selection) / plan.target.num_parameters
    facts = [f"edit {spans(selection)}: {100 * share:.2f} % of the parameters"]
    if search.picked is not None:
        print_points(search.points, search.requirement.measure, console)
        facts.append(f"from {taken_line(search.points, search.picked, by_hand=search.by_hand)}")
    if not search.by_hand:
        facts += _searched_facts(search)
    for fact in facts:
        _tell(console, fact)


def _searched_facts(search: Search) -> list[str]:
    minimum = search.minimum
    facts = [
        f"limits on the search prompts: {limits_text((search.limits or search.requirement).to_json())}",
        f"{minimum.tests} tests, {search.seconds:.1f} s; saved "
        + thrift(search.num_recorded, search.num_unneeded, search.share_saved),
        *(
            f"  needed: {units[0]}; without it, {spans(others)} fails"
            if len(units) == 1
            else f"  needed: {spans(units)}; without them, {spans(others)} fails"
            for units, others in needed(readable_certificate(minimum))
        ),
    ]
    if not minimum.one_minimal:
        facts.append("not proved minimal: the search ended before every unit was seen to be needed")
    return facts
