"""Figures of several models side by side, as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from dapa_merge.evaluate.figures import Figures

Row = tuple[str, list[str]]
# What the skill of a prompt set is called.
SKILL = "skill"


def figures_table(names: Sequence[str], columns: Sequence[Figures]) -> Table:
    """The figures, a column for each model."""
    return _table(names, figure_rows(columns))


def categories_table(names: Sequence[str], columns: Sequence[Figures]) -> Table | None:
    """How many prompts were refused in each category; None if the prompts have none."""
    rows = category_rows(columns)
    return _table(names, rows) if rows else None


def figure_rows(columns: Sequence[Figures]) -> list[Row]:
    """Labelled rows of formatted figures, one cell per column; all columns were measured with the same prompts."""
    first = columns[0]
    assert all((one.num_harmful, one.num_harmless) == (first.num_harmful, first.num_harmless) for one in columns)

    def row(label: str, cell: Callable[[Figures], str]) -> Row:
        return label, [cell(column) for column in columns]

    rows = [
        row(f"DSR ({first.num_harmful} harmful)", lambda one: f"{one.dsr:.3f}"),
        row("  95 % interval", lambda one: span(one.dsr_interval)),
        row("  answered", lambda one: f"{one.complied:.3f}"),
        row("  degenerate", lambda one: f"{one.degenerate:.3f}"),
    ]
    if any(column.undecided for column in columns):
        rows.append(row("  never came to an answer", lambda one: f"{one.undecided:.3f}"))
    rows += [
        row(f"over-refusal ({first.num_harmless} harmless)", lambda one: f"{one.over_refusal:.3f}"),
        row("  95 % interval", lambda one: span(one.over_refusal_interval)),
        *_marker_rows(columns),
    ]
    if first.score is not None:
        rows.append(row("score of the evaluator", lambda one: f"{one.score:.3f}"))
    rows.append(row("perplexity", lambda one: f"{one.perplexity:.3f}"))
    for index, skill in enumerate(first.skills):
        # The harness asked questions of its own.
        number = f" ({skill.num_questions} questions)" if skill.num_questions else ""
        rows.append(_skill_row(columns, index, f"{skill.name}{number}"))
    return rows


def category_rows(columns: Sequence[Figures]) -> list[Row]:
    """For each kind and category, how many of its prompts were refused."""
    rows = []
    for index, one in enumerate(columns[0].categories):
        refused = [f"{column.categories[index].num_refused}/{one.num_prompts}" for column in columns]
        rows.append((f"{one.kind}, {one.category}", refused))
    return rows


def skill_label(name: str) -> str:
    """What to call a skill; the one of a prompt set has no name of its own."""
    return name if name == SKILL else f"{SKILL} {name}"


def span(interval: tuple[float, float]) -> str:
    """An interval for people."""
    return f"{interval[0]:.3f}-{interval[1]:.3f}"


def _marker_rows(columns: Sequence[Figures]) -> list[Row]:
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


def _skill_row(columns: Sequence[Figures], index: int, label: str) -> Row:
    return label, [f"{column.skills[index].score:.3f}" for column in columns]


def share(value: float | None) -> str:
    """A share that there may be none of."""
    return "-" if value is None else f"{value:.3f}"


def _table(names: Sequence[str], rows: Sequence[Row]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("")
    for name in names:
        table.add_column(Text(name), justify="right")
    for label, cells in rows:
        table.add_row(Text(label), *cells)
    return table
