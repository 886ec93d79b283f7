"""Blocks of rows on disk and in memory: what is written, what is proved of it, and what the swap does."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from conftest import change_tensor, fail_in_swap, prove, save_random, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError
from dapa_merge.measure.live import LiveModel
from dapa_merge.plan.plan import cut, divide, join, plan_transplant
from dapa_merge.transplant.result import transplant
from dapa_merge.verify.tensors import verify

NUM_ROWS = 48
NUM_LAYERS = 4
GATE = "model.layers.1.mlp.gate_proj.weight"
# Target and source: the same dtype, a source that is rounded, and one that is widened.
DTYPES = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16"))


def plan_of(target: Path, source: Path, modules=("gate", "up")):
    return plan_transplant(open_checkpoint(str(target)), open_checkpoint(str(source)), modules)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """A plan for each of `DTYPES`; their gates and ups have biases."""
    folder = tmp_path_factory.mktemp("pairs")
    made = {}
    for number, dtypes in enumerate(DTYPES):
        pair = [
            save_random(folder / f"{number}-{seed}", tiny_llama(mlp_bias=True), seed=seed, dtype=getattr(torch, dtype))
            for seed, dtype in enumerate(dtypes)
        ]
        made[dtypes] = plan_of(*pair)
    return made


@pytest.fixture(scope="module")
def lives(plans):
    """The targets of `plans` in memory."""
    made = {dtypes: LiveModel(plan, torch.device("cpu")) for dtypes, plan in plans.items()}
    yield made
    for live in made.values():
        live.close()


def block(unit, first, stop):
    return dataclasses.replace(unit, rows=(first, stop))


def bits(tensors) -> dict[str, numpy.ndarray]:
    """The stored bits of every tensor, rows first: integers, which numpy can assign where it knows no bfloat16."""
    widths = {2: torch.int16, 4: torch.int32}
    return {name: tensor.clone().view(widths[tensor.element_size()]).numpy() for name, tensor in tensors.items()}


def stored(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def expected_bits(plan, selection) -> dict[str, numpy.ndarray]:
    """The authority: numpy's assignment of slices to the target's tensors, of the source's as torch rounds them."""
    target, source = stored(plan.target.folder), stored(plan.source.folder)
    result = bits(target)
    given = bits({name: tensor.to(target[name].dtype) for name, tensor in source.items()})
    for unit in selection:
        rows = slice(*unit.rows) if unit.rows else slice(None)
        for name in unit.tensors:
            result[name][rows] = given[name][rows]
    return result


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(numpy.array_equal(one[name], other[name]) for name in one)


@st.composite
def selections(draw, plan):
    """Units and blocks of a plan of `NUM_ROWS`, several of one tensor, touching or not, never overlapping."""
    selection = []
    for unit in draw(st.lists(st.sampled_from(plan.units), unique=True, max_size=4)):
        ends = sorted(draw(st.sets(st.integers(0, NUM_ROWS), max_size=7)))
        pairs = [pair for pair in pairwise(ends) if draw(st.booleans())]
        selection += [block(unit, *pair) for pair in pairs] or [unit]
    return draw(st.permutations(selection))


