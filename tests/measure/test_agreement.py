from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.measure.figures import Agreement
from dapa_merge.measure.refusal.classify import Outcome
from dapa_merge.measure.statistics import agreement

PAIRS = st.lists(st.tuples(st.sampled_from(Outcome), st.sampled_from(Outcome)), max_size=30)


@given(PAIRS)
def test_share_and_kappa_are_those_of_cohens_definition(pairs):
    decided = [
        (one is Outcome.REFUSED, other is Outcome.REFUSED)
        for one, other in pairs
        if Outcome.UNDECIDED not in (one, other)
    ]
    found = agreement([one for one, _ in pairs], [other for _, other in pairs])
    assert found.num_pairs == len(decided)
    assert found.num_pairs + found.num_undecided == len(pairs)
    assert (found.only_one_refused, found.only_other_refused) == (
        decided.count((True, False)),
        decided.count((False, True)),
    )
    if not decided:
        assert (found.share, found.kappa) == (None, None)
        return
    share = Fraction(sum(one == other for one, other in decided), len(decided))
    # What a pair drawn at random from both evaluators' verdicts, each on its own, would agree on.
    by_chance = Fraction(sum(one == other for one, _ in decided for _, other in decided), len(decided) ** 2)
    assert found.share == pytest.approx(float(share))
    assert found.kappa == (None if by_chance == 1 else pytest.approx(float((share - by_chance) / (1 - by_chance))))


def test_the_kappa_of_a_published_table_is_found():
    """The example of Wikipedia's "Cohen's kappa": 20 and 15 agreed, 5 and 10 not, of 50 grant proposals."""
    one = [Outcome.REFUSED] * 25 + [Outcome.COMPLIED] * 25
    other = [Outcome.REFUSED] * 20 + [Outcome.COMPLIED] * 5 + [Outcome.REFUSED] * 10 + [Outcome.COMPLIED] * 15
    assert agreement(one, other) == Agreement(50, 0, 0.7, pytest.approx(0.4), 5, 10)


def test_undecided_pairs_are_counted_apart():
    one = [Outcome.REFUSED, Outcome.UNDECIDED, Outcome.COMPLIED, Outcome.REFUSED]
    other = [Outcome.REFUSED, Outcome.REFUSED, Outcome.DEGENERATE, Outcome.UNDECIDED]
    assert agreement(one, other) == Agreement(2, 2, 1.0, 1.0, 0, 0)


def test_without_a_decided_pair_there_is_no_share():
    assert agreement([Outcome.UNDECIDED], [Outcome.REFUSED]) == Agreement(0, 1, None, None, 0, 0)


def test_lists_of_different_lengths_are_a_fault():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        agreement([Outcome.REFUSED], [])
