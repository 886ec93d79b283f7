from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from conftest import required
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge.measure.figures import Response
from dapa_merge.recipe.constraints import Floor, Range, shown
from dapa_merge.search.requirement import Examiner, Piece, Requirement, constraints_of, is_noise, requirement


def measured(
    score: float, over_refusal: float = 0.0, perplexity: float = 10.0, divergence: float = 0.0, skill: float = 0.8
) -> dict[str, float]:
    return {
        "score": score,
        "over_refusal": over_refusal,
        "perplexity": perplexity,
        "divergence": divergence,
        "skill": skill,
    }


TARGET, FULL = measured(0.1, 0.02), measured(0.9, 0.04, 10.2)


def limits(target=TARGET, full=FULL, retain=0.5, over_refusal=0.05, ratio=1.05, **others):
    settings = {"retain": retain, "max_over_refusal": over_refusal, "max_perplexity": ratio, **others}
    return requirement(constraints_of(settings), target, full, settings)


@pytest.mark.parametrize(
    ("figures", "complaint"),
    [
        (measured(0.5, 0.07, 10.5), None),
        (measured(0.49), "its DSR is 0.490, 0.010 below the 0.500 required"),
        (measured(0.6, 0.08), "its over-refusal is 0.080, 0.010 above the 0.070 allowed"),
        (measured(0.6, 0.0, 10.6), "its perplexity is 10.600, 0.100 above the 10.500 allowed"),
        (measured(0.6, 0.0, math.inf), "its perplexity is not finite; 10.500 is allowed"),
        (measured(0.6, 0.0, math.nan), "its perplexity is not finite; 10.500 is allowed"),
    ],
)
def test_a_model_holds_if_it_reaches_the_floor_and_no_ceiling_breaks(figures, complaint):
    assert limits().complaint(figures) == complaint


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (0.0, "0.000"),
        (0.8125, "0.812"),
        (0.0006, "0.001"),
        (0.00031, "0.00031"),
        (-0.00031, "-0.00031"),
        (1.2e-5, "1.2e-05"),
    ],
)
def test_a_small_figure_is_not_shown_as_zero(figure, text):
    assert shown(figure) == text
    small = limits(max_divergence=0.0001)
    if figure == 0.00031:
        complaint = small.complaint(measured(0.9, divergence=figure))
        assert complaint == "its divergence is 0.00031, 0.00021 above the 0.0001 allowed"


def test_the_full_transplant_meets_its_own_floor_when_all_of_the_gain_must_be_kept():
    assert limits(retain=1.0).complaint(FULL) is None


@pytest.mark.parametrize(
    ("figures", "complaint"),
    [
        (measured(0.9, divergence=0.3, skill=0.6), None),
        (measured(0.9, divergence=0.31), "its divergence is 0.310, 0.010 above the 0.300 allowed"),
        (measured(0.9, divergence=math.inf), "its divergence is not finite; 0.300 is allowed"),
        (measured(0.9, skill=0.55), "its skill is 0.550, 0.050 below the 0.600 required"),
    ],
)
def test_divergence_is_limited_as_such_and_skill_to_a_share_of_the_targets(figures, complaint):
    assert limits(max_divergence=0.3, min_skill=0.75).complaint(figures) == complaint


@pytest.mark.parametrize(
    ("gained", "number", "noise"),
    [(1, 60, True), (2, 60, True), (3, 60, False), (1, 39, True), (2, 39, False), (1, 19, False), (0, 60, False)],
)
def test_a_gain_of_no_more_prompts_than_another_measurement_may_change_is_noise(gained, number, noise):
    assert is_noise((7 + gained) / number - 7 / number, number) is noise


def test_any_gain_of_a_score_without_prompts_counts():
    assert not is_noise(0.001, 0)


def test_without_keep_prompts_and_questions_divergence_and_skill_have_no_limit():
    target, result = measured(0.0, divergence=math.nan, skill=math.nan), measured(1.0)
    free = limits(target, result, max_divergence=0.3, min_skill=1.0)
    assert free.complaint(measured(0.95, divergence=math.nan, skill=math.nan)) is None


def test_a_set_without_passages_has_no_perplexity_limit():
    without = limits(measured(0.0, 0.0, math.nan), measured(1.0), retain=0.9)
    assert without.complaint(measured(0.95, 0.0, math.nan)) is None


@dataclass
class Candidate:
    """Answers from a table, and writes down what it was asked."""

    refusals: dict[str, list[list[bool]]]
    perplexity_value: float = 10.0
    asked: list[object] = field(default_factory=list)

    def responses(self, kind: str, piece: int) -> Sequence[Response]:
        self.asked.append((kind, piece))
        outcomes = ["refused" if refused else "complied" for refused in self.refusals[kind][piece]]
        return [Response(kind, "", "", "", outcome) for outcome in outcomes]

    def figure(self, constraint) -> float:
        self.asked.append(constraint.figure)
        return self.perplexity_value

    def measured(self) -> dict[str, float]:
        shares = {
            kind: sum(map(sum, pieces)) / sum(map(len, pieces)) if pieces else 0.0
            for kind, pieces in self.refusals.items()
        }
        answered = [not refused for piece in self.refusals["harmless"] for refused in piece]
        figures = measured(shares["harmful"], shares["harmless"], self.perplexity_value)
        return {**figures, "answered": sum(answered) / len(answered)}


ANSWERED = Floor(
    "answered",
    "min_answered",
    lambda _target, _full, least: least,
    "answers",
    Range(0, 1, "write a share from 0 to 1"),
    kind="harmless",
    outcome="complied",
)
COSTS = {"perplexity": 1.0, "harmful": 100.0, "harmless": 100.0}
REQUIREMENT = required(min_score=0.75, max_over_refusal=0.25, max_perplexity=11.0)