@pytest.mark.parametrize("dtypes", DTYPES)
@settings(max_examples=15)
@given(data=st.data())
def test_any_blocks_on_disk_and_in_memory_are_numpys_assignment_of_slices(plans, lives, dtypes, data):
    plan, live = plans[dtypes], lives[dtypes]
    selection = data.draw(selections(plan))
    expected = expected_bits(plan, selection)
    before = bits(live.model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        transplant(plan, selection, out, finish=lambda folder: prove(folder, plan, selection))
        assert same(bits(stored(out)), expected)
        joined = join(plan, selection)
        verification = verify(out, cut(plan, joined))
        assert verification.transplanted == joined
        assert verification.is_exactly(joined)
    with live.transplanted(selection) as candidate:
        assert same(bits(candidate.state_dict()), expected)
    assert same(bits(live.model.state_dict()), before)


def test_the_rest_of_a_shard_is_the_targets_own(plans, tmp_path):
    plan = plans[DTYPES[0]]
    selection = (block(plan.units[2], 3, 11),)
    transplant(plan, selection, tmp_path / "out")
    changed = []
    for path in sorted(plan.target.folder.iterdir()):
        before, after = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
        assert len(before) == len(after)
        changed += [(path.name, index) for index in range(len(before)) if before[index] != after[index]]
    allowed = {
        (regions["target"].tensor.file, index)
        for regions in plan.regions(selection)
        for start, size in regions["target"].runs()
        for index in range(start, start + size)
    }
    assert changed
    assert set(changed) <= allowed
    assert len(allowed) == 2 * (8 * 32 + 8) == plan.num_bytes(selection)


def test_verify_finds_which_blocks_of_a_grid_are_the_sources(llama_pair, tmp_path):
    plan = plan_of(*llama_pair)
    grid = divide(plan, plan.units, 10)
    selection = grid.units[1:3] + grid.units[4:7] + grid.units[-1:]
    transplant(plan, selection, tmp_path / "out")
    verification = verify(tmp_path / "out", grid)
    assert (verification.transplanted, verification.holds) == (selection, True)
    prove(tmp_path / "out", grid, selection)
    with pytest.raises(CheckpointError, match=r"not those that were selected|differs from the target"):
        prove(tmp_path / "out", grid, selection[:-1])


def flip(folder: Path, tensor_name: str, row: int) -> None:
    """Flip the last bit of a row's last value."""
    tensor = open_checkpoint(str(folder)).tensors[tensor_name]
    last = tensor.start + (row + 1) * tensor.num_bytes // tensor.shape[0] - 1
    with (folder / tensor.file).open("r+b") as file:
        file.seek(last)
        byte = file.read(1)[0]
        file.seek(last)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("row", [0, 7, 8, 15, 16, 31, 32, 39, 40, 47])
def test_a_flipped_bit_in_a_block_or_beside_it_is_found_and_named(llama_pair, tmp_path, row):
    """Also where the plan has nothing but the blocks, or only the whole unit."""
    plan = plan_of(*llama_pair, ("gate",))
    selection = (block(plan.units[1], 8, 16), block(plan.units[1], 32, 40))
    out = tmp_path / "out"
    transplant(plan, selection, out)
    flip(out, GATE, row)
    fault = (f"{GATE}[{row}:{row + 1}]", "is neither the target's nor the source's")
    for judged in (plan, cut(plan, selection), dataclasses.replace(plan, units=selection)):
        assert verify(out, judged).differences == (fault,)
    with pytest.raises(CheckpointError) as caught:
        prove(out, plan, selection)
    assert str(caught.value) == f"the result is wrong: {fault[0]} {fault[1]}"


def test_rows_of_the_source_that_were_not_selected_are_found(llama_pair, tmp_path):
    plan = plan_of(*llama_pair, ("gate",))
    unit = plan.units[1]
    written = (block(unit, 8, 16), block(unit, 20, 48))
    transplant(plan, written, tmp_path / "out")
    for selection in (written[1:], (block(unit, 8, 17), written[1]), (block(unit, 8, 48),), (unit,), plan.units, ()):
        with pytest.raises(CheckpointError, match=r"not those that were selected|differs from the target"):
            prove(tmp_path / "out", plan, selection)
        verification = verify(tmp_path / "out", cut(plan, selection))
        assert verification.holds
        assert join(plan, verification.transplanted) == written


def test_a_third_models_rows_are_named_from_the_first_to_the_last(llama_pair, tmp_path):
    plan = plan_of(*llama_pair, ("gate",))
    transplant(plan, (), tmp_path / "out")
    change_tensor(tmp_path / "out", GATE, lambda tensor: tensor[5:10:4].fill_(7))
    what = "is neither the target's nor the source's"
    assert verify(tmp_path / "out", plan).differences == ((f"{GATE}[5:10]", what),)
    change_tensor(tmp_path / "out", GATE, lambda tensor: tensor.fill_(7))
    assert verify(tmp_path / "out", plan).differences == ((GATE, what),)


def test_rows_that_are_alike_in_both_models_prove_nothing_and_disturb_nothing(llama_pair, tmp_path):
    source = shutil.copytree(llama_pair[1], tmp_path / "source")
    theirs = stored(llama_pair[0])[GATE]
    change_tensor(source, GATE, lambda tensor: tensor[8:16].copy_(theirs[8:16]))
    plan = plan_of(llama_pair[0], source, ("gate",))
    unit = plan.units[1]
    for number, selection in enumerate([(block(unit, 4, 20),), (block(unit, 8, 16),), (block(unit, 10, 30), unit)]):
        out = tmp_path / str(number)
        transplant(plan, selection, out, finish=lambda folder, chosen=selection: prove(folder, plan, chosen))
    verification = verify(tmp_path / "0", plan)
    assert verification.transplanted == (block(unit, 4, 8), block(unit, 16, 20))
    assert verification.holds


def test_a_bias_that_did_not_go_with_its_block_is_named(plans, tmp_path):
    plan = plans[DTYPES[0]]
    unit = next(unit for unit in plan.units if str(unit) == "1.gate")
    out = tmp_path / "out"
    transplant(plan, (block(unit, 8, 16),), out)
    bias = GATE.replace("weight", "bias")
    kept = stored(plan.target.folder)[bias]
    change_tensor(out, bias, lambda tensor: tensor.copy_(kept))
    what = "is the source's, but others of its unit are the target's"
    assert verify(out, cut(plan, (block(unit, 8, 16),))).differences == ((f"{GATE}[8:16]", what),)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage_in_the_source_matters_only_in_the_rows_that_are_taken(llama_pair, tmp_path, value):
    source = shutil.copytree(llama_pair[1], tmp_path / "source")
    change_tensor(source, GATE, lambda tensor: tensor[20, 3].fill_(value))
    plan = plan_of(llama_pair[0], source, ("gate",))
    with pytest.raises(CheckpointError, match="infinite or not a number; it is damaged"):
        transplant(plan, (block(plan.units[1], 16, 24),), tmp_path / "out")
    beside = (block(plan.units[1], 0, 20), block(plan.units[1], 21, 48))
    transplant(plan, beside, tmp_path / "out", finish=lambda folder: prove(folder, plan, beside))
    assert verify(tmp_path / "out", cut(plan, beside)).transplanted == beside


def test_a_value_that_does_not_fit_matters_only_in_the_rows_that_are_taken(tmp_path):
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=torch.float16)
    source = save_random(tmp_path / "source", tiny_llama(), seed=2)
    change_tensor(source, GATE, lambda tensor: tensor[20, 3].fill_(1e6))
    plan = plan_of(target, source, ("gate",))
    with pytest.raises(CheckpointError, match="values that F16, the target's dtype, cannot hold"):
        transplant(plan, (block(plan.units[1], 20, 21),), tmp_path / "out")
    beside = (block(plan.units[1], 21, 48),)
    transplant(plan, beside, tmp_path / "out", finish=lambda folder: prove(folder, plan, beside))
    assert verify(tmp_path / "out", cut(plan, beside)).holds


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_target_comes_back_after_ctrl_c_in_a_swap_of_blocks(lives, plans, monkeypatch, number):
    live, (unit, *_) = lives[DTYPES[1]], plans[DTYPES[1]].units
    before = bits(live.model.state_dict())
    fail_in_swap(monkeypatch, number, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), live.transplanted([block(unit, 0, 5), block(unit, 7, 48)]):
        raise AssertionError("the block was entered")
    assert same(bits(live.model.state_dict()), before)


def test_the_target_comes_back_after_an_exception_among_blocks(lives, plans):
    live, plan = lives[DTYPES[1]], plans[DTYPES[1]]
    before = bits(live.model.state_dict())
    with pytest.raises(ZeroDivisionError), live.transplanted(divide(plan, plan.units, 5).units[::2]):
        raise ZeroDivisionError
    assert same(bits(live.model.state_dict()), before)


def test_a_swap_of_blocks_allocates_no_weights(lives, plans):
    live, plan = lives[DTYPES[0]], plans[DTYPES[0]]
    owned = {parameter.data_ptr() for parameter in live.model.parameters()}
    with live.transplanted(divide(plan, plan.units, 5).units[::2]):
        assert {parameter.data_ptr() for parameter in live.model.parameters()} == owned
