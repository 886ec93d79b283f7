"""Intervals and paired tests, against closed formulas and published examples."""

from __future__ import annotations

import math
from math import comb, sqrt
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.measure.figures import Change
from dapa_merge.measure.statistics import interval, mean_interval, pareto_front
from dapa_merge.measure.statistics import mcnemar as compare

OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=200)


def pairs(newly_refused: int, no_longer_refused: int, same: int = 0):
    before = [False] * newly_refused + [True] * no_longer_refused + [True] * same
    after = [True] * newly_refused + [False] * no_longer_refused + [True] * same
    return before, after


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_wilson_intervals_are_found(successes, total, low, high):
    assert interval(successes, total) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 2000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_an_interval_is_that_of_wilsons_formula_and_holds_the_share(trials):
    successes, total = trials
    share, z = successes / total, NormalDist().inv_cdf(0.975)
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    low, high = interval(successes, total)
    assert (low, high) == (pytest.approx(center - half, abs=1e-9), pytest.approx(center + half, abs=1e-9))
    assert 0 <= low <= share <= high <= 1


def test_the_interval_of_a_mean_is_that_of_a_published_example():
    """Student's sleep data (Biometrika 6, 1908), in R: t.test(extra[group == 1])."""
    sleep = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    assert mean_interval(sleep) == (pytest.approx(-0.5297804), pytest.approx(2.0297804))


def test_values_that_are_alike_have_an_interval_without_width_and_two_have_none():
    assert mean_interval([1 / 3] * 4) == pytest.approx((1 / 3, 1 / 3))
    assert mean_interval([0.1, 0.2]) is None
    assert mean_interval([0.1, 0.2, math.nan]) is None


def test_no_trial_refused_still_leaves_room_above():
    low, high = interval(0, 64)
    assert low == 0
    assert high == pytest.approx(1.959964**2 / (64 + 1.959964**2), abs=1e-6)


def test_the_published_exact_mcnemar_test_is_found():
    """The example of the R package exact2x2 (Fay, "Exact McNemar's Test", 2 against 9 pairs)."""
    assert compare(*pairs(2, 9, same=33)).p_value == pytest.approx(0.06543, abs=5e-6)


@given(OUTCOMES)
def test_the_p_value_is_that_of_tossing_a_coin_for_each_pair_that_differs(outcomes):
    before, after = [once for once, _ in outcomes], [now for _, now in outcomes]
    gained = sum(now and not once for once, now in outcomes)
    lost = sum(once and not now for once, now in outcomes)
    tail = sum(comb(gained + lost, count) for count in range(min(gained, lost) + 1))
    p_value = compare(before, after).p_value
    assert p_value == pytest.approx(min(1, 2 * tail / 2 ** (gained + lost)), rel=1e-9)
    assert compare(after, before).p_value == pytest.approx(p_value, rel=1e-12)


def test_prompts_that_stay_as_they_were_prove_nothing():
    assert compare([True] * 50 + [False] * 50, [True] * 50 + [False] * 50).p_value == 1
    assert compare([], []).p_value == 1


def test_a_change_counts_both_directions_and_says_whether_chance_does_as_much():
    # 2 / 2^5 = 0.0625 and 2 / 2^6 = 0.03125: five prompts prove nothing, six do.
    assert compare(*pairs(5, 0)) == Change(5, 0, pytest.approx(0.0625), within_noise=True)
    assert compare(*pairs(6, 0)) == Change(6, 0, pytest.approx(0.03125), within_noise=False)
    assert compare(*pairs(0, 6, same=9)) == Change(0, 6, pytest.approx(0.03125), within_noise=False)
    assert compare(*pairs(8, 7)).p_value == 1


def test_a_p_value_too_small_for_eyes_is_no_zero():
    p_value = compare(*pairs(64, 0)).p_value
    assert p_value == pytest.approx(2**-63)
    assert math.isfinite(math.log(p_value))


def test_outcomes_of_other_prompts_are_not_paired():
    with pytest.raises(ValueError, match="zip"):
        compare([True], [True, False])


NUMBERS = st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0, math.inf, math.nan])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8))
def test_a_point_is_on_the_front_unless_another_is_as_good_in_both_and_better_in_one(points):
    def beats(one, other):
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    known = [point for point in points if not any(map(math.isnan, point))]
    expected = [point in known and not any(beats(one, point) for one in known) for point in points]
    assert pareto_front(points) == expected
