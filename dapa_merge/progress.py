"""Progress on stderr for whatever takes long, and silence where nobody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dapa_merge.errors import printable


class Reporter:
    """Says nothing; the base of those who do."""

    def say(self, message: str) -> None:
        """Tell the user a step."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A piece of work of known size; yields what is called with each amount done."""
        yield lambda _amount: None


class ConsoleReporter(Reporter):
    """Bars on a terminal that go when the work is done, and lines that stay; only lines elsewhere."""

    def __init__(self) -> None:
        # rich costs tens of milliseconds, which a recipe that is refused at once should not pay.
        from rich.console import Console

        self._console = Console(stderr=True)

    def say(self, message: str) -> None:
        self._console.print(printable(message), highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        from rich.progress import Progress

        with Progress(console=self._console, transient=True, disable=not self._console.is_terminal) as progress:
            task = progress.add_task(description, total=total)
            yield lambda amount: progress.advance(task, amount)
