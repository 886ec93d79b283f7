from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from dapa_merge.search.oracle import requirement


@dataclass
class Candidate:
    dsr: float
    over_refusal: float = 0.0
    perplexity: float = 10.0


class Unmeasured:
    """Fails if a figure is read that is not needed for the verdict."""

    dsr = 0.0

    @property
    def over_refusal(self):
        raise AssertionError("over-refusal was measured for a candidate that fails already")


TARGET, FULL = Candidate(0.1, 0.02), Candidate(0.9, 0.04, 10.2)


def limits(retain=0.5, over_refusal=0.05, ratio=1.05):
    return requirement(TARGET, FULL, retain=retain, max_over_refusal=over_refusal, max_perplexity=ratio)


@pytest.mark.parametrize(
    ("candidate", "complaint"),
    [
        (Candidate(0.5, 0.07, 10.5), None),
        (Candidate(0.49), "its DSR is 0.490, below the 0.500 required"),
        (Candidate(0.6, 0.08), "its over-refusal is 0.080, above the 0.070 allowed"),
        (Candidate(0.6, 0.0, 10.6), "its perplexity is 10.60, above the 10.50 allowed"),
        (Candidate(0.6, 0.0, math.inf), "its perplexity is inf, above the 10.50 allowed"),
        (Candidate(0.6, 0.0, math.nan), "its perplexity is nan, above the 10.50 allowed"),
    ],
)
def test_a_candidate_holds_if_it_reaches_the_floor_and_no_ceiling_breaks(candidate, complaint):
    assert limits().holds(candidate) == (complaint is None)
    assert limits().complaint(candidate) == complaint


def test_the_full_transplant_meets_its_own_floor_when_all_of_the_gain_must_be_kept():
    assert limits(retain=1.0).holds(FULL)


def test_nothing_is_measured_after_the_verdict_is_certain():
    assert not limits().holds(Unmeasured())


def test_a_set_without_passages_has_no_perplexity_limit():
    without = requirement(
        Candidate(0.0, 0.0, math.nan), Candidate(1.0), retain=0.9, max_over_refusal=0.0, max_perplexity=1.0
    )
    assert without.holds(Candidate(0.95, 0.0, math.nan))
