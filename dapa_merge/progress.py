"""Steps and progress for people, and silencing of other libraries.

Steps are log records of the logger `dapa_merge`. The code that does the work reports progress, which counts for the
innermost task if the units match. `shown` shows both on stderr; without it, library calls are silent.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.segment import Segment
from rich.table import Column

from dapa_merge.errors import printable

LOG = logging.getLogger("dapa_merge")


class Terminal(Console):
    """A console on stdout or stderr for text of any origin, which is shown as it is, without markup.

    Whatever would move a cursor or turn the direction of writing is escaped, in lines as in the cells of tables.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)
        if self.width < 1:  # COLUMNS=0, for which rich prints nothing.
            self.width = 80

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            # What rich itself sends to move a cursor is a control segment.
            yield segment if segment.control else segment._replace(text=printable(segment.text, keep="\n"))


@dataclass
class _Task:
    """A piece of work of known size; `move` draws a bar, or does nothing."""

    description: str
    total: int
    unit: str
    move: Callable[[int], object]
    start: float = field(default_factory=lambda: time.monotonic())
    done: float = 0

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.start


# Not a context variable, because progress also comes from threads.
_lock = threading.RLock()
_tasks: list[_Task] = []
_jobs: list[_Job] = []
_consoles: list[Console] = []
# Without a terminal, a work that takes long says so often how far it is, and is looked at so often.
TOLD_EVERY_SECONDS = 30.0
LOOKED_AT_EVERY_SECONDS = 1.0
_told = [0.0]
# The last step that was told, and when; how far a work is, is no step.
IS_STEP = "is_step"
_step: list[tuple[str, float]] = [("", 0.0)]
# Units that a task works on all at once, so that it has few of them done until it is nearly done.
AT_ONCE = ("prompts",)
# Of what such a task has left, the most that may be under way unseen.
MOST_UNSEEN = 0.8
# For so long a pace that was estimated counts beside the one that is measured.
PRIOR_SECONDS = 20.0


class _Job:
    """A long work of several parts: how much is left of each in each unit, and how long a unit takes."""

    def __init__(self, rates: Mapping[str, float], draw: Callable[[_Job], object]) -> None:
        self.label = ""
        self.start = time.monotonic()
        self._draw = draw
        self._rates = dict(rates)
        self._left: dict[str, dict[str, float]] = {}
        self._part = ""
        # By unit: seconds of finished tasks, and how much they did.
        self._spent: dict[str, tuple[float, float]] = {}

    def expect(self, part: str, amounts: Mapping[str, float]) -> None:
        self._left[part] = {unit: float(amount) for unit, amount in amounts.items()}

    def begin(self, part: str) -> None:
        self._part = part
        self.label = ""

    def end(self) -> None:
        self._left.pop(self._part, None)
        self.label = ""

    def remain(self, amounts: Mapping[str, float]) -> None:
        self._left.setdefault(self._part, {}).update(amounts)

    def pace(self, seconds: Mapping[str, float]) -> None:
        self._rates |= seconds

    def advance(self, amount: float, unit: str) -> None:
        left = self._left.get(self._part, {})
        if unit in left:
            left[unit] = max(left[unit] - amount, 0)
        self._draw(self)

    def finish(self, work: _Task) -> None:
        seconds, amount = self._spent.get(work.unit, (0.0, 0.0))
        self._spent[work.unit] = seconds + work.spent, amount + work.done

    def seconds_left(self) -> float | None:
        """About how long the rest takes; None if a unit's pace is not known yet."""
        total = 0.0
        for unit, amount in self._amounts().items():
            rate = self._rate(unit)
            if amount and rate is None:
                return None
            total += amount * (rate or 0)
            if rate is not None and unit in AT_ONCE and (task := _task_of(unit)) is not None:
                # Answers under way have nothing to show for their time yet.
                left = min(amount, task.total - task.done) * rate
                total -= min(MOST_UNSEEN * left, max(task.spent - task.done * rate, 0))
        return total

    def _amounts(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for left in self._left.values():
            for unit, amount in left.items():
                found[unit] = found.get(unit, 0) + amount
        return found

    def _rate(self, unit: str) -> float | None:
        seconds, amount = self._spent.get(unit, (0.0, 0.0))
        known = self._mean(unit, seconds, amount)
        if (task := _task_of(unit)) is not None:
            spent, done = task.spent, task.done
            if unit in AT_ONCE and known is not None and spent > done * known:
                if spent <= task.total * known:
                    return known
                # All of them take at least as long as they took already.
                done = max(task.total, done)
            seconds, amount = seconds + spent, amount + done
        return self._mean(unit, seconds, amount)

    def _mean(self, unit: str, seconds: float, amount: float) -> float | None:
        if prior := self._rates.get(unit):
            # Thought of as measured for a while: the first few are slow, since models and caches begin cold.
            seconds, amount = seconds + PRIOR_SECONDS, amount + PRIOR_SECONDS / prior
        return seconds / amount if amount else None


def _task_of(unit: str) -> _Task | None:
    """The innermost task, if it counts this unit."""
    return _tasks[-1] if _tasks and _tasks[-1].unit == unit else None


@contextmanager
def job(rates: Mapping[str, float] | None = None) -> Iterator[None]:
    """Show all tasks inside the `with` block as one work, with about the time that is left of the whole.

    Args:
        rates: Seconds that a unit takes, by its name, until it is measured; without one, no time is shown before.
    """
    with contextlib.ExitStack() as stack:
        draw: Callable[[_Job], object] = _ignore
        if _is_drawn() and not _jobs and not _tasks:
            columns = (TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)), BarColumn(20))
            bars = stack.enter_context(
                Progress(
                    *columns, TextColumn("{task.fields[left]}"), console=_consoles[-1], transient=True, expand=True
                )
            )
            bar = bars.add_task("", total=1.0, left="")

            def draw(work: _Job) -> None:
                spent, left = time.monotonic() - work.start, work.seconds_left()
                share = 0.0 if left is None else spent / max(spent + left, 1e-9)
                bars.update(bar, completed=share, description=printable(_doing(work)), left=_left_text(left))

        entry = _Job(rates or {}, draw)
        with _lock:
            _told[0] = time.monotonic()
            _jobs.append(entry)
        try:
            yield
        finally:
            with _lock:
                _jobs.remove(entry)


