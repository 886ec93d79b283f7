"""The values that are written, against a float32 computation of numpy's, and what is lost by rounding."""

from __future__ import annotations

import re
import shutil

import numpy
import pytest
import torch
from conftest import call, change_tensor, prove, save_random, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.errors import CheckpointError
from dapa_merge.plan.edit import Copy, make_edit
from dapa_merge.plan.plan import plan_transplant
from dapa_merge.plan.values import Rounding
from dapa_merge.transplant.result import transplant
from dapa_merge.verify.tensors import verify

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
PAIRS = [("bfloat16", "bfloat16"), ("float16", "float32"), ("bfloat16", "float16")]
GATE = "model.layers.2.mlp.gate_proj.weight"
VALUES = st.floats(-3e4, 3e4, width=32)


def nearest_bfloat16(values: numpy.ndarray) -> numpy.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as bits."""
    bits = values.astype("<f4").view("<u4").astype("<u8")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def bits_of(values: torch.Tensor) -> numpy.ndarray:
    return values.contiguous().view(torch.uint8).numpy().view(f"<u{values.element_size()}")


def rounded(exact: numpy.ndarray, name: str) -> numpy.ndarray:
    if name == "bfloat16":
        return nearest_bfloat16(exact)
    kind = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}[name]
    return exact.astype(kind).view(kind.replace("f", "u"))


@given(
    st.data(),
    st.lists(VALUES, min_size=1, max_size=9),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(sorted(DTYPES)),
    st.floats(0.125, 2, width=32),
)
def test_a_mix_is_computed_in_float32_and_rounded_once(data, values, ours, theirs, strength):
    others = data.draw(st.lists(VALUES, min_size=len(values), max_size=len(values)))
    own, source = torch.tensor(values).to(DTYPES[ours]), torch.tensor(others).to(DTYPES[theirs])
    kind = "f8" if "float64" in (ours, theirs) else "f4"
    a, b = own.to(torch.float64).numpy().astype(kind), source.to(torch.float64).numpy().astype(kind)
    with numpy.errstate(all="ignore"):
        exact = a + (b - a) * numpy.dtype(kind).type(strength) if strength != 1 else b
        expected = rounded(exact, ours)
    edit = make_edit("copy", strength)
    values = {"target": own, "source": source}
    found = edit.new_values({name: values[name] for name in edit.inputs}, DTYPES[ours])
    if not bool(torch.isfinite(torch.from_numpy(exact.astype("f8")).to(DTYPES[ours])).all()):
        return
    assert bits_of(found).tolist() == expected.tolist()


def test_what_overflows_becomes_the_largest_value_and_is_counted():
    rounding = Rounding()
    found = Copy().new_values({"source": torch.tensor([1e6, -7e4, 65519.0, 1.0])}, torch.float16, rounding)
    assert found.tolist() == [65504.0, -65504.0, 65504.0, 1.0]
    assert (rounding.overflowed, rounding.subnormal) == (2, 0)


def test_what_becomes_subnormal_or_zero_is_counted():
    rounding = Rounding()
    values = torch.tensor([1e-5, 6e-5, 6.2e-5, 1e-9, 0.0], dtype=torch.bfloat16)
    found = Copy().new_values({"source": values}, torch.float16, rounding)
    assert found[3] == 0
    assert (rounding.overflowed, rounding.subnormal) == (0, 3)


def test_an_overflow_of_the_sum_itself_is_noticed():
    rounding = Rounding()
    largest = torch.tensor([3e38])
    found = make_edit("blend", 2.0).new_values({"target": -largest, "source": largest}, torch.float32, rounding)
    assert rounding.overflowed == 1
    assert found.isfinite().all()


@pytest.mark.parametrize("strength", [1.0, 0.3, 1.75])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_is_on_disk_is_the_float32_reference(tmp_path, ours, theirs, strength):
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=DTYPES[ours])
    source = save_random(tmp_path / "source", tiny_llama(), seed=2, dtype=DTYPES[theirs])
    plan = plan_transplant(
        *map(open_checkpoint, (str(target), str(source))), ("gate",), edit=make_edit("copy", strength)
    )
    selection = plan.units[1:3]
    transplant(plan, selection, tmp_path / "out", finish=lambda folder: prove(folder, plan, selection))
    a, b, out = (tensors(folder)[GATE] for folder in (target, source, tmp_path / "out"))
    a, b = a.float().numpy(), b.float().numpy()
    exact = b if strength == 1 else a + (b - a) * numpy.float32(strength)
    assert bits_of(out).tolist() == rounded(exact, ours).tolist()
    verification = verify(tmp_path / "out", plan)
    assert verification.transplanted == selection
    assert verification.origins[GATE] == ("source" if strength == 1 else "blend")


def test_a_blend_of_another_strength_is_unexplained(tmp_path, llama_pair):
    first, second = (
        plan_transplant(*map(open_checkpoint, map(str, llama_pair)), ("gate",), edit=make_edit("copy", strength))
        for strength in (0.5, 0.6)
    )
    transplant(first, first.units[2:3], tmp_path / "out")
    verification = verify(tmp_path / "out", second)
    assert not verification.holds
    assert {"unexplained"} == set(verification.origins.values())
    assert all(name.startswith(GATE) for name in verification.origins)


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.fixture
def overflowing(tmp_path):
    target = save_random(tmp_path / "target", tiny_llama(), seed=1, dtype=torch.float16)
    source = save_random(tmp_path / "source", tiny_llama(), seed=2)
    change_tensor(source, GATE, lambda tensor: tensor[:2, 0].fill_(1e6))
    return target, source


def test_so_many_values_may_overflow_as_the_recipe_says(overflowing, write_recipe, tmp_path):
    refused = call("run", write_recipe(*overflowing, layers=2, max_overflow=1), tmp_path / "out", "--no-evaluate")
    assert refused.exit_code == 4
    assert re.search(r"at least 2 overflow, .* 1 .*`max_overflow`", refused.stderr)
    assert not (tmp_path / "out").exists()
    done = call("run", write_recipe(*overflowing, layers=2, max_overflow=2), tmp_path / "out", "--no-evaluate")
    assert done.exit_code == 0, done.stderr
    assert tensors(tmp_path / "out")[GATE][:2, 0].tolist() == [65504.0, 65504.0]
    assert call("verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("strength", [0, -1, 2.5, "half", "true"])
def test_a_strength_that_makes_no_sense_is_refused(llama_pair, write_recipe, strength):
    result = call("plan", write_recipe(*llama_pair, strength=strength, layers=1))
    assert result.exit_code == 2
    assert "write a number above 0 and up to 2" in result.stderr


def test_a_target_that_is_not_finite_cannot_be_mixed_but_replaced(llama_pair, tmp_path, write_recipe):
    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    change_tensor(target, GATE, lambda tensor: tensor[0, 0].fill_(float("inf")))
    refused = call(
        "run", write_recipe(target, llama_pair[1], layers=2, strength=0.5), tmp_path / "out", "--no-evaluate"
    )
    assert refused.exit_code == 4
    assert f"{GATE} of the target" in refused.stderr
    assert "`edit: copy` with `strength: 1`" in refused.stderr
    recipe = write_recipe(target, llama_pair[1], layers=2)
    assert call("run", recipe, tmp_path / "out", "--no-evaluate").exit_code == 0


SIGNS = {
    "model.layers.0.mlp.gate_proj.qweight": "AWQ or GPTQ",
    "model.layers.0.mlp.gate_proj.g_idx": "GPTQ",
    "model.layers.0.mlp.gate_proj.weight.absmax": "bitsandbytes",
    "model.layers.0.mlp.gate_proj.SCB": "bitsandbytes",
    "model.layers.0.mlp.gate_proj.weight_scale_inv": "FP8 with scales",
    "model.layers.0.mlp.experts.gate_up_proj_blocks": "MXFP4",
}


@pytest.mark.parametrize("name", SIGNS)
def test_a_quantized_checkpoint_is_known_by_its_tensors(llama_pair, tmp_path, name):
    from safetensors.torch import save_file

    target = shutil.copytree(llama_pair[0], tmp_path / "target")
    content = tensors(target)
    for path in target.glob("*.safetensors*"):
        path.unlink()
    save_file({**content, name: torch.zeros(4, dtype=torch.uint8)}, target / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        plan_transplant(open_checkpoint(str(target)), open_checkpoint(str(llama_pair[1])), ("gate",))
    assert f"is quantized ({SIGNS[name]}, by its tensor {name})" in str(caught.value)
    assert "repair the unquantized model" in str(caught.value)


@pytest.mark.parametrize("theirs", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strength", [1, 0.5])
def test_an_edit_differs_where_a_value_would_change(theirs, strength, tmp_path):
    target = save_random(tmp_path / "target", tiny_llama(), seed=1)
    source = save_random(tmp_path / "source", tiny_llama(), seed=1, dtype=theirs)
    # Values that the target can hold, but for one, and a zero of another sign that only a copy would write.
    own = load_file(target / open_checkpoint(str(target)).tensors[GATE].file)[GATE]
    for folder, zero in ((target, -0.0), (source, 0.0)):
        for layer in range(4):
            change_tensor(folder, GATE.replace("2", str(layer)), lambda tensor: tensor.copy_(own))
        change_tensor(folder, GATE.replace("2", "1"), lambda tensor, zero=zero: tensor[5, 5].fill_(zero))
    change_tensor(source, GATE, lambda tensor: tensor[47, 31].add_(1))
    pair = [open_checkpoint(str(folder)) for folder in (target, source)]
    plan = plan_transplant(*pair, ("gate",), edit=make_edit("copy", strength))
    differing = [
        unit.layer for unit in plan.units if any(plan.edit.differs(plan.models, r) for r in plan.regions((unit,)))
    ]
    assert differing == ([1, 2] if strength == 1 else [2])
