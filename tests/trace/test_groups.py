"""Groups, their controls, rankings and means, held to enumeration and to scipy."""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from dataclasses import replace

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr, ttest_1samp

from dapa_merge.checkpoint.units import Unit
from dapa_merge.trace.average import (
    ROLES,
    agreement,
    chance_jaccard,
    holding,
    layer_scores,
    mean_effect,
    mean_of,
    rank_correlation,
    roles_of,
)
from dapa_merge.trace.average import ranking_overlap as overlap
from dapa_merge.trace.causal import Trace
from dapa_merge.trace.edits import draw, make_groups, selections_of
from dapa_merge.trace.edits import examine_groups as examine

UNITS = tuple(Unit(layer, module, ()) for layer in range(7) for module in ("gate", "up", "attention"))


def names(units):
    return [str(unit) for unit in units]


def test_groups_are_every_layer_every_third_and_every_module_and_each_leaves_the_rest():
    groups = {group.name: group for group in make_groups(UNITS)}
    assert list(groups) == [*(f"layer {n}" for n in range(7)), "early", "middle", "late", "gate", "up", "attention"]
    assert names(groups["layer 3"].units) == ["3.gate", "3.up", "3.attention"]
    assert {unit.layer for unit in groups["middle"].units} == {2, 3, 4}
    assert {unit.module for unit in groups["up"].units} == {"up"}
    for group in groups.values():
        assert set(group.units) | set(group.rest) == set(UNITS) == set(group.among)
        assert not set(group.units) & set(group.rest)
    for family in ("layer", "third", "module"):
        parts = [group.units for group in groups.values() if group.family == family]
        assert sorted(itertools.chain.from_iterable(map(names, parts))) == sorted(names(UNITS))


def test_a_model_of_one_layer_has_no_empty_groups():
    groups = make_groups([Unit(0, "gate", ())])
    assert all(group.units for group in groups)
    assert {"layer 0", "gate"} < {group.name for group in groups}


def test_a_finding_says_what_a_group_brings_and_what_is_lost_without_it():
    """A score that needs the gates of layers 2 and 3, of which each brings half."""
    needed = {Unit(2, "gate", ()), Unit(3, "gate", ())}
    asked = []

    def score(selection):
        asked.append(selection)
        return 0.1 + 0.4 * len(selection & needed)

    groups = make_groups(UNITS)
    findings = {finding.group.name: finding for finding in examine(groups, score, num_seeds=3, seed=5)}
    for name, share in (("gate", 1), ("up", 0), ("middle", 1), ("layer 2", 0.5), ("late", 0)):
        assert findings[name].sufficiency(0.1)[0] == pytest.approx(share)
        assert findings[name].necessity(0.1)[0] == pytest.approx(share)
    for finding in findings.values():
        assert finding.full == pytest.approx(0.9)
        assert len(finding.control_inserted) == len(finding.control_reverted) == 3
        for inserted, reverted in zip(finding.control_inserted, finding.control_reverted, strict=True):
            # What is taken out is what was put in.
            assert inserted - 0.1 == pytest.approx(0.9 - reverted)
        shares = [(score - 0.1) / 0.8 for score in finding.control_inserted]
        assert finding.sufficiency(0.1)[1] == pytest.approx(shares)
        assert finding.necessity(0.1)[1] == pytest.approx(shares)
    assert set(selections_of(groups, 3, 5)) == set(asked)
    assert len(selections_of(groups, 3, 5)) == len(set(asked))


def test_where_nothing_is_gained_there_is_no_share_of_it():
    (finding, *_) = examine(make_groups(UNITS), lambda _: 0.3, num_seeds=0)
    assert finding.sufficiency(0.3) == finding.necessity(0.3) == (None, [])


def test_random_selections_are_of_the_size_asked_for_and_each_seed_draws_its_own():
    drawn = [draw(UNITS, 5, seed) for seed in range(50)]
    assert {len(selection) for selection in drawn} == {5}
    assert len(set(drawn)) > 45
    assert draw(UNITS, 5, 3) == drawn[3]
    # Every unit has its chance.
    assert set().union(*drawn) == set(UNITS)


@pytest.mark.parametrize(("total", "number"), [(5, 1), (6, 3), (7, 5), (4, 4)])
def test_the_jaccard_index_by_chance_is_the_mean_over_all_selections(total, number):
    chosen = set(range(number))
    indices = [
        len(chosen & set(other)) / len(chosen | set(other)) for other in itertools.combinations(range(total), number)
    ]
    assert chance_jaccard(total, number) == pytest.approx(statistics.fmean(indices))


def test_an_overlap_holds_the_first_units_against_those_selected():
    scores = dict(zip("abcdef", (5.0, 1.0, 4.0, 0.0, 3.0, 2.0), strict=True))
    found = overlap(scores, ["a", "e"])
    assert found.top == ("a", "c")
    assert (found.num_common, found.jaccard) == (1, pytest.approx(1 / 3))
    assert found.jaccard_by_chance == pytest.approx(chance_jaccard(6, 2))
    perfect = overlap(scores, ["a", "c"])
    assert perfect.jaccard == 1
    assert perfect.spearman == pytest.approx(perfect.spearman_at_best)
    assert found.spearman < found.spearman_at_best < 1
    assert math.isnan(overlap(scores, []).jaccard)