def expect(part: str, **amounts: float) -> None:
    """Say how much a later part of the job takes, by unit; nothing without a job."""
    with _lock:
        if _jobs:
            _jobs[-1].expect(part, amounts)


def begin(part: str) -> None:
    """Begin a part of the job, or go on with it; progress counts for it from now on."""
    with _lock:
        if _jobs:
            _jobs[-1].begin(part)


def end() -> None:
    """End the part of the job that was begun last: nothing is left of it."""
    with _lock:
        if _jobs:
            _jobs[-1].end()


def remain(label: str = "", **amounts: float) -> None:
    """Say what the part that was begun is at, and how much is left of it, by unit; other units stay as they were."""
    with _lock:
        if _jobs:
            _jobs[-1].label = label
            _jobs[-1].remain(amounts)


def pace(**seconds: float) -> None:
    """Say how long units of the job take, by unit, now that some were timed."""
    with _lock:
        if _jobs:
            _jobs[-1].pace(seconds)


def _doing(work: _Job) -> str:
    description = _tasks[-1].description if _tasks else ""
    return f"{work.label}: {description}" if work.label and description else work.label or description


def _left_text(seconds: float | None) -> str:
    return "" if seconds is None else f"about {duration(seconds)} left"


def _is_drawn() -> bool:
    return bool(_consoles) and _consoles[-1].is_terminal and not _consoles[-1].is_dumb_terminal


@contextmanager
def task(description: str, total: int, unit: str) -> Iterator[None]:
    """Count progress inside the `with` block as one task.

    Only the outermost task has a bar, unless it is part of a job, and only on a terminal. Elsewhere a line says every
    half minute how far it is.

    Args:
        description: The activity, such as "verifying".
        total: The amount of work in units.
        unit: The unit, such as "bytes" or "prompts".
    """
    with contextlib.ExitStack() as stack:
        move: Callable[[int], object] = _ignore
        if not _tasks and not _jobs and _is_drawn():
            bars = stack.enter_context(Progress(console=_consoles[-1], transient=True))
            bar = bars.add_task(printable(description), total=total)

            def move(amount: int) -> None:
                bars.advance(bar, amount)

        entry = _Task(description, total, unit, move)
        with _lock:
            if not _tasks and not _jobs:
                _told[0] = time.monotonic()
            _tasks.append(entry)
        try:
            yield
        finally:
            with _lock:
                _tasks.remove(entry)
                if _jobs:
                    _jobs[-1].finish(entry)


def advance(amount: int, unit: str) -> None:
    """Report an amount of work as done; it counts for the innermost task if that has the same unit."""
    with _lock:
        if (innermost := _task_of(unit)) is None:
            return
        innermost.done += amount
        innermost.move(amount)
        if _jobs:
            _jobs[-1].advance(amount, unit)
    _break_silence()


def _break_silence() -> None:
    """Say how far a work is, if nobody sees a bar and nothing was said for long."""
    with _lock:
        now = time.monotonic()
        if not (_tasks or _jobs) or not _consoles or _is_drawn() or now - _told[0] < TOLD_EVERY_SECONDS:
            return
        _told[0] = now
        if _tasks:
            line = _how_far(_tasks[-1])
        else:
            # Such as a model that is being loaded.
            ((step, since),) = _step
            line = f"at work for {duration(now - since)} on what follows this: {step}"
    LOG.info(line, extra={IS_STEP: False})


