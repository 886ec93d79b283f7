"""Steps and progress for people, and silence from other libraries.

Steps are log records of the logger `dapa_merge`. Progress is counted by whoever does the work, and belongs to the
innermost task in that unit. `shown` puts both on stderr; without it a library call is silent.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress

from dapa_merge.errors import printable

LOG = logging.getLogger("dapa_merge")


@dataclass
class _Task:
    """A piece of work of known size; `move` draws a bar, or does nothing."""

    unit: str
    move: Callable[[int], object]


# Progress comes from threads too, which is why this is not a context variable.
_lock = threading.Lock()
_tasks: list[_Task] = []
_consoles: list[Console] = []


@contextmanager
def task(description: str, total: int, unit: str) -> Iterator[None]:
    """Count what is done inside as progress of one task.

    Only the outermost task has a bar, and only on a terminal.

    Args:
        description: What is done, as "verifying".
        total: How much there is to do.
        unit: What is counted, as "bytes" or "prompts".
    """
    with contextlib.ExitStack() as stack:
        move: Callable[[int], object] = _ignore
        if not _tasks and _consoles and _consoles[-1].is_terminal:
            bars = stack.enter_context(Progress(console=_consoles[-1], transient=True))
            bar = bars.add_task(printable(description), total=total)

            def move(amount: int) -> None:
                bars.advance(bar, amount)

        entry = _Task(unit, move)
        with _lock:
            _tasks.append(entry)
        try:
            yield
        finally:
            with _lock:
                _tasks.remove(entry)


def advance(amount: int, unit: str) -> None:
    """Report an amount of work as done; it counts for the innermost task if that is in the same unit."""
    with _lock:
        innermost = _tasks[-1] if _tasks else None
    if innermost is not None and innermost.unit == unit:
        innermost.move(amount)


@contextmanager
def shown(quiet: bool = False) -> Iterator[None]:
    """Show steps and progress on stderr inside; bars go when their work is done."""
    if quiet:
        yield
        return
    console = Console(stderr=True)
    handler = _Handler(console)
    level, propagates = LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    # mergekit's command line has a handler of its own at the root.
    LOG.propagate = False
    _consoles.append(console)
    try:
        yield
    finally:
        _consoles.pop()
        LOG.setLevel(level)
        LOG.propagate = propagates
        LOG.removeHandler(handler)


class _Handler(logging.Handler):
    """Prints each record as one plain line; what it quotes may be a stranger's."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(printable(record.getMessage()), highlight=False, markup=False, soft_wrap=True)


def _ignore(_amount: int) -> None:
    """A task without a bar."""
