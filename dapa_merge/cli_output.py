"""How commands speak: an answer on stdout, for people or programs, and progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from dapa_merge.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from dapa_merge.progress import Reporter


def reporter(quiet: bool) -> Reporter:
    """What tells the user of the steps, unless they asked for silence."""
    from dapa_merge.progress import ConsoleReporter
    from dapa_merge.progress import Reporter as Silent

    return Silent() if quiet else ConsoleReporter()


def print_answer(answer: Mapping[str, Any], show: Callable[[Console], object], as_json: bool) -> None:
    """Print an answer as one JSON object, or as `show` shows it."""
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    from rich.console import Console

    show(Console())


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print lines as they are, however long; what they quote may be a stranger's."""
    for line in lines:
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
