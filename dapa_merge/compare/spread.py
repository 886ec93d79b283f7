"""Rows of a comparison measured by Ray actors: the same notes in the same journals, and so the same tables.

Every measurement of a row is a note in its journal. Here a row is gone through without measuring anything: whatever
note is missing becomes a *job*. Jobs of all rows are handed to actors, each of which holds one row's models at a time
and goes through that row in the same way, to find the job that it is to do. What it returns is written down here, the
only place where a row's journal is written; then some jobs are there that were not before, such as controls of a
search. When nothing is missing, going through the row makes it. Whether there were workers, how many, and which of them
were lost cannot be seen in a table, except for what depends on earlier responses in 16 bits (`measure/decode.py`): two
tokens that are nearly as likely.

An actor goes on with the job after the one that it did, because neighbours share what they need: a loaded model, a
training. An actor without such a job takes a row that no other is at or, if there is none, the second half of what is
left of the longest.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dapa_merge.checkpoint.convert import open_location
from dapa_merge.compare.result import CompareOptions, Row
from dapa_merge.compare.row import RowBench, Tools
from dapa_merge.errors import DapaError
from dapa_merge.measure.live import choose_device
from dapa_merge.measure.placement import is_spread
from dapa_merge.plan.selection import pinned_location, with_pinned_models
from dapa_merge.progress import LOG, collected
from dapa_merge.recipe.options import Options
from dapa_merge.recipe.recipe import Recipe
from dapa_merge.search.cluster import Actors
from dapa_merge.search.journal import Journal, Missing, at_once

# The first job of a row: to read its models' weights, so that its journal can be told from others.
IDENTITY = "identity"


@dataclass
class Jobs:
    """Missing measurements of a row, collected instead of done.

    Attributes:
        works: What makes a note, and whether it loads models of its own, by the note's name, in the row's order.
        faults: The errors of jobs that failed, which are raised where the row asks for their notes.
    """

    works: dict[str, tuple[Callable[[], object], bool]] = field(default_factory=dict)
    faults: Mapping[str, DapaError] = field(default_factory=dict)

    def __call__(self, name: str, work: Callable[[], object], *, alone: bool = False) -> None:
        """As `Perform`."""
        if (fault := self.faults.get(name)) is not None:
            raise fault
        self.works.setdefault(name, (work, alone))
        raise Missing(name)

    def found_in(self, bench: RowBench, tools: Tools) -> Row:
        """Go through a row without measuring anything; the row that it gives is whole if it has no jobs."""
        tools.measuring.journal.perform = self
        level = LOG.level
        # It would tell the same each time.
        LOG.setLevel(logging.WARNING)
        try:
            return bench.row(tools)
        finally:
            LOG.setLevel(level)


class Task(NamedTuple):
    """A job for an actor.

    Attributes:
        notes: All that the row's journal has.
        faults: The errors of the row's jobs that failed.
        base: What identifies the subtracted weights, once that is known.
    """

    recipe: Recipe
    name: str
    folder: Path
    note: str
    notes: Mapping[str, Any]
    faults: Mapping[str, DapaError]
    base: str | None


class Done(NamedTuple):
    """The answer of an actor.

    Attributes:
        notes: The new ones, or what identifies the row's journal.
        base: What identifies the subtracted weights, if that was the job.
        lines: What it told meanwhile.
    """

    notes: Mapping[str, Any]
    base: str | None
    lines: Sequence[str]


class Hand:
    """Does jobs in an actor; holds the models of one row at a time."""

    def __init__(self, wanted: CompareOptions, options: Options, num_threads: int) -> None:
        """Load nothing yet."""
        torch.set_num_threads(num_threads)
        self._wanted, self._options = wanted, options
        self._row: tuple[tuple[Recipe, str], RowBench, Tools] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._jobs = Jobs()

    def __call__(self, task: Task) -> Done:
        """Do one job."""
        with collected() as lines:
            bench, tools = self._take(task)
            if task.note == IDENTITY:
                return Done(bench.parts, bench.base, lines)
            journal = tools.measuring.journal
            journal.notes.update(task.notes)
            # Done already if it could not be returned.
            if task.note not in journal.notes:
                self._do(task, bench, tools)
            return Done({name: journal.notes[name] for name in journal.notes.keys() - task.notes.keys()}, None, lines)

    def _do(self, task: Task, bench: RowBench, tools: Tools) -> None:
        journal, jobs = tools.measuring.journal, self._jobs
        if task.note not in jobs.works:
            jobs.works.clear()
            jobs.faults = task.faults
            jobs.found_in(bench, tools)
        work, alone = jobs.works[task.note]
        journal.perform = at_once
        if alone:
            # What was found before may hold the model that is closed.
            jobs.works.clear()
            tools.close()
        work()
        if alone:
            tools.close()
            self._row = self._row and (*self._row[:2], bench.tools(journal))
        assert task.note in journal.notes

    def _take(self, task: Task) -> tuple[RowBench, Tools]:
        """Return the bench and tools of the task's row; those of the last task if its row was the same."""
        if self._row is None or self._row[0] != (task.recipe, task.name):
            if self._row is not None:
                self._row[2].close()
                self._row = None
            self._jobs.works.clear()
            folder = task.folder
            if not folder.is_dir():
                # Where nodes share no file system, a search begins again if its actor is lost.
                self._folder = tempfile.TemporaryDirectory(prefix="dapa-merge-")
                folder = Path(self._folder.name)
            bench = RowBench.of(task.recipe, task.name, folder, self._wanted, self._options)
            bench = replace(bench, known_base=task.base)
            self._row = (task.recipe, task.name), bench, bench.tools(Journal())
        return self._row[1:]


