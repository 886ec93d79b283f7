"""The published algorithms of delta debugging, and the parts that every algorithm shares.

An algorithm is a generator that yields one question at a time and receives the answer; `delta/minimize.py` drives it.
Standard library only.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

U = TypeVar("U", bound=Hashable)

# The paper's initial chance that a unit is needed.
PROBDD_START = 0.1


class Query(NamedTuple):
    """The next question: whether `selection` holds, and the chance of that, in [0, 1].

    The chance only decides which questions are worth asking ahead of time.
    """

    selection: tuple[Any, ...]
    chance: float


Script = Generator[Query, bool, None]
"""A running algorithm: yields questions, receives answers, and ends after its last question."""


def ddmin(units: tuple[Any, ...]) -> Script:
    """Zeller and Hildebrandt 2002, section 3.2, figure 5: chunks, then their complements, then finer chunks."""
    current = units
    num_chunks = 2
    while len(current) > 1:
        chunks = _split(current, num_chunks)
        complements = [without(current, chunk) for chunk in chunks]
        for selection in [*chunks, *complements]:
            if (yield Query(selection, 0.3)):
                is_complement = len(chunks) > 2 and selection in complements
                current, num_chunks = selection, max(num_chunks - 1, 2) if is_complement else 2
                break
        else:
            if num_chunks >= len(current):
                return
            num_chunks = min(2 * num_chunks, len(current))
    # The paper assumes that the empty configuration passes; here it is asked, so that one unit can be certified too.
    if current:
        yield Query((), 0.1)


def _split(units: tuple[U, ...], num_chunks: int) -> list[tuple[U, ...]]:
    """Contiguous chunks of nearly equal size, each of at least one unit."""
    num_chunks = min(num_chunks, len(units))
    bounds = [len(units) * index // num_chunks for index in range(num_chunks + 1)]
    return [units[start:stop] for start, stop in itertools.pairwise(bounds)]


def probdd(units: tuple[Any, ...]) -> Script:
    """Wang et al. 2021: a probability for every unit, updated by Bayes; then the single removals that it lacks."""
    needed = dict.fromkeys(units, PROBDD_START)
    current = units
    while open_units := sorted((unit for unit in current if needed[unit] < 1), key=needed.__getitem__):
        # Leave out the units that are least likely to be needed, as many as promise the largest gain.
        chances = list(itertools.accumulate((1 - needed[unit] for unit in open_units), lambda one, other: one * other))
        size = max(range(1, len(open_units) + 1), key=lambda size: size * chances[size - 1])
        left_out, chance = open_units[:size], chances[size - 1]
        rest = without(current, left_out)
        if (yield Query(rest, chance)):
            current = rest
        elif size == 1:
            needed[left_out[0]] = 1.0
        else:
            # Bayes: at least one of them is needed. Kept below 1, which only a test of the unit alone can show.
            needed.update({unit: min(needed[unit] / (1 - chance), 1 - 1e-9) for unit in left_out})
    yield from single_removals(current)


def single_removals(current: tuple[Any, ...], order: Sequence[Any] | None = None) -> Script:
    """Leave out one unit after the other until none can be: the certificate of 1-minimality.

    Args:
        current: A selection that holds.
        order: The same units, as they are left out; None for their own order.
    """
    left = list(current if order is None else order)
    position = 0
    failed_in_a_row = 0
    while failed_in_a_row < len(left):
        position %= len(left)
        rest = without(current, [left[position]])
        if (yield Query(rest, 0.05)):
            current, failed_in_a_row = rest, 0
            del left[position]
        else:
            position, failed_in_a_row = position + 1, failed_in_a_row + 1


def without(units: tuple[U, ...], left_out: Sequence[U]) -> tuple[U, ...]:
    """The units in order, except those left out."""
    gone = set(left_out)
    return tuple(unit for unit in units if unit not in gone)
