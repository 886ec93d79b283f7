"""What `dapa-merge search` shows of its prior: the units by their expected effect, as plain data and as a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from dapa_merge.checkpoint.architecture import Unit

if TYPE_CHECKING:
    from rich.console import Console


def prior_rows(scores: Mapping[Unit, float], selection: Collection[Unit] | None = None) -> list[dict[str, Any]]:
    """The units by descending score, ranked from 1; of equal ones, the first in `scores` comes first.

    Args:
        scores: The prior.
        selection: What the search kept; None before it, and `kept` is then None too.
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
    """The prior for people: a line for each unit, and whether the search kept it, if there was one."""
    from rich.table import Table

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