def test_units_that_no_score_tells_apart_are_ranked_in_their_order_and_have_no_correlation():
    found = overlap(dict.fromkeys("abcd", 1.0), ["c", "d"])
    assert found.top == ("a", "b")
    assert math.isnan(found.spearman)
    assert math.isnan(rank_correlation([1.0], [2.0]))
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 100.0, 1000.0]) == pytest.approx(1)


def test_an_agreement_is_scipys_rank_correlation_of_what_both_measure_and_its_first_units_are_counted():
    numbers = numpy.random.default_rng(4).normal(size=(2, 40))
    scores, others = (dict(zip(range(40), of.tolist(), strict=True)) for of in (numbers[0], numbers.sum(axis=0)))
    scores[7] = math.nan
    first = sorted(others, key=others.__getitem__)[-10:]
    found = agreement(scores, others, first)
    both = [unit for unit in range(40) if unit != 7]
    known = spearmanr([scores[unit] for unit in both], [others[unit] for unit in both]).statistic
    assert (found.number, found.spearman) == (39, pytest.approx(known))
    # Fisher's z, by hand.
    half = 1.959964 / math.sqrt(39 - 3)
    assert (found.low, found.high) == pytest.approx([math.tanh(math.atanh(known) + sign * half) for sign in (-1, 1)])
    assert found.jaccard == overlap(scores, first).jaccard
    assert math.isnan(agreement(dict.fromkeys(others, 1.0), others, first).low)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=7), st.floats(0.01, 1))
def test_the_fewest_units_that_hold_a_share_are_as_few_as_any_that_do(values, share):
    found = holding(dict(enumerate(values)), share)
    wanted = share * sum(values)
    enough = [
        size
        for size in range(1, len(values) + 1)
        for chosen in itertools.combinations(values, size)
        if sum(chosen) >= wanted * (1 - 1e-9)
    ]
    assert len(found) - min(enough) in (0, 1)
    assert sum(values[unit] for unit in found) >= wanted * (1 - 1e-9)
    assert sum(values[unit] for unit in found[:-1]) < wanted


@given(st.lists(st.lists(st.floats(-100, 100), min_size=3, max_size=3), min_size=2, max_size=8))
def test_a_mean_and_its_interval_are_those_of_a_t_test(rows):
    values = numpy.array(rows)
    found = mean_of(values)
    for column in range(3):
        with warnings.catch_warnings():
            # Of values that are nearly alike.
            warnings.simplefilter("ignore", RuntimeWarning)
            low, high = ttest_1samp(values[:, column], 0).confidence_interval()
        assert found.mean[column] == pytest.approx(statistics.fmean(values[:, column]), abs=1e-9)
        assert (found.low[column], found.high[column]) == pytest.approx((low, high), abs=1e-6)


def test_prompts_without_a_cell_are_left_out_of_its_mean_and_one_alone_has_no_interval():
    found = mean_of(numpy.array([[1.0, math.nan, math.nan], [3.0, 5.0, math.nan]]))
    assert found.mean == pytest.approx([2, 5, math.nan], nan_ok=True)
    assert found.number.tolist() == [2, 1, 0]
    assert numpy.isnan(found.low).tolist() == [False, True, True]


def test_each_token_has_one_role_and_those_before_the_subject_none():
    named = [None if role is None else ROLES[role] for role in roles_of((2, 6), 10)]
    assert named == [
        None, None, "first subject token", "middle subject tokens", "middle subject tokens", "last subject token",
        "next token", "further tokens", "further tokens", "last token",
    ]  # fmt: skip
    assert roles_of((0, 1), 3) == [2, 3, 5]
    # A subject at the very end: its last token is the prompt's.
    assert roles_of((1, 3), 3) == [None, 0, 5]


def test_where_noise_makes_refusing_likelier_what_takes_that_back_counts():
    raised = replace(traced([[0, -3, 0], [0, -1, 0]], (1, 2)), clean=0.0)
    assert raised.total_effect < 0
    assert layer_scores([raised], "mlp") == pytest.approx([3, 1])


def test_what_has_no_score_is_ranked_last():
    assert overlap({"a": 1.0, "b": math.nan, "c": 5.0, "d": math.nan, "e": 9.0}, ["e"]).top == ("e",)


def traced(effect, subject):
    effect = numpy.array(effect, numpy.float32)
    tokens = tuple(map(str, range(effect.shape[1])))
    return Trace("", tokens, subject, 3.0, numpy.array([1.0, 2.0], numpy.float32), {"mlp": effect + 1.5}, 0, 0.0)


def test_the_mean_effect_averages_the_tokens_of_a_role_in_each_prompt_first():
    traces = [
        traced([[0, 1, 2, 4, 8], [0, 0, 0, 0, 1]], (1, 4)),
        traced([[5, 3, 2], [1, 1, 1]], (0, 2)),
    ]
    found = mean_effect(traces, "mlp")
    assert found.mean.shape == (2, len(ROLES))
    assert found.mean[0, 0] == pytest.approx((1 + 5) / 2)
    assert found.mean[0, 1] == pytest.approx(2)
    assert found.mean[0, 2] == pytest.approx((4 + 3) / 2)
    assert math.isnan(found.mean[0, 3])
    assert found.mean[:, 5] == pytest.approx([(8 + 2) / 2, 1])
    assert layer_scores(traces, "mlp") == pytest.approx([5, 1])
    assert traces[0].total_effect == pytest.approx(1.5)
