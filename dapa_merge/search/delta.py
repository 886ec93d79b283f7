"""Delta debugging: the smallest selection of units that still does what all of them do.

Pure functions over any hashable units; standard library only. `ddmin` is the algorithm of Zeller and Hildebrandt,
"Simplifying and Isolating Failure-Inducing Input", IEEE TSE 28(2), 2002, section 3.2, figure 5. "The test fails" of
that paper is `holds(selection)` here.

Every algorithm is correct for any oracle, monotone or not, that gives one answer per selection: what it returns holds,
and if `Minimum.one_minimal` is true then no single unit can be left out of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

U = TypeVar("U", bound=Hashable)


@dataclass(frozen=True)
class Minimum(Generic[U]):
    """What a search found.

    Attributes:
        units: The smallest selection found that holds, in input order.
        tests: How many distinct selections were asked, the full one included.
        one_minimal: Whether leaving out any single unit was tried, and did not hold, for every unit.
        certificate: For each kept unit whose single removal was asked, the selection without it, which did not hold.
    """

    units: tuple[U, ...]
    tests: int
    one_minimal: bool
    certificate: Mapping[U, tuple[U, ...]]


class DoesNotHold(Exception):
    """The full set of units does not hold, so that there is nothing to minimize."""


class SearchInterrupted(Exception):
    """`holds` raised before the search ended; `best` is the smallest selection seen to hold, `__cause__` the reason.

    Raised only for an exception that is not `KeyboardInterrupt`; see `SearchStopped` for that one.
    """

    def __init__(self, best: Minimum[Any]) -> None:
        super().__init__(f"the search ended early, with {len(best.units)} units after {best.tests} tests")
        self.best = best


class SearchStopped(KeyboardInterrupt):
    """Ctrl-C during a search: a `KeyboardInterrupt` that carries the best selection so far in `best`."""

    def __init__(self, best: Minimum[Any]) -> None:
        super().__init__(f"the search was stopped, with {len(best.units)} units after {best.tests} tests")
        self.best = best


def minimize(
    units: Sequence[U],
    holds: Callable[[frozenset[U]], bool],
    *,
    algorithm: str = "ddmin",
    max_tests: int | None = None,
) -> Minimum[U]:
    """Find a 1-minimal selection of `units` that holds.

    Args:
        units: The candidates, distinct, in the order in which neighbours belong together.
        holds: The oracle. Never asked the same selection twice, and never the empty one unless all else is gone.
        algorithm: `ddmin`.
        max_tests: Stop after so many distinct selections; the result then says `one_minimal=False` unless it is.

    Raises:
        DoesNotHold: If `holds` rejects the full set.
        SearchInterrupted: If `holds` raises after the full set held.
        SearchStopped: If that was a `KeyboardInterrupt`.
        ValueError: For an unknown algorithm, repeated units, or `max_tests` below 1.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown search algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
    if len(set(units)) != len(units):
        raise ValueError("the units to minimize are not distinct")
    if max_tests is not None and max_tests < 1:
        raise ValueError(f"max_tests must be at least 1, not {max_tests}")
    oracle = _Oracle(tuple(units), holds, max_tests)
    if not oracle.ask(oracle.units):
        raise DoesNotHold(f"the full set of {len(units)} units does not hold")
    try:
        ALGORITHMS[algorithm](oracle)
    except _OutOfTests:
        pass
    except KeyboardInterrupt as stop:
        raise SearchStopped(oracle.minimum()) from stop
    except Exception as failure:
        raise SearchInterrupted(oracle.minimum()) from failure
    return oracle.minimum()


class _OutOfTests(Exception):
    pass


class _Oracle(Generic[U]):
    """Remembers every answer, counts the distinct questions, and keeps the smallest selection that held."""

    def __init__(self, units: tuple[U, ...], holds: Callable[[frozenset[U]], bool], max_tests: int | None) -> None:
        self.units = units
        self.best = units
        self._holds = holds
        self._max_tests = max_tests
        self._answers: dict[frozenset[U], bool] = {}

    def ask(self, selection: tuple[U, ...]) -> bool:
        key = frozenset(selection)
        if key not in self._answers:
            if self._max_tests is not None and len(self._answers) >= self._max_tests:
                raise _OutOfTests
            self._answers[key] = bool(self._holds(key))
        # Judged on every ask, not only on a new one: the algorithm's current selection is always the best.
        if self._answers[key] and len(selection) < len(self.best):
            self.best = selection
        return self._answers[key]

    def minimum(self) -> Minimum[U]:
        without = {unit: tuple(other for other in self.best if other != unit) for unit in self.best}
        certificate = {
            unit: others for unit, others in without.items() if self._answers.get(frozenset(others)) is False
        }
        return Minimum(self.best, len(self._answers), len(certificate) == len(self.best), certificate)


def _ddmin(oracle: _Oracle[U]) -> None:
    current = oracle.units
    num_chunks = 2
    while len(current) > 1:
        chunks = _split(current, num_chunks)
        reduced = _first_that_holds(oracle, chunks)
        if reduced is not None:
            current, num_chunks = reduced, 2
            continue
        complements = [tuple(unit for unit in current if unit not in set(chunk)) for chunk in chunks]
        reduced = _first_that_holds(oracle, complements)
        if reduced is not None:
            current, num_chunks = reduced, max(num_chunks - 1, 2)
        elif num_chunks < len(current):
            num_chunks = min(2 * num_chunks, len(current))
        else:
            return
    # The paper assumes that the empty configuration passes; here it is asked, so that one unit can be certified too.
    if current:
        oracle.ask(())


def _first_that_holds(oracle: _Oracle[U], selections: Sequence[tuple[U, ...]]) -> tuple[U, ...] | None:
    return next((selection for selection in selections if oracle.ask(selection)), None)


def _split(units: tuple[U, ...], num_chunks: int) -> list[tuple[U, ...]]:
    """Contiguous chunks of nearly equal size; a single unit is split into itself and nothing is lost."""
    num_chunks = min(num_chunks, len(units))
    bounds = [len(units) * index // num_chunks for index in range(num_chunks + 1)]
    return [units[start:stop] for start, stop in itertools.pairwise(bounds)]


ALGORITHMS: dict[str, Callable[[_Oracle[Any]], None]] = {"ddmin": _ddmin}
