"""The other way round: find a selection that is as large as a limit allows.

Pure functions over any hashable units; standard library only. Delta debugging leaves out what is not needed; here the
full set is too much, and units are added in a given order as long as they fit. The end is that of `ddmax` (L.
Kirschner, E. Soremekun and A. Zeller, "Debugging Inputs", ICSE 2020): nothing that was left out can be added. The way,
by an order, is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

U = TypeVar("U", bound=Hashable)


def fill(order: Sequence[U], fits: Callable[[frozenset[U]], bool], *, max_tests: int | None = None) -> tuple[U, ...]:
    """Find a large selection that fits, with the first units of the order rather than the last.

    First the longest beginning of the order that fits is found by bisection, then what still fits of the rest, by
    halves. If every part of a selection that fits does too, and the tests suffice, the result is maximal: no further
    unit fits.

    Args:
        order: The candidates, distinct, the most wanted first.
        fits: Never asked the same selection twice, nor the empty one, which is taken to fit.
        max_tests: Stop after this many questions; the result fits all the same.

    Returns:
        The selection, in the order given.
    """
    asked: dict[frozenset[U], bool] = {frozenset(): True}

    def ask(units: Sequence[U]) -> bool:
        selection = frozenset(units)
        if selection not in asked:
            if max_tests is not None and len(asked) > max_tests:
                # Not asked, so not known to fit.
                return False
            asked[selection] = fits(selection)
        return asked[selection]

    if ask(order):
        return tuple(order)
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ask(order[:middle]) else (low, middle)
    chosen = list(order[:low])
    # Together with what was chosen before it, the unit at `low` does not fit.
    groups = [order[low + 1 :]]
    while groups:
        group = groups.pop(0)
        if not group:
            continue
        if ask([*chosen, *group]):
            chosen += group
        elif len(group) > 1:
            middle = len(group) // 2
            groups[:0] = [group[:middle], group[middle:]]
    return tuple(chosen)
