"""Results as HTML for notebooks: the tables and lines that the command line prints of them, escaped.

Leaves out style: a notebook has its own.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dapa_merge.errors import printable
from dapa_merge.imports import Shown
from dapa_merge.measure.figures import Figures
from dapa_merge.publish.commit import Published
from dapa_merge.report.report import Report
from dapa_merge.report.tables import figures_table, print_evaluated, print_lines, print_report, print_search
from dapa_merge.search.result import Search
from dapa_merge.verify.result import Check

WIDTH = 110


def html_of(result: Shown) -> str:
    """The tables and lines of a result as HTML; every name and text in them is escaped."""
    page = _Page(width=WIDTH)
    if isinstance(result, Report):
        print_report(result, page)
    elif isinstance(result, Search):
        print_search(result, result.plan, page)
    elif isinstance(result, Figures):
        page.print(figures_table(["model"], [result]))
    elif isinstance(result, (Check, Published)):
        print_lines(page, result.lines())
    else:
        _print_others(result, page)
    return page.html()


def _print_others(result: Any, page: Console) -> None:
    # Their modules load torch, which the results above do not need.
    from dapa_merge.inspect.inspection import Inspection, print_inspection

    if isinstance(result, Inspection):
        print_inspection(result, page)
    elif hasattr(result, "models"):
        figures = {name: one.figures for name, one in result.models.items()}
        print_evaluated(figures, result.changes, page, result.asking.lines())
    else:
        print_evaluated({"model": result.figures}, {}, page)


class _Page(Console):
    """A console that gathers what is printed as HTML."""

    def __init__(self, width: int) -> None:
        super().__init__(width=width, color_system=None)
        self._parts: list[str] = []
        self._lines: list[str] = []

    def print(self, *objects: Any, **_: Any) -> None:
        """Add tables, and lines of text."""
        for one in objects:
            if isinstance(one, Table):
                self._end_lines()
                self._parts.append(_table(one))
            else:
                self._lines.append(_escaped(one))

    def html(self) -> str:
        """All that was printed."""
        self._end_lines()
        return "\n".join(self._parts)

    def _end_lines(self) -> None:
        if self._lines:
            text = "\n".join(self._lines)
            self._parts.append(f"<pre>{text}</pre>")
            self._lines = []


def _table(table: Table) -> str:
    head = "".join(f"<th>{_escaped(column.header)}</th>" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(map(_row, rows))}</tbody></table>"


def _row(cells: Iterable[object]) -> str:
    label, *others = map(_escaped, cells)
    # An indented label is a detail of the row above it.
    shown = label.replace("  ", "&emsp;", 1) if label.startswith("  ") else label
    return f'<tr><th style="text-align: left">{shown}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'


def _escaped(value: object) -> str:
    return html.escape(printable(value.plain if isinstance(value, Text) else str(value)))
