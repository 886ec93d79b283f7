"""Delta debugging among bundles of units: all that an edit changes in the attention, or in the MLP, of one layer.

A search among hundreds of matrices asks about each at least once before it may call them needed. Where an edit changes
that many a little, few of them can be left out, and a bundle is as much as anyone wants to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from dapa_merge.checkpoint.units import ATTENTION, Unit
from dapa_merge.delta.minimize import Minimum, SearchInterrupted, SearchStopped, foresee, minimize

# Units that are left out or kept together.
# Of more matrices than this, an edit that changes all of them a little is searched in bundles first.
MAX_ALONE = 96
Bundle = tuple[Unit, ...]
Selection = frozenset[Unit]
Holds = Callable[[Selection], bool]


def each_alone(units: Iterable[Unit]) -> tuple[Bundle, ...]:
    """A bundle for each unit."""
    return tuple((unit,) for unit in units)


def by_layer(units: Iterable[Unit]) -> tuple[Bundle, ...]:
    """A bundle for the attention of each layer, and one for its MLP; in the order of their first units."""
    found: dict[tuple[int, bool], list[Unit]] = {}
    for unit in units:
        found.setdefault((unit.layer, unit.module in ATTENTION), []).append(unit)
    return tuple(map(tuple, found.values()))


def scans(number: int) -> list[tuple[int, float]]:
    """Tests of a guided search among so many bundles, and the share of these that it goes on for if left out by then.

    It halves what it leaves out until the rest holds; the first two tests are of all bundles and of the likeliest. In
    the end it has found about how many can be left out, and after half of these tests whether they are hardly any.
    """
    most = math.ceil(math.log2(max(number, 2))) + 3
    return [(math.ceil(most / 2), 1 / 8), (most, 1 / 2)]


def minimize_bundles(
    bundles: Sequence[Bundle],
    among: Callable[[Sequence[Unit], Callable[[Mapping[Selection, bool], int], list[Selection]]], Holds],
    *,
    algorithm: str,
    prior: Mapping[Unit, float] | None,
    sizes: Mapping[Unit, int],
    max_tests: int | None,
) -> Minimum[Unit]:
    """As `minimize`, but each question leaves out whole bundles.

    Args:
        bundles: Of distinct units.
        among: `Oracle.among`.
        algorithm: As for `minimize`.
        prior: Of every unit; a bundle's is their sum.
        sizes: Likewise.
        max_tests: As for `minimize`.

    Returns:
        The units of the bundles that are left. `one_minimal` says that no bundle can be left out, and the certificate
        has, for each unit, the selection without its bundle.

    Raises:
        SearchInterrupted, SearchStopped: As `minimize` does, with units too.
    """
    how: dict[str, Any] = {
        "algorithm": algorithm,
        "prior": None if prior is None else {bundle: sum(map(prior.__getitem__, bundle)) for bundle in bundles},
        "sizes": {bundle: sum(map(sizes.__getitem__, bundle)) for bundle in bundles},
    }

    def likely(answers: Mapping[Selection, bool], number: int) -> list[Selection]:
        known = {_bundled(bundles, selection): answer for selection, answer in answers.items()}
        # Selections that divide a bundle answer nothing here.
        known.pop(None, None)
        return [_units(found) for found in foresee(bundles, known, number, **how)]  # type: ignore[arg-type]

    holds = among(tuple(chain.from_iterable(bundles)), likely)
    try:
        return _of_units(minimize(bundles, lambda selection: holds(_units(selection)), max_tests=max_tests, **how))
    except (SearchInterrupted, SearchStopped) as stop:
        raise type(stop)(_of_units(stop.best)) from stop.__cause__


def _of_units(found: Minimum[Bundle]) -> Minimum[Unit]:
    certificate = {
        unit: tuple(chain.from_iterable(others)) for bundle, others in found.certificate.items() for unit in bundle
    }
    return Minimum(tuple(chain.from_iterable(found.units)), found.tests, found.one_minimal, certificate)


def _units(bundles: Iterable[Bundle]) -> Selection:
    return frozenset(chain.from_iterable(bundles))


def _bundled(bundles: Sequence[Bundle], selection: Selection) -> frozenset[Bundle] | None:
    """The bundles that make up a selection; None if it has a part of one."""
    found = frozenset(bundle for bundle in bundles if bundle[0] in selection)
    return found if _units(found) == selection else None
