from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace

import pytest
from conftest import required
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import UsageError
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.meter import Meter
from dapa_merge.measure.prompts.sets import load_prompts
from dapa_merge.measure.skills import Skill
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.recipe.constraints import CONSTRAINTS
from dapa_merge.search.attribution import effects_between
from dapa_merge.search.bench import Bench, pieces_of
from dapa_merge.search.result import Baseline

KEYS = [constraint.key for constraint in CONSTRAINTS]


@given(st.lists(st.text(max_size=3), min_size=1, max_size=70, unique=True), st.integers(1, 40))
def test_pieces_part_the_prompts_and_fit_into_a_batch(prompts, batch_size):
    pieces = pieces_of(prompts, batch_size)
    assert sorted(prompt for piece in pieces for prompt in piece) == sorted(prompts)
    assert all(0 < len(piece) <= batch_size for piece in pieces)
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert pieces == pieces_of(prompts, batch_size)


@pytest.fixture(scope="module")
def bench():
    target, source = (open_checkpoint(str(miniature.path(member))) for member in ("target", "source"))
    prompts = load_prompts("miniature")
    few = replace(prompts, harmful=prompts.harmful[:32], harmless=prompts.harmless[:32], keep=prompts.harmless[40:50])
    meter = Meter(few, 12, BatchSize(16), skills=(Skill("skill", prompts.skill[:6]),))
    with closing(Bench(plan_transplant(target, source, ("gate",)), meter, "cpu", KEYS)) as bench:
        yield bench


def test_a_baseline_is_the_meters_own_figures(bench):
    baseline = bench.baseline(bench.plan.units)
    meter = bench.meter.referring(bench.live.model, bench.live.tokenizer)
    with bench.live.transplanted(bench.plan.units) as model:
        measurement = meter.measure(model, bench.live.tokenizer)
        assert baseline.figures == {
            "score": measurement.dsr,
            "over_refusal": measurement.over_refusal,
            "perplexity": measurement.perplexity,
            "divergence": measurement.divergence,
            "skill": measurement.skill,
        }
    assert baseline.figures["divergence"] > 0
    assert bench.num_prompts == 64 + 6
    assert {response.prompt for response in baseline.responses} == set(bench.meter.prompts.harmful)
    assert Baseline.from_json(json.loads(json.dumps(baseline.to_json()))) == baseline


def test_a_candidate_is_examined_and_the_target_restored(bench):
    bench.require(required(min_score=0.9, max_over_refusal=0.1, max_perplexity=2.0))
    middle = [unit for unit in bench.plan.units if 3 <= unit.layer <= 6]
    assert bench.examine(middle).holds
    fails = bench.examine(middle[:1])
    assert not fails.holds
    assert fails.num_asked < fails.num_prompts
    assert bench.baseline(()).score == 0


def test_the_prior_puts_the_planted_layers_first(bench):
    target, full = (bench.baseline(units).responses for units in ((), bench.plan.units))
    scores = effects_between(bench.live, bench.plan.units, target, full, 64)
    first = sorted(scores, key=scores.__getitem__, reverse=True)[:4]
    assert {unit.layer for unit in first} == {3, 4, 5, 6}


def test_responses_that_do_not_tell_the_two_apart_make_no_prior(bench):
    target = bench.baseline(()).responses
    with pytest.raises(ValueError, match="none of 0 contrasts"):
        effects_between(bench.live, bench.plan.units, target, target, 64)


def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(bench):
    with pytest.raises(UsageError, match="device 'nowhere' cannot be used here"):
        Bench(bench.plan, bench.meter, "nowhere", KEYS)


def test_the_perplexity_costs_less_than_a_piece_of_prompts(bench):
    meter = replace(bench.meter, prompts=load_prompts("miniature"), batch_size=BatchSize(64))
    costs = {constraint.check: constraint.cost(meter) for constraint in bench.constraints}
    assert costs == {"perplexity": 2.0, "harmful": 2.5, "harmless": 2.5, "divergence": 0.0, "skill": 2.5}
