"""Delta debugging: find a small selection of units that still has the effect of all of them.

Pure functions over any hashable units; standard library only. "The test fails" of the literature is `holds(selection)`
here. The three algorithms are generators that ask one question after the other:

- `ddmin`: A. Zeller and R. Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE TSE 28(2), 2002,
  section 3.2, figure 5;
- `probdd`: G. Wang et al., "Probabilistic Delta Debugging", ESEC/FSE 2021, followed by single removals, because it does
  not end 1-minimal by itself;
- `guided`: ours, in `delta/guided.py`.

Every algorithm is correct for any oracle, monotone or not, that gives one answer per selection: its result holds, and
if `Minimum.one_minimal` is true, no single unit can be left out of it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dapa_merge.delta.classic import Query, Script, ddmin, probdd
from dapa_merge.delta.guided import guided

U = TypeVar("U", bound=Hashable)


@dataclass(frozen=True)
class Minimum(Generic[U]):
    """The outcome of a search.

    Attributes:
        units: The smallest selection found that holds, in input order.
        tests: Number of distinct selections asked, including the full one.
        one_minimal: Whether, for every unit, the selection without it was asked and did not hold.
        certificate: For each kept unit whose single removal was asked, the selection without it, which did not hold.
    """

    units: tuple[U, ...]
    tests: int
    one_minimal: bool
    certificate: Mapping[U, tuple[U, ...]]


class DoesNotHold(Exception):
    """The full set of units does not hold, so there is nothing to minimize."""


class SearchInterrupted(Exception):
    """`holds` raised an exception (`__cause__`) other than `KeyboardInterrupt`; `best` is the outcome so far."""

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
    algorithm: str = "guided",
    prior: Mapping[U, float] | None = None,
    sizes: Mapping[U, int] | None = None,
    max_tests: int | None = None,
) -> Minimum[U]:
    """Find a 1-minimal selection of `units` that holds.

    Args:
        units: The candidates, distinct, in an order in which neighbours belong together.
        holds: The oracle. Never asked the same selection twice, and never the empty one unless all else is gone.
        algorithm: `guided`, `probdd` or `ddmin`.
        prior: The expected effect of every unit, on any scale; only `guided` uses it.
        sizes: The size of every unit, such as its parameters. Of units that are equally likely to be needed, `guided`
            leaves out the larger first, so that a tie ends with the smaller selection.
        max_tests: Stop after this many distinct selections; the result then may not be 1-minimal.

    Raises:
        DoesNotHold: If `holds` rejects the full set.
        SearchInterrupted: If `holds` raises after the full set held.
        SearchStopped: If that was a `KeyboardInterrupt`.
        ValueError: For an unknown algorithm, repeated units, a prior that lacks a unit or is not finite, a size
            that is missing, or `max_tests` below 1.
    """
    if max_tests is not None and max_tests < 1:
        raise ValueError(f"max_tests must be at least 1, not {max_tests}")
    script = _script(units, algorithm, prior, sizes)
    asked = _Answers(tuple(units), holds, max_tests)
    if not asked.ask(asked.units):
        raise DoesNotHold(f"the full set of {len(units)} units does not hold")
    try:
        _follow(script, asked.ask)
    except _OutOfTests:
        pass
    except KeyboardInterrupt as stop:
        raise SearchStopped(asked.minimum()) from stop
    except Exception as failure:
        raise SearchInterrupted(asked.minimum()) from failure
    return asked.minimum()


def foresee(
    units: Sequence[U],
    answers: Mapping[frozenset[U], bool],
    number: int,
    *,
    algorithm: str = "guided",
    prior: Mapping[U, float] | None = None,
    sizes: Mapping[U, int] | None = None,
) -> list[frozenset[U]]:
    """The selections that `minimize` is most likely to ask about next, given all answers so far, likeliest first.

    The first one is certain. Each of the others depends on answers that are still to come. At most `number` come back;
    the other arguments are those of `minimize`.
    """
    found: dict[frozenset[U], None] = {}
    # Paths of assumed answers, the likeliest first; the counter keeps equally likely ones in order.
    paths: list[tuple[float, int, dict[frozenset[U], bool]]] = [(-1.0, 0, {})]
    counter = itertools.count(1)
    full = frozenset(units)
    while paths and len(found) < number:
        likelihood, _, assumed = heapq.heappop(paths)
        known = {**answers, **assumed}
        question = (
            _first_unanswered(_script(units, algorithm, prior, sizes), known)
            if full in known
            else Query(tuple(units), 1.0)
        )
        if question is None:
            continue
        selection = frozenset(question.selection)
        found[selection] = None
        for answer, chance in ((True, question.chance), (False, 1 - question.chance)):
            if chance > 0:
                heapq.heappush(paths, (likelihood * chance, next(counter), {**assumed, selection: answer}))
    return list(found)


class _OutOfTests(Exception):
    pass


class _Answers(Generic[U]):
    """Remembers every answer, and the smallest selection that held."""

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
        everything = frozenset(self.best)
        certificate = {
            unit: tuple(other for other in self.best if other != unit)
            for unit in self.best
            if self._answers.get(everything - {unit}) is False
        }
        return Minimum(self.best, len(self._answers), len(certificate) == len(self.best), certificate)


def _script(
    units: Sequence[U], algorithm: str, prior: Mapping[U, float] | None, sizes: Mapping[U, int] | None
) -> Script:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown search algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
    if len(set(units)) != len(units):
        raise ValueError("the units to minimize are not distinct")
    if prior is not None:
        missing = [unit for unit in units if not _is_score(prior.get(unit))]
        if missing:
            raise ValueError(f"the prior has no finite score for {len(missing)} of the units, such as {missing[0]}")
    if sizes is not None and (missing := [unit for unit in units if unit not in sizes]):
        raise ValueError(f"{len(missing)} of the units have no size, such as {missing[0]}")
    return ALGORITHMS[algorithm](tuple(units), prior, sizes)


def _is_score(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        return False


def _follow(script: Script, ask: Callable[[tuple[Any, ...]], bool]) -> None:
    """Answer an algorithm's questions until it has none."""
    question = next(script, None)
    while question is not None:
        answer = ask(question.selection)
        try:
            question = script.send(answer)
        except StopIteration:
            return


def _first_unanswered(script: Script, answers: Mapping[frozenset[Any], bool]) -> Query | None:
    try:
        question = next(script)
        while frozenset(question.selection) in answers:
            question = script.send(answers[frozenset(question.selection)])
    except StopIteration:
        return None
    return question


ALGORITHMS: dict[str, Callable[[tuple[Any, ...], Mapping[Any, float] | None, Mapping[Any, int] | None], Script]] = {
    "guided": guided,
    "probdd": lambda units, _prior, _sizes: probdd(units),
    "ddmin": lambda units, _prior, _sizes: ddmin(units),
}