def examiner(candidate: Candidate, wanted=REQUIREMENT, costs=COSTS) -> Examiner:
    sizes = {kind: [len(piece) for piece in pieces] for kind, pieces in candidate.refusals.items()}
    return Examiner(wanted, sizes, costs)


def four(*refused: int, size: int = 4) -> list[list[bool]]:
    """Pieces of four prompts, of which so many are refused."""
    return [[index < number for index in range(size)] for number in refused]


def test_the_cheapest_check_comes_first_and_ends_the_examination():
    candidate = Candidate({"harmful": four(4, 4), "harmless": four(0, 0)}, perplexity_value=12.0)
    verdict = examiner(candidate).examine(candidate)
    assert verdict.complaint == "its perplexity is 12.000, 1.000 above the 11.000 allowed"
    assert candidate.asked == ["perplexity"]
    assert (verdict.num_asked, verdict.num_prompts) == (0, 16)


def test_the_prompts_still_unasked_are_not_asked_once_they_cannot_change_the_verdict():
    # 16 harmful prompts of which 12 must be refused: after five that were not, it is certain.
    candidate = Candidate({"harmful": four(2, 1, 4, 4), "harmless": four(0)})
    verdict = examiner(candidate).examine(candidate)
    assert verdict.complaint == "its DSR is at most 0.688, 0.062 below the 0.750 required"
    assert candidate.asked == ["perplexity", ("harmful", 0), ("harmful", 1)]
    assert verdict.pieces == (Piece("harmful", 0, 2, 4), Piece("harmful", 1, 3, 4))


def test_a_floor_that_is_reached_and_a_ceiling_that_cannot_be_are_certain_too():
    candidate = Candidate({"harmful": four(4, 4, 4, 0), "harmless": four(0, 0, 0, 4)})
    verdict = examiner(candidate).examine(candidate)
    assert verdict.holds
    assert verdict.complaint is None
    assert ("harmful", 3) not in candidate.asked
    assert ("harmless", 3) not in candidate.asked


def test_one_prompt_less_is_not_certain():
    candidate = Candidate({"harmful": [[True] * 8, [False] * 4, [True] * 4], "harmless": four(0)})
    assert examiner(candidate).examine(candidate).holds
    assert ("harmful", 2) in candidate.asked


def test_pieces_that_go_wrong_most_often_are_asked_first():
    candidate = Candidate({"harmful": four(4, 4, 1, 2), "harmless": four(0)})
    experienced = examiner(candidate)
    experienced.examine(candidate, stop_early=False)
    candidate.asked.clear()
    experienced.examine(candidate)
    assert candidate.asked == ["perplexity", ("harmful", 2), ("harmful", 3)]


def test_what_a_journal_remembers_orders_the_pieces_as_well():
    candidate = Candidate({"harmful": four(4, 4, 0, 4), "harmless": four(0)})
    experienced = examiner(candidate)
    experienced.learn([Piece("harmful", 3, 4, 4), Piece("harmful", 0, 0, 4)])
    experienced.examine(candidate)
    assert candidate.asked[1] == ("harmful", 3)


def test_a_check_that_rejects_often_comes_before_cheaper_ones_that_do_not():
    candidate = Candidate({"harmful": four(0, 0), "harmless": four(0)})
    experienced = examiner(candidate, costs={"perplexity": 30.0, "harmful": 100.0, "harmless": 100.0})
    for _ in range(4):
        experienced.examine(candidate)
    candidate.asked.clear()
    experienced.examine(candidate)
    assert candidate.asked == [("harmful", 0)]


def test_a_perplexity_without_a_limit_is_not_measured():
    candidate = Candidate({"harmful": four(4), "harmless": four(0)}, perplexity_value=math.nan)
    assert (
        examiner(candidate, required(min_score=0.5, max_over_refusal=0.5, max_perplexity=math.nan))
        .examine(candidate)
        .holds
    )
    assert "perplexity" not in candidate.asked


pieces = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5)


@given(
    st.lists(st.tuples(pieces, pieces, st.floats(9, 12)), min_size=1, max_size=6),
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    st.randoms(use_true_random=False),
)
def test_an_early_verdict_is_always_the_full_one(candidates, limits, generator):
    min_score, max_over_refusal, min_answered = limits
    wanted = required(min_score=min_score, max_over_refusal=max_over_refusal, max_perplexity=11.0)
    # A second limit on the same prompts.
    wanted = Requirement((*wanted.limits, (ANSWERED, min_answered)))
    harmful_sizes, harmless_sizes = ([len(piece) for piece in kind] for kind in candidates[0][:2])
    early, full = (
        Examiner(
            wanted,
            {"harmful": harmful_sizes, "harmless": harmless_sizes},
            {"perplexity": 5.0, "harmful": 10.0, "harmless": 7.0},
        )
        for _ in range(2)
    )
    for _, _, perplexity in candidates:
        # All candidates are asked the same pieces; what they answer differs.
        candidate = Candidate(
            {
                "harmful": [[generator.random() < 0.7 for _ in range(size)] for size in harmful_sizes],
                "harmless": [[generator.random() < 0.3 for _ in range(size)] for size in harmless_sizes],
            },
            perplexity,
        )
        verdict = early.examine(candidate)
        assert verdict.holds == full.examine(candidate, stop_early=False).holds
        assert verdict.holds == (wanted.complaint(candidate.measured()) is None)
        assert verdict.num_asked <= verdict.num_prompts
