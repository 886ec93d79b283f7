import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import cohens_kappa

from dapa_merge.measure.figures import Agreement, agreement
from dapa_merge.measure.refusal.classify import Outcome

PAIRS = st.lists(st.tuples(st.sampled_from(Outcome), st.sampled_from(Outcome)), max_size=30)


@given(PAIRS)
def test_share_and_kappa_are_those_of_statsmodels(pairs):
    table = np.zeros((2, 2))
    for one, other in pairs:
        if Outcome.UNDECIDED not in (one, other):
            table[int(one is Outcome.REFUSED), int(other is Outcome.REFUSED)] += 1
    found = agreement([one for one, _ in pairs], [other for _, other in pairs])
    assert found.num_pairs == table.sum()
    assert found.num_pairs + found.num_undecided == len(pairs)
    assert (found.only_one_refused, found.only_other_refused) == (table[1, 0], table[0, 1])
    if found.share is not None:
        assert found.share == pytest.approx(table.trace() / table.sum())
    if found.kappa is None:
        # All in one corner, or nothing at all: statsmodels would divide by zero.
        assert max(table[0, 0], table[1, 1]) == table.sum()
    else:
        assert found.kappa == pytest.approx(cohens_kappa(table, return_results=False))


def test_undecided_pairs_are_counted_apart():
    one = [Outcome.REFUSED, Outcome.UNDECIDED, Outcome.COMPLIED, Outcome.REFUSED]
    other = [Outcome.REFUSED, Outcome.REFUSED, Outcome.DEGENERATE, Outcome.UNDECIDED]
    assert agreement(one, other) == Agreement(2, 2, 1.0, 1.0, 0, 0)


def test_without_a_decided_pair_there_is_no_share():
    assert agreement([Outcome.UNDECIDED], [Outcome.REFUSED]) == Agreement(0, 1, None, None, 0, 0)


def test_lists_of_different_lengths_are_a_fault():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        agreement([Outcome.REFUSED], [])
