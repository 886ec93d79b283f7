"""Searches among bundles of matrices: what they keep is minimal, and told as bundles."""

from __future__ import annotations

import itertools
import random

import pytest

from dapa_merge.checkpoint.units import Unit
from dapa_merge.delta.minimize import SearchInterrupted, SearchStopped
from dapa_merge.search.bundles import by_layer, each_alone, minimize_bundles
from dapa_merge.search.result import is_of_bundles, needed, readable_certificate

MODULES = ("gate", "up", "down", "q", "k", "v", "o")
UNITS = tuple(Unit(layer, module, ()) for layer in range(5) for module in MODULES)
SIZES = dict.fromkeys(UNITS, 1)


def flat(bundles) -> frozenset[Unit]:
    return frozenset(itertools.chain.from_iterable(bundles))


class Asked:
    """Stands for an oracle with answers of an earlier search, which also asks what will probably be asked next."""

    def __init__(self, holds, known=()) -> None:
        self.holds, self.tests, self.foreseen = holds, [], []
        self.answers = {selection: holds(selection) for selection in known}

    def among(self, units, likely):
        self.answers |= {frozenset(): False, frozenset(units): True}

        def holds(selection):
            if selection not in self.answers:
                foreseen = likely(self.answers, 3)
                assert foreseen[0] == selection
                self.foreseen += foreseen
                self.tests.append(selection)
                self.answers[selection] = self.holds(selection)
            return self.answers[selection]

        return holds


def search(bundles, oracle, **how):
    how = {"algorithm": "guided", "prior": None, "sizes": SIZES, "max_tests": None, **how}
    return minimize_bundles(bundles, oracle.among, **how)


def test_the_bundles_of_a_layer_are_its_attention_and_its_mlp_in_order():
    assert [" ".join(map(str, bundle)) for bundle in by_layer(UNITS[:9])] == [
        "0.gate 0.up 0.down", "0.q 0.k 0.v 0.o", "1.gate 1.up",
    ]  # fmt: skip
    assert by_layer(Unit(layer, "attention", ()) for layer in (2, 1)) == (
        (Unit(2, "attention", ()),), (Unit(1, "attention", ()),),
    )  # fmt: skip
    assert flat(by_layer(UNITS)) == set(UNITS)
    assert flat(each_alone(UNITS)) == set(UNITS)


@pytest.mark.parametrize("algorithm", ["guided", "probdd", "ddmin"])
def test_what_is_left_is_the_smallest_set_of_bundles_that_holds_the_units_that_are_needed(algorithm):
    generator, bundles = random.Random(0), by_layer(UNITS)
    for number in range(8):
        wanted = frozenset(generator.sample(UNITS, generator.randint(1, 6)))
        prior = {unit: generator.random() for unit in UNITS} if number % 2 else None
        oracle = Asked(wanted.issubset)
        found = search(bundles, oracle, algorithm=algorithm, prior=prior)
        expected = [bundle for bundle in bundles if wanted & set(bundle)]
        assert found.units == tuple(itertools.chain.from_iterable(expected))
        assert found.one_minimal
        assert found.certificate == {
            unit: tuple(other for other in found.units if other not in bundle) for bundle in expected for unit in bundle
        }
        # Questions, foreseen ones too, are of whole bundles.
        assert oracle.tests
        assert all(flat(b for b in bundles if b[0] in asked) == asked for asked in (*oracle.tests, *oracle.foreseen))


def test_answers_about_parts_of_bundles_are_no_answers_about_bundles():
    bundles = by_layer(UNITS)
    wanted = frozenset(UNITS[:1])
    parts = [frozenset(UNITS[:number]) for number in range(1, len(UNITS))]
    oracle, fresh = Asked(wanted.issubset, known=parts), Asked(wanted.issubset)
    assert search(bundles, oracle) == search(bundles, fresh)
    # Those that are whole bundles spare their tests.
    assert len(oracle.tests) < len(fresh.tests)


def test_the_score_of_a_bundle_is_the_sum_of_its_units_and_its_size_too():
    wanted = frozenset(UNITS[7:14])
    prior = {unit: float(unit in wanted) for unit in UNITS}
    guided = Asked(wanted.issubset)
    search(by_layer(UNITS), guided, prior=prior)
    blind = Asked(wanted.issubset)
    search(by_layer(UNITS), blind, prior={unit: -score for unit, score in prior.items()})
    assert len(guided.tests) < len(blind.tests)
    # Of two bundles either of which is enough, the one with the larger units is left out.
    bundles = by_layer(UNITS[:7])
    for large in bundles:
        sizes = {unit: 10 if unit in large else 1 for unit in UNITS[:7]}
        found = search(bundles, Asked(lambda selection: bool(selection)), sizes=sizes)
        assert set(found.units).isdisjoint(large)


def test_a_budget_counts_questions_and_what_it_leaves_unproved_is_told():
    wanted = frozenset(UNITS)
    found = search(by_layer(UNITS), Asked(wanted.issubset), max_tests=3)
    assert (found.tests, found.one_minimal, found.units) == (3, False, UNITS)


@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt(), SearchStopped), (OSError("gone"), SearchInterrupted)]
)
def test_a_search_that_ends_early_has_units_as_its_best_selection(error, expected):
    wanted, number = frozenset(UNITS[:3]), itertools.count()

    def holds(selection):
        if next(number) == 4:
            raise error
        return wanted <= selection

    with pytest.raises(expected) as caught:
        search(by_layer(UNITS), Asked(holds))
    assert caught.value.__cause__ is error
    best = caught.value.best
    assert wanted <= set(best.units) < set(UNITS)
    assert all(isinstance(unit, Unit) for others in best.certificate.values() for unit in others)


def test_a_certificate_of_bundles_is_told_bundle_by_bundle():
    wanted = frozenset((UNITS[0], UNITS[3]))
    of_bundles = readable_certificate(search(by_layer(UNITS), Asked(wanted.issubset)))
    mlp, attention = ["0.gate", "0.up", "0.down"], ["0.q", "0.k", "0.v", "0.o"]
    assert needed(of_bundles) == [(mlp, tuple(attention)), (attention, tuple(mlp))]
    assert is_of_bundles(of_bundles)
    alone = readable_certificate(search(each_alone(UNITS), Asked(wanted.issubset)))
    assert needed(alone) == [(["0.gate"], ("0.q",)), (["0.q"], ("0.gate",))]
    assert not is_of_bundles(alone)
