from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.search.delta import DoesNotHold, SearchInterrupted, SearchStopped, minimize


def monotone_functions(num_units: int) -> list[int]:
    """Every monotone Boolean function of `num_units` units, as a bit per subset (Dedekind: 2, 3, 6, 20, 168, 7581)."""
    functions = [0, 1]
    for bit in range(num_units):
        functions = [low | high << (1 << bit) for low in functions for high in functions if low & ~high == 0]
    return functions


def oracle_of(table: int, num_units: int):
    """The oracle with a bit per subset, and the list in which it writes down what it was asked."""
    asked: list[frozenset[int]] = []

    def holds(selection: frozenset[int]) -> bool:
        asked.append(selection)
        return bool(table >> sum(1 << unit for unit in selection) & 1)

    return holds, asked


def assert_one_minimal_by_brute_force(table: int, num_units: int) -> None:
    holds, asked = oracle_of(table, num_units)
    units = tuple(range(num_units))
    full = (1 << num_units) - 1
    if not table >> full & 1:
        with pytest.raises(DoesNotHold):
            minimize(units, holds, algorithm="ddmin")
        return
    minimum = minimize(units, holds, algorithm="ddmin")
    truth, _ = oracle_of(table, num_units)
    assert truth(frozenset(minimum.units))
    assert minimum.one_minimal
    for unit in minimum.units:
        others = tuple(other for other in minimum.units if other != unit)
        assert not truth(frozenset(others))
        assert minimum.certificate[unit] == others
    assert minimum.units == tuple(sorted(minimum.units))
    assert len(asked) == len(set(asked)) == minimum.tests


def test_the_enumeration_is_complete():
    assert [len(monotone_functions(size)) for size in range(6)] == [2, 3, 6, 20, 168, 7581]


@pytest.mark.parametrize("num_units", range(6))
def test_ddmin_is_one_minimal_on_every_monotone_oracle(num_units):
    for table in monotone_functions(num_units):
        assert_one_minimal_by_brute_force(table, num_units)


@pytest.mark.parametrize("num_units", range(4))
def test_ddmin_is_one_minimal_on_every_oracle_of_few_units(num_units):
    for table in range(1 << (1 << num_units)):
        assert_one_minimal_by_brute_force(table, num_units)


@pytest.mark.parametrize("num_units", [4, 5, 6, 7, 8])
def test_ddmin_is_one_minimal_on_many_oracles_that_are_not_monotone(num_units):
    generator = random.Random(num_units)
    for density in (0.05, 0.3, 0.7):
        for _ in range(300):
            subsets = 1 << num_units
            table = sum((generator.random() < density) << subset for subset in range(subsets)) | 1 << (subsets - 1)
            assert_one_minimal_by_brute_force(table, num_units)


@pytest.mark.parametrize("num_units", [6, 7, 8])
def test_ddmin_is_one_minimal_on_many_monotone_oracles_of_more_units(num_units):
    generator = random.Random(num_units)
    for _ in range(300):
        needed = [generator.getrandbits(num_units) for _ in range(generator.randint(1, 4))]
        table = sum(any(subset & need == need for need in needed) << subset for subset in range(1 << num_units))
        assert_one_minimal_by_brute_force(table, num_units)


@given(st.sets(st.integers(0, 63), max_size=8))
def test_ddmin_finds_exactly_the_units_that_are_all_needed(needed):
    minimum = minimize(range(64), lambda selection: needed <= selection)
    assert set(minimum.units) == needed


def test_the_cost_stays_near_the_reference():
    # picire's ddmin needs 60 tests for 6 of 32 clustered units; the caching of repeated questions keeps ours below.
    needed = {12, 13, 14, 15, 16, 17}
    minimum = minimize(range(32), lambda selection: needed <= selection)
    assert set(minimum.units) == needed
    assert minimum.tests <= 60


def test_units_come_back_in_input_order():
    units = ["delta", "alpha", "gamma", "beta"]
    assert minimize(units, lambda selection: {"gamma", "delta"} <= selection).units == ("delta", "gamma")


def test_a_budget_ends_the_search_honestly():
    for budget in range(1, 46):
        asked = []

        def holds(selection, asked=asked):
            asked.append(selection)
            return {5, 6, 7, 20, 21, 22} <= selection

        minimum = minimize(range(32), holds, max_tests=budget)
        assert minimum.tests == len(asked) <= budget
        assert {5, 6, 7, 20, 21, 22} <= set(minimum.units)
        assert minimum.one_minimal == (len(minimum.certificate) == len(minimum.units))
    assert not minimize(range(32), lambda selection: {5, 6} <= selection, max_tests=5).one_minimal


def failing_after(num_tests: int, error: BaseException):
    tests = itertools.count(1)

    def holds(selection):
        if next(tests) > num_tests:
            raise error
        return {1, 2} <= selection

    return holds


def test_an_interrupted_search_raises_with_its_best_result():
    with pytest.raises(SearchInterrupted) as caught:
        minimize(range(8), failing_after(3, OSError("the disk is gone")))
    assert {1, 2} <= set(caught.value.best.units) < set(range(8))
    assert isinstance(caught.value.__cause__, OSError)


def test_ctrl_c_stays_a_keyboard_interrupt():
    with pytest.raises(KeyboardInterrupt) as caught:
        minimize(range(8), failing_after(3, KeyboardInterrupt()))
    assert isinstance(caught.value, SearchStopped)
    assert {1, 2} <= set(caught.value.best.units)


def test_a_failure_on_the_full_set_is_passed_on_as_it_is():
    with pytest.raises(OSError, match="gone"):
        minimize(range(8), failing_after(0, OSError("gone")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algorithm": "magic"}, "unknown search algorithm 'magic'; known: ddmin"),
        ({"max_tests": 0}, "max_tests must be at least 1, not 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        minimize(range(3), lambda selection: True, **arguments)


def test_repeated_units_are_refused():
    with pytest.raises(ValueError, match="not distinct"):
        minimize([1, 1], lambda selection: True)
