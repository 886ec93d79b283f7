"""The rule by which one setting of several is taken, without models."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.compare.methods import METHODS, TUNED, method_of
from dapa_merge.compare.result import Trial
from dapa_merge.compare.tuning import best, thinned
from dapa_merge.search.requirement import constraints_of, requirement

SETTINGS = {"retain": 0.9, "max_over_refusal": 0.05, "max_perplexity": 1.05}
TARGET = {"score": 0.0, "over_refusal": 0.0, "perplexity": 2.0}
SOURCE = {"score": 1.0, "over_refusal": 0.1, "perplexity": 2.0}
LIMITS = requirement(constraints_of(SETTINGS), TARGET, SOURCE, SETTINGS)
SHARES = st.sampled_from([0.0, 0.03, 0.5, 0.89, 0.9, 0.95, 1.0])


def trial(score: float, over_refusal: float = 0.0, perplexity: float = 2.0) -> Trial:
    figures = {"score": score, "over_refusal": over_refusal, "perplexity": perplexity}
    return Trial(f"{score}", figures, LIMITS.complaint(figures), 1.0)


FAILED = Trial("failed", {}, "the loss is not finite", 0.0)


@given(st.lists(st.builds(trial, SHARES, SHARES, st.sampled_from([2.0, 2.05, 2.2, float("nan")])), min_size=1))
def test_what_keeps_to_the_limits_comes_before_all_else_and_the_highest_score_of_it_first(trials):
    chosen = best(trials, LIMITS)
    able = [number for number, one in enumerate(trials) if one.complaint is None]
    if able:
        assert chosen == max(able, key=lambda number: (trials[number].figures["score"], -number))
    else:
        worth = [one.figures["score"] - LIMITS.violation(one.figures) for one in trials]
        assert chosen == worth.index(max(worth))


def test_of_equals_the_first_is_taken_and_what_could_not_be_measured_last():
    assert best([trial(0.95), trial(1.0), trial(1.0)], LIMITS) == 1
    assert best([FAILED, trial(0.0)], LIMITS) == 1
    assert best([trial(0.95), trial(1.0, over_refusal=0.5)], LIMITS) == 0
    # None keeps to the limits: a score that costs more over-refusal than it brings is not worth it.
    assert best([trial(0.5), trial(0.6, over_refusal=1.0)], LIMITS) == 0


@given(st.integers(1, 30), st.integers(1, 30))
def test_fewer_tries_are_spread_over_the_grid_from_its_first_to_its_last(number, tries):
    grid = [(float(index),) for index in range(number)]
    found = thinned(grid, tries)
    assert len(found) == len(set(found)) == min(number, tries)
    assert list(found) == sorted(found)
    assert found[-1] == grid[-1]
    assert tries == 1 or found[0] == grid[0]
    assert thinned(grid, None) == tuple(grid)


def test_every_method_that_is_tuned_has_settings_and_names_them():
    for method in METHODS.values():
        assert bool(method.settings) == (method.kind in TUNED)
        assert len(set(map(method.text, method.grid))) == len(method.grid)
        assert method_of(f"{method.key} 0.5") is method
    assert method_of("random-search of auto") is METHODS["random-search"]
    assert method_of("target") is None
