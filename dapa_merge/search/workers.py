"""The workers of a search, and the oracle that answers its questions by their tests.

With several workers, the idle ones test the selections that the search will probably ask about next. The outcome is
exactly the sequential one: `minimize` asks one question after the other and gets the same answers, some of them
computed ahead of time. They are Ray's, on one machine or a cluster (`cluster.py`). `bench.py` says what a test does;
nothing here loads torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, Protocol, cast

from dapa_merge.checkpoint.units import Unit
from dapa_merge.progress import LOG, advance, remain, task
from dapa_merge.recipe.parameters import spans
from dapa_merge.search.cluster import Actors
from dapa_merge.search.journal import Journal, MarkedJournal
from dapa_merge.search.requirement import Piece

Selection = frozenset[Unit]
# The outcome of a test, as the journal has it: a `Verdict` as plain data, and its `seconds`.
Test = Mapping[str, Any]


class Workers(Protocol):
    """Tests selections, at most `number` at a time.

    Attributes:
        is_away: Whether tests run in other processes, whose progress nothing tells.
    """

    is_away: bool

    @property
    def number(self) -> int: ...

    @property
    def running(self) -> Collection[Selection]:
        """The selections that were submitted and not yet waited for."""

    def submit(self, selection: Selection) -> None:
        """Begin a test."""

    def wait(self) -> tuple[Selection, Test]:
        """Wait for the next test to end."""

    def close(self) -> None:
        """Stop what was begun."""


class Oracle:
    """Answers the questions of delta debugging by tests, each of which is written to the journal.

    Attributes:
        asked: The selections asked, by the names of their units.
    """

    def __init__(self, journal: Journal | MarkedJournal, workers: Workers) -> None:
        self.asked: dict[frozenset[str], Selection] = {}
        self._expected, self._prompts_per_test = 0, 0.0
        self._journal = journal
        self._workers = workers

    def expect(self, num_tests: int, prompts_per_test: float) -> None:
        """Say about how many tests are to come, and how many prompts a test asks."""
        self._expected, self._prompts_per_test = len(self.asked) + num_tests, prompts_per_test

    def _tell(self) -> None:
        """Show which test this is, of about how many."""
        number = len(self.asked)
        total = max(self._expected, number + 1)
        label, left = f"test {number} of about {total}", total - number + 1
        if self._workers.is_away:
            remain(label, prompts=0, tests=left)
        else:
            remain(label, prompts=left * self._prompts_per_test)

    def among(
        self, units: Sequence[Unit], likely: Callable[[Mapping[Selection, bool], int], list[Selection]]
    ) -> Callable[[Selection], bool]:
        """The oracle of a search among some units; workers may still be busy with an earlier search.

        Args:
            units: All units that the search may ask about.
            likely: Takes all answers and a number, and returns that many selections that the search will probably ask
                about next, the certain one first. Idle workers test them ahead of time.
        """
        names = {str(unit): unit for unit in units}
        answers: dict[Selection, bool] = {
            frozenset(names[name] for name in selection): test["holds"]
            for selection, test in self._journal.tests.items()
            if selection <= names.keys()
        }
        # The requirement is made so that the empty selection never holds and the full one does.
        answers |= {frozenset(): False, frozenset(units): True}
        workers = self._workers

        def submit(selection: Selection) -> None:
            if selection not in workers.running and len(workers.running) < workers.number:
                workers.submit(selection)

        def holds(selection: Selection) -> bool:
            self.asked[names_of(selection)] = selection
            if selection not in answers:
                self._tell()
                with task(f"testing in {workers.number} processes", 1, "tests") if workers.is_away else nullcontext():
                    settle(selection)
            return answers[selection]

        def settle(selection: Selection) -> None:
            while selection not in answers:
                submit(selection)
                if len(workers.running) < workers.number:
                    for other in likely(answers, workers.number + len(workers.running)):
                        submit(other)
                done, test = workers.wait()
                answers[done] = self._record(done, test)
            advance(1, "tests")

        return holds

    def _record(self, selection: Selection, test: Test) -> bool:
        self._journal.record(names_of(selection), test)
        why = f": {test['complaint']}" if test["complaint"] else ""
        LOG.info(f"  {'holds' if test['holds'] else 'fails'}  {spans(in_order(selection))}{why}")
        return bool(test["holds"])


class RayWorkers:
    """Tests selections in Ray actors, each with a target of its own."""

    is_away = True

    def __init__(self, actors: Actors, task_of: Callable[[Selection], Any], *, owns: bool = True) -> None:
        """Test in actors.

        Args:
            actors: What does the tests.
            task_of: The argument for an actor that tests a selection.
            owns: Whether to stop them in the end.
        """
        self._actors, self._task_of, self._owns = actors, task_of, owns
        self.number = actors.number

    @property
    def running(self) -> Collection[Selection]:
        return set(cast("tuple[Selection, ...]", self._actors.running))

    def submit(self, selection: Selection) -> None:
        self._actors.submit(selection, self._task_of(selection))

    def wait(self) -> tuple[Selection, Test]:
        """Wait for the next test to end; raises its worker's error, or `UsageError` if workers are lost."""
        selection, outcome, error = self._actors.wait()
        if error is not None:
            raise error
        return cast("Selection", selection), outcome

    def close(self) -> None:
        """Stop the workers, if they are its own, even during a test."""
        if self._owns:
            self._actors.close()


def in_order(selection: Iterable[Unit]) -> list[Unit]:
    """Sort units into the order in which every process transplants them."""
    return sorted(selection, key=lambda unit: (unit.layer, unit.module, unit.rows or (0, 0)))


def names_of(units: Collection[Unit]) -> frozenset[str]:
    """The names of units, which identify them in a journal."""
    return frozenset(map(str, units))


def note_of(what: str, units: Iterable[object]) -> str:
    """A name for a journal's note on some units (or whatever decides it), short even for many."""
    return f"{what} {hashlib.sha256(' '.join(map(str, units)).encode()).hexdigest()[:32]}"


def is_test(test: Test) -> bool:
    """Whether a test has the pieces and counts that a search records; a stranger may have written anything."""
    names = {item.name for item in fields(Piece)}
    pieces, total = test.get("pieces"), test.get("num_prompts")
    if not isinstance(pieces, list) or not all(isinstance(piece, dict) and set(piece) == names for piece in pieces):
        return False
    counts = [total, *(value for piece in pieces for name, value in piece.items() if name != "kind")]
    return all(type(value) is int and 0 <= value < 1 << 53 for value in counts)


def pieces_of_test(test: Test) -> list[Piece]:
    """The pieces of prompts that a test asked."""
    return [Piece(**piece) for piece in test["pieces"]]