class OpenRow:
    """A row that is being measured elsewhere.

    Attributes:
        left: The jobs that no actor has begun, in the row's order.
        running: Those that are being done.
        fault: Why the row cannot be measured; its running jobs are waited for.
        row: The row, once nothing is missing.
    """

    def __init__(self, recipe: Recipe, name: str, folder: Path, wanted: CompareOptions, options: Options) -> None:
        """Open the models; raises what `RowBench.of` does."""
        self._bench = RowBench.of(recipe, name, folder, wanted, options)
        self._folder = folder.absolute()
        pinned = with_pinned_models(recipe, self._bench.plan)
        if self._bench.pretrained is not None and recipe.pretrained is not None:
            pinned = replace(pinned, pretrained=pinned_location(recipe.pretrained, self._bench.pretrained))
        self._pinned = pinned
        self._tools: Tools | None = None
        self._faults: dict[str, DapaError] = {}
        self.left = [IDENTITY]
        self.running: list[str] = []
        self.fault: DapaError | None = None
        self.row: Row | None = None

    @property
    def name(self) -> str:
        """The row's name."""
        return self._bench.name

    def begin(self, note: str) -> Task:
        """The task of one of the jobs that are left."""
        self.left.remove(note)
        self.running.append(note)
        notes = {} if self._tools is None else self._tools.measuring.journal.notes
        base = self._bench.known_base
        return Task(self._pinned, self.name, self._folder, note, dict(notes), dict(self._faults), base)

    def end(self, note: str, done: Done | None, fault: DapaError | None) -> None:
        """Write down what a job gave, and look for more jobs if none are left."""
        self.running.remove(note)
        for line in done.lines if done else ():
            LOG.info(f"{self.name}: {line}")
        try:
            if fault is not None and note == IDENTITY:
                raise fault
            if fault is not None:
                self._faults[note] = fault
            elif done is not None and self._tools is None:
                self._bench = replace(self._bench, known_base=done.base)
                self._tools = self._bench.tools(self._bench.journal(done.notes))
            elif done is not None and self._tools is not None:
                journal = self._tools.measuring.journal
                # Work that was begun again may bring what is known by now.
                for name in done.notes.keys() - journal.notes.keys():
                    journal.note(name, done.notes[name])
            # A fault that no arm of its own keeps ends the row.
            if self.fault is None and (fault is not None or not self.left):
                self._look()
        except DapaError as error:
            self.fault, self.left = self.fault or error, []

    def _look(self) -> None:
        """Go through the row without measuring anything: that makes it, or its further jobs."""
        assert self._tools is not None
        jobs = Jobs(faults=self._faults)
        row = jobs.found_in(self._bench, self._tools)
        self.left = [name for name in jobs.works if name not in self.running]
        self.row = None if jobs.works else row

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return not self.left and not self.running

    def close(self) -> None:
        """Close the journal."""
        if self._tools is not None:
            self._tools.measuring.journal.close()


