"""Which of many points are worth having, where several things count. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(costs: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other one dominates: is nowhere worse, and somewhere better.

    Args:
        costs: Of each point, what should be small, as many for each.
    """

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)

    return [not any(dominates(other, point) for other in costs) for point in costs]