@contextmanager
def _watched(console: Terminal) -> Iterator[None]:
    """Break every long silence inside the `with` block, also where a work does not advance."""
    if console.is_terminal and not console.is_dumb_terminal:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOKED_AT_EVERY_SECONDS):
            _break_silence()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _how_far(work: _Task) -> str:
    """A line on a task for those without a bar."""
    is_size = work.unit == "bytes"
    done, total = (f"{number / 1e9:.2f}" if is_size else f"{number:,.0f}" for number in (work.done, work.total))
    left = _jobs[-1].seconds_left() if _jobs else None
    if not _jobs and work.done:
        left = work.spent * max(work.total - work.done, 0) / work.done
    what = _doing(_jobs[-1]) if _jobs else work.description
    told = [f"{what}: {done} of {total} {'GB' if is_size else work.unit}", _left_text(left)]
    return ", ".join(filter(None, told)) + (" in all" if _jobs and left is not None else "")


def duration(seconds: float) -> str:
    """A length of time as people say it: `12 s`, `12 min`, `2 h 5 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def shown(quiet: bool = False) -> Iterator[None]:
    """Show steps and progress on stderr inside the `with` block; finished bars disappear."""
    if quiet:
        yield
        return
    console = Terminal(stderr=True)
    _consoles.append(console)
    try:
        with _each_step(lambda line: console.print(line, soft_wrap=True)), _watched(console):
            yield
    finally:
        _consoles.pop()


@contextmanager
def collected() -> Iterator[list[str]]:
    """Collect the steps inside the `with` block, as the lines that `shown` would show."""
    lines: list[str] = []
    with _each_step(lines.append):
        yield lines


@contextmanager
def _each_step(tell: Callable[[str], object]) -> Iterator[None]:
    handler = _Handler(tell)
    level, propagates = LOG.level, LOG.propagate
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    # mergekit's command line has its own handler at the root.
    LOG.propagate = False
    try:
        yield
    finally:
        LOG.setLevel(level)
        LOG.propagate = propagates
        LOG.removeHandler(handler)


class _Handler(logging.Handler):
    """Tells each record as one plain line, escaped because it may quote untrusted text."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(record.getMessage())
        _told[0] = time.monotonic()
        if getattr(record, IS_STEP, True):
            _step[:] = [(line, _told[0])]
        self._tell(line)


def _ignore(_: object) -> None:
    """Do nothing, for a task without a bar."""


@contextmanager
def quiet(*libraries: str, bars: bool = False) -> Iterator[None]:
    """Import and silence other libraries inside the `with` block; restore their settings afterwards.

    A panic of their Rust code, which is not of the class Exception, becomes a RuntimeError, which callers expect.

    Args:
        libraries: Any of `transformers`, `datasets`, `huggingface_hub`, `lm_eval` and `mergekit`.
        bars: Whether to keep huggingface_hub's progress bars.
    """
    with contextlib.ExitStack() as stack:
        for name in libraries:
            library = importlib.import_module(name)
            stack.enter_context(_SILENCED[name](library))
            if name in ("datasets", "huggingface_hub") and not bars:
                stack.enter_context(_without_bars(library))
        try:
            yield
        except BaseException as error:
            if type(error).__name__ == "PanicException":
                raise RuntimeError(f"its Rust code panicked: {error}") from error
            raise


@contextmanager
def _transformers(library: Any) -> Iterator[None]:
    log = library.utils.logging
    verbosity, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            log.enable_progress_bar()


@contextmanager
def _hub(library: Any) -> Iterator[None]:
    """Silence huggingface_hub or datasets, which are alike."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("ignore", category=UserWarning, module=library.__name__)
        if f"{library.__name__}.utils" in sys.modules:
            log = library.utils.logging
            stack.callback(log.set_verbosity, log.get_verbosity())
            log.set_verbosity_error()
        else:
            # huggingface_hub loads most of itself at its first request, and then takes its level from here.
            stack.enter_context(_variable("HF_HUB_VERBOSITY", "error"))
        yield


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the `with` block, unless it is set."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


@contextmanager
def _without_bars(library: Any) -> Iterator[None]:
    had_bars = not library.utils.are_progress_bars_disabled()
    library.utils.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            library.utils.enable_progress_bars()


@contextmanager
def _lm_eval(_: Any) -> Iterator[None]:
    """Silence lm_eval, which also prints."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _mergekit(_: Any) -> Iterator[None]:
    root, logger = logging.getLogger(), logging.getLogger("mergekit")
    building: Any = importlib.import_module("mergekit.tokenizer.build")
    # It also logs through the root logger, which would permanently get a handler if it had none.
    handler, level, bars = logging.NullHandler(), logger.level, building.tqdm
    root.addHandler(handler)
    root.addFilter(_drop)
    logger.setLevel(logging.CRITICAL + 1)
    # This bar cannot be switched off.
    building.tqdm = SimpleNamespace(tqdm=lambda models, **_: models)
    try:
        yield
    finally:
        building.tqdm = bars
        logger.setLevel(level)
        root.removeFilter(_drop)
        root.removeHandler(handler)


def _drop(record: logging.LogRecord) -> bool:
    """Drop a record; a logger's filter gets only records logged on that logger itself."""
    return False


_SILENCED = {
    "transformers": _transformers,
    "datasets": _hub,
    "huggingface_hub": _hub,
    "lm_eval": _lm_eval,
    "mergekit": _mergekit,
}