def spread_rows(
    recipes: Mapping[str, Recipe], rows: Path, wanted: CompareOptions, options: Options
) -> Iterator[tuple[str, Row | DapaError]]:
    """Measure rows in Ray actors; yields each row, or its error, as soon as it is known.

    Args:
        recipes: By the names of their rows.
        rows: The folder of all rows.
        wanted: What to compare.
        options: With the number of workers.

    Raises:
        UsageError: If Ray does not start, or all workers are lost for good.
    """
    device = choose_device(options.device)
    # A model that does not fit on one device does not fit on a worker's either.
    is_wide = any(
        is_spread(open_location(one.target, partial=True, allow_pickle=options.allow_pickle), options.where)
        for one in recipes.values()
    )
    theirs = options.for_worker(options.device if is_wide else device.type)
    make = functools.partial(Hand, wanted, theirs)
    with closing(Actors(make, options.num_workers, uses_gpu=device.type == "cuda")) as actors:
        LOG.info(f"measuring {len(recipes)} recipes with {actors.number} workers")
        desk = Desk(actors)
        waiting = list(recipes)
        try:
            while waiting or desk.rows:
                # A row more whenever an actor would have nothing to do.
                while not desk.hand_out(steals=not waiting) and waiting:
                    name = waiting.pop(0)
                    try:
                        desk.rows[name] = OpenRow(recipes[name], name, rows / name, wanted, options)
                    except DapaError as error:
                        yield name, error
                if desk.rows:
                    yield from desk.wait()
        finally:
            desk.close()


class Desk:
    """Hands jobs to actors.

    Attributes:
        rows: Those that are being measured, by name.
    """

    def __init__(self, actors: Actors) -> None:
        self.rows: dict[str, OpenRow] = {}
        self._actors = actors
        # The row of the job that each actor did last or is doing, and the job after that, if any.
        self._at: dict[int, tuple[str, list[str]]] = {}

    def hand_out(self, *, steals: bool) -> bool:
        """Give every idle actor a job, perhaps of another's row; returns whether there were enough."""
        for number in self._actors.idle:
            if (job := self._next(number, steals)) is None:
                return False
            row, note = job
            follower = row.left[row.left.index(note) + 1 :][:1]
            self._at[number] = row.name, follower
            self._actors.submit((row.name, note), row.begin(note), number)
        return True

    def _next(self, number: int, steals: bool) -> tuple[OpenRow, str] | None:
        """The job for an actor."""
        idle = self._actors.idle
        places = {name for one, (name, _) in self._at.items() if one != number and one not in idle}
        name, follower = self._at.get(number, ("", []))
        own = self.rows.get(name)
        if own is not None and own.left:
            if follower and follower[0] in own.left:
                return own, follower[0]
            return own, own.left[len(own.left) // 2 if name in places else 0]
        for row in self.rows.values():
            if row.left and row.name not in places:
                return row, row.left[0]
        longest = max(self.rows.values(), key=lambda row: len(row.left), default=None)
        if steals and longest is not None and longest.left:
            return longest, longest.left[len(longest.left) // 2]
        return None

    def wait(self) -> Iterator[tuple[str, Row | DapaError]]:
        """Wait for a job to end; yields its row if that is over."""
        key, done, fault = self._actors.wait()
        assert isinstance(key, tuple)
        name, note = key
        row = self.rows[name]
        row.end(note, done, fault)
        if row.is_over:
            row.close()
            del self.rows[name]
            found = row.fault or row.row
            assert found is not None
            yield name, found

    def close(self) -> None:
        """Close the journals of all rows."""
        for row in self.rows.values():
            with suppress(DapaError):
                row.close()
