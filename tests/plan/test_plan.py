"""Units finer than a layer's module: blocks of rows, divided, joined and cut."""

from __future__ import annotations

import dataclasses
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SHAPE, call, save_random, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint, read_tiles
from dapa_merge.checkpoint.region import Region
from dapa_merge.checkpoint.units import Unit, join_ranges
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.plan.plan import cut, divide, join, plan_transplant

# Of the miniature's gates and ups.
NUM_ROWS = 208


@pytest.fixture(scope="module")
def plan():
    """The miniature's gates and ups."""
    pair = (open_checkpoint(str(miniature.path(member))) for member in ("target", "source"))
    return plan_transplant(*pair, ("gate", "up"))


@pytest.fixture(scope="module")
def biased_plan(tmp_path_factory):
    """Gates with biases."""
    folder = tmp_path_factory.mktemp("biased")
    pair = [save_random(folder / str(seed), tiny_llama(mlp_bias=True), seed=seed) for seed in (1, 2)]
    return plan_transplant(*(open_checkpoint(str(path)) for path in pair), ("gate",))


def rows_of(units) -> set[tuple[Unit, int]]:
    """Every single row of some units of the miniature."""
    return {(unit.whole, row) for unit in units for row in range(*(unit.rows or (0, NUM_ROWS)))}


def blocks_of(plan):
    """Some units and blocks of units of a plan, overlapping as they like."""

    def block(number: int, first: int, size: int) -> Unit:
        return dataclasses.replace(plan.units[number], rows=(first, min(first + size, NUM_ROWS)))

    blocks = st.builds(block, st.integers(0, 3), st.integers(0, NUM_ROWS - 1), st.integers(1, NUM_ROWS))
    return st.lists(blocks | st.sampled_from(plan.units[:5]), max_size=8)


def test_a_block_is_a_unit_of_its_own(plan):
    whole = plan.units[0]
    block = dataclasses.replace(whole, rows=(64, 128))
    assert (str(whole), str(block)) == ("0.gate", "0.gate[64:128]")
    assert block != whole
    assert (
        len({whole, block, dataclasses.replace(whole, rows=(64, 128)), dataclasses.replace(block, rows=(0, 64))}) == 3
    )
    assert (block.whole, whole.whole) == (whole, whole)


def test_a_blocks_tensors_are_those_rows_of_the_weights_and_biases(biased_plan):
    unit = biased_plan.units[1]
    block = dataclasses.replace(unit, rows=(5, 17))
    for parts, wholes in zip(biased_plan.regions((block,)), biased_plan.regions((unit,)), strict=True):
        for name, checkpoint in biased_plan.models.items():
            part, whole = parts[name], wholes[name]
            assert part.tensor == whole.tensor
            assert whole.is_whole
            assert (part.shape, part.box[0]) == ((12, *whole.shape[1:]), (5, 17))
            expected = load_file(Path(checkpoint.folder) / whole.tensor.file)[whole.name][5:17]
            found = b"".join(read_tiles(checkpoint, part, 7))
            assert found == expected.contiguous().view(torch.uint8).numpy().tobytes()
    assert biased_plan.num_parameters((block,)) == 12 * 32 + 12
    assert biased_plan.num_bytes((block,)) == 2 * (12 * 32 + 12)


@pytest.mark.parametrize("rows", [(0, 209), (-1, 3), (9, 2)])
def test_a_part_that_a_tensor_does_not_have_is_never_addressed(plan, rows):
    region = next(plan.regions(plan.units[:1]))["target"]
    (part,) = plan.units[0].parts
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape \[208, 80\], and so no part"):
        Region.of(region.tensor, dataclasses.replace(part, box=(rows, part.box[1])))


def test_a_bias_shorter_than_its_weight_is_not_read_beyond_its_end(biased_plan, tmp_path):
    folders = [shutil.copytree(checkpoint.folder, tmp_path / name) for name, checkpoint in (
        ("target", biased_plan.target), ("source", biased_plan.source)
    )]  # fmt: skip
    name = "model.layers.1.mlp.gate_proj.bias"
    for folder in folders:
        shard = folder / open_checkpoint(str(folder)).tensors[name].file
        content = load_file(shard)
        content[name] = content[name][:40].clone()
        save_file(content, shard)
    with pytest.raises(CheckpointError, match=r"gate_proj\.bias has shape \[40\], and so no part \[0:48\]"):
        plan_transplant(*(open_checkpoint(str(folder)) for folder in folders), ("gate",))


