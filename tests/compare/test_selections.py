"""What the controls transplant, and how edits grow."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.compare.curve import GrowthOrder as Stages
from dapa_merge.compare.curve import best_path, edit_of, edit_sizes, random_path, weighed_pieces
from dapa_merge.compare.result import pareto_front
from dapa_merge.compare.selections import blocks_of, fixed_layers, mlp_units, random_units
from dapa_merge.plan.plan import plan_transplant

MODULES = ("gate", "up", "down", "attention")


@pytest.fixture(scope="module")
def plan():
    pair = (open_checkpoint(str(miniature.path(member))) for member in ("target", "source"))
    return plan_transplant(*pair, MODULES)


def gates_of(plan, *layers):
    return tuple(unit for unit in plan.units if unit.module == "gate" and (not layers or unit.layer in layers))


def rows_of(plan, units):
    """Every row of some units, each once for every time that a unit has it."""
    return [(unit.whole, row) for unit in units for row in range(*plan.rows(unit))]


@pytest.mark.parametrize(
    ("model_type", "num_layers", "first", "last"),
    [
        # As the DAPA repository has them.
        ("llama", 32, 12, 17), ("mistral", 32, 9, 18), ("gemma", 28, 7, 13), ("gemma", 18, 3, 6),
        # Scaled: Llama 2 13B, the miniature, and families that it does not know, which get Llama's.
        ("llama", 40, 15, 21), ("llama", 10, 4, 5), ("mistral", 40, 11, 23), ("gemma", 10, 2, 3), ("qwen3", 36, 14, 19),
    ],
)  # fmt: skip
def test_the_repositorys_layers_are_fixed_and_scaled_by_depth(model_type, num_layers, first, last):
    assert fixed_layers(model_type, num_layers) == tuple(range(first, last + 1))


@given(st.sampled_from(["llama", "mistral", "gemma", "other"]), st.integers(1, 200))
def test_some_layer_is_always_fixed_and_none_is_outside_the_model(model_type, num_layers):
    layers = fixed_layers(model_type, num_layers)
    assert layers
    assert 0 <= layers[0] <= layers[-1] < num_layers


def test_the_mlp_is_gate_up_and_down_of_its_layers_and_no_attention(plan):
    assert [str(unit) for unit in mlp_units(plan.units, {4})] == ["4.gate", "4.up", "4.down"]
    assert len(mlp_units(plan.units)) == 30


@given(st.integers(0, 1000), st.sets(st.integers(0, 9), min_size=1), st.booleans())
def test_a_random_selection_has_as_many_units_of_the_same_modules(plan, seed, layers, with_down):
    like = [unit for unit in plan.units if unit.layer in layers and unit.module in ("gate", "down")[: 1 + with_down]]
    drawn = random_units(plan, plan.units, like, seed)
    assert sorted(unit.module for unit in drawn) == sorted(unit.module for unit in like)
    assert len(set(drawn)) == len(drawn)
    assert drawn == random_units(plan, plan.units, like, seed)


def test_seeds_draw_different_selections(plan):
    drawn = {random_units(plan, gates_of(plan), gates_of(plan, 3, 4, 5), seed) for seed in range(8)}
    assert len(drawn) > 4


@pytest.mark.parametrize("rows", [((0, 52), (104, 156)), ((0, 104), (156, 182)), ((0, 13), (26, 130), (150, 208))])
def test_of_a_selection_of_blocks_random_blocks_of_as_many_rows_are_drawn(plan, rows):
    (whole,) = gates_of(plan, 3)
    like = [plan.part(whole, block) for block in rows]
    for seed in range(5):
        drawn = random_units(plan, gates_of(plan), like, seed)
        assert plan.num_parameters(drawn) == plan.num_parameters(like)
        assert all(unit.rows is not None for unit in drawn)
        assert len(set(rows_of(plan, drawn))) == len(rows_of(plan, drawn))


def test_of_a_unit_that_was_kept_in_part_the_curve_goes_on_to_the_other_rows(plan):
    (whole,) = gates_of(plan, 3)
    selection = (plan.part(whole, (52, 104)), *gates_of(plan, 5))
    stages = Stages.of(selection, replace(plan, units=gates_of(plan)), plan.units)
    pieces = weighed_pieces(plan, stages, None)
    assert sorted(rows_of(plan, pieces), key=repr) == sorted(rows_of(plan, mlp_units(plan.units)), key=repr)
    path = best_path(plan, stages, dict.fromkeys(pieces, 0.0), None)
    complete = [set(rows_of(plan, path.pieces[:mark])) for mark in path.marks]
    assert complete == [set(rows_of(plan, units)) for units in (selection, gates_of(plan), mlp_units(plan.units))]


@given(st.integers(1, 300))
def test_blocks_part_the_rows_and_what_cannot_be_divided_stays_whole(plan, rows):
    units = [unit for unit in plan.units if unit.layer in (2, 7)]
    blocks = blocks_of(plan, units, rows)
    assert sorted(rows_of(plan, blocks), key=repr) == sorted(rows_of(plan, units), key=repr)
    assert {block for block in blocks if block.module in ("down", "attention")} <= set(units)


def stages_of(plan, *layers):
    searched = replace(plan, units=gates_of(plan))
    return Stages.of(gates_of(plan, *layers) if layers else (), searched, plan.units)


@pytest.mark.parametrize("layers", [(3, 4, 5), ()])
def test_dapas_order_is_the_selection_then_the_other_candidates_then_the_whole_mlp(plan, layers):
    stages = stages_of(plan, *layers)
    scores = {piece: -number for number, piece in enumerate(reversed(weighed_pieces(plan, stages, None)))}
    path = best_path(plan, stages, scores, None)
    assert sorted(rows_of(plan, path.pieces), key=repr) == sorted(rows_of(plan, mlp_units(plan.units)), key=repr)
    complete = [set(rows_of(plan, path.pieces[:mark])) for mark in path.marks]
    ends = [gates_of(plan, *layers)] if layers else []
    assert complete == [set(rows_of(plan, units)) for units in (*ends, gates_of(plan), mlp_units(plan.units))]
    # Within each stage the highest score comes first.
    for start, stop in itertools.pairwise((0, *path.marks)):
        weights = [scores[piece] for piece in path.pieces[start:stop]]
        assert weights == sorted(weights, reverse=True)


def test_random_edits_grow_through_the_same_stages_and_meet_dapas_at_their_ends(plan):
    stages = stages_of(plan, 3, 4, 5)
    path = random_path(plan, stages, None, 1)
    assert path == random_path(plan, stages, None, 1) != random_path(plan, stages, None, 2)
    assert set(rows_of(plan, path.pieces[: path.marks[0]])) == set(rows_of(plan, gates_of(plan)))
    assert set(rows_of(plan, path.pieces)) == set(rows_of(plan, mlp_units(plan.units)))


def test_edits_go_from_one_block_to_the_whole_mlp_and_have_the_selection_among_them(plan):
    stages = stages_of(plan, 3, 4, 5)
    pieces = weighed_pieces(plan, stages, None)
    path = best_path(plan, stages, dict.fromkeys(pieces, 0.0), None)
    sizes = edit_sizes(plan, path, 12)
    edits = [edit_of(plan, path, size) for size in sizes]
    assert len(edits[0]) == 1
    assert edits[0][0].rows is not None
    assert [plan.num_parameters(edit) for edit in edits] == list(sizes) == sorted(set(sizes))
    assert plan.num_parameters(gates_of(plan, 3, 4, 5)) in sizes
    assert plan.num_parameters(gates_of(plan)) in sizes
    assert sizes[-1] == plan.num_parameters(mlp_units(plan.units))
    # A random edit of the same size is no more than half a piece off.
    random = random_path(plan, stages, None, 1)
    largest = max(plan.num_parameters([piece]) for piece in random.pieces)
    for size in sizes:
        assert abs(plan.num_parameters(edit_of(plan, random, size)) - size) <= largest / 2


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=12))
def test_a_point_is_on_the_front_if_no_other_is_nowhere_worse_and_somewhere_better(points):
    def is_dominated(point):
        return any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points)

    front = pareto_front(points)
    assert front == [not is_dominated(point) for point in points]
    assert any(front)