def test_the_last_block_of_a_unit_may_be_shorter(plan):
    divided = divide(plan, plan.units[1:3], 80)
    assert list(map(str, divided.units)) == [
        "0.up[0:80]", "0.up[80:160]", "0.up[160:208]", "1.gate[0:80]", "1.gate[80:160]", "1.gate[160:208]",
    ]  # fmt: skip
    assert (divided.target, divided.source) == (plan.target, plan.source)


def test_blocks_of_all_rows_are_the_whole_unit(plan):
    assert divide(plan, plan.units, NUM_ROWS).units == plan.units
    assert divide(plan, plan.units, 10 * NUM_ROWS).units == plan.units


@settings(max_examples=20)
@given(st.integers(1, 300), st.integers(1, 300))
def test_blocks_hold_every_row_once_also_when_divided_again(plan, first, second):
    divided = divide(plan, plan.units, first)
    again = divide(divided, divided.units, second)
    for finer, size in ((divided, first), (again, min(first, second))):
        assert len(rows_of(finer.units)) == sum(stop - start for start, stop in map(plan.rows, finer.units))
        assert rows_of(finer.units) == rows_of(plan.units)
        assert max(stop - start for start, stop in map(plan.rows, finer.units)) == min(size, NUM_ROWS)
        assert join(plan, finer.units) == plan.units


@pytest.mark.parametrize("module", ["down", "mlp", "attention"])
def test_what_has_no_neuron_in_each_row_is_not_divided(plan, module):
    other = plan_transplant(plan.target, plan.source, (module,))
    with pytest.raises(UsageError, match=rf"0\.{module} cannot be divided into blocks of rows; only gate and up can"):
        divide(other, other.units, 16)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda pair: (pair[0], sum(pair)))))
def test_joined_ranges_hold_the_same_rows_and_do_not_touch(ranges):
    joined = join_ranges(ranges)
    rows = [row for first, stop in joined for row in range(first, stop)]
    assert rows == sorted({row for first, stop in ranges for row in range(first, stop)})
    assert all(one[1] < other[0] for one, other in pairwise(joined))


@given(st.data())
def test_joined_units_hold_the_same_rows_in_the_plans_order(plan, data):
    units = data.draw(blocks_of(plan))
    joined = join(plan, units)
    assert rows_of(joined) == rows_of(units)
    order = [(plan.units.index(unit.whole), unit.rows or ()) for unit in joined]
    assert order == sorted(order)
    assert join(plan, joined) == joined
    assert not [unit for unit in joined if unit.rows == (0, NUM_ROWS)]


@given(st.data())
def test_a_cut_plan_holds_every_row_once_and_each_joined_block(plan, data):
    selection = join(plan, data.draw(blocks_of(plan)))
    pieces = cut(plan, selection).units
    assert rows_of(pieces) == rows_of(plan.units)
    assert len(rows_of(pieces)) == sum(stop - start for start, stop in map(plan.rows, pieces))
    assert set(selection) <= set(pieces)
    assert cut(cut(plan, selection), pieces).units == pieces


def test_a_unit_is_divided_into_its_experts_a_shared_one_last(tmp_path):
    shape = {**SHAPE, "num_experts": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    config = transformers.Qwen2MoeConfig(**shape)
    folders = [save_random(tmp_path / name, config, seed=seed) for seed, name in enumerate(("target", "source"))]
    plan = plan_transplant(*(open_checkpoint(str(folder)) for folder in folders), ("gate",))
    by_expert = divide(plan, plan.units[:1], None)
    assert list(map(str, by_expert.units)) == ["0.gate[0:16]", "0.gate[16:32]", "0.gate[32:48]", "0.gate[48:72]"]
    parent = "model.layers.0.mlp"
    assert [unit.tensors for unit in by_expert.units] == [
        *((f"{parent}.experts.{expert}.gate_proj.weight",) for expert in range(3)),
        (f"{parent}.shared_expert.gate_proj.weight",),
    ]
    assert join(plan, by_expert.units) == plan.units[:1]
    assert divide(plan, [by_expert.units[1]], None).units == by_expert.units[1:2]


def test_a_dense_model_has_no_experts_to_search_among(llama_pair, write_recipe):
    result = call("plan", write_recipe(*llama_pair, granularity="expert", layers=1))
    assert result.exit_code == 2
    assert "granularity is expert, but" in result.stderr
    assert "has none; write layer or block:N" in result.stderr
