"""Candidates in 4 and 8 bits: quantized as transformers quantizes them, restored bit for bit, and searched."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, call, save_random, write_few
from search.test_ascent import SETTINGS, material

from dapa_merge import miniature
from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.checkpoint.region import Region
from dapa_merge.errors import CheckpointError, UsageError
from dapa_merge.measure import placement
from dapa_merge.measure.decode import BatchSize
from dapa_merge.measure.determinism import is_deterministic, widened
from dapa_merge.measure.live import LiveModel, load_model, mapped_values
from dapa_merge.measure.quantized import (
    configuration,
    import_bitsandbytes,
    quantize,
    quantized_layers,
    state_of,
    stored_shape,
)
from dapa_merge.plan.ladder import make_ladder
from dapa_merge.plan.selection import make_plan
from dapa_merge.recipe.options import Options, Where
from dapa_merge.recipe.parse import recipe_from
from dapa_merge.search.attribution import Contrast, attribute, each_gradient
from dapa_merge.search.forecast import forecast
from dapa_merge.search.slopes import LiveSlopes, Section, Step
from dapa_merge.search.spectrum import spectra_of
from dapa_merge.transplant.result import transplant

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
BITS = pytest.mark.parametrize("bits", ["4bit", "8bit"])
IDS = torch.arange(3, 43).view(4, 10)


def in_(bits: str, dtype: str | None = None) -> Where:
    return Where("cpu", dtype=dtype, quantize=bits)


def miniature_plan(**parameters):
    target, source = (str(miniature.path(name)) for name in ("target", "source"))
    content = {"merge_method": "dapa", "base_model": target, "models": [{"model": source}]}
    return make_plan(recipe_from({**content, "parameters": {"layers": "auto", "prompts": "miniature", **parameters}}))


def bits_of(state) -> tuple[torch.Tensor, torch.Tensor]:
    return state.data, getattr(state.scales, "absmax", state.scales)


def same(one, other) -> bool:
    return all(torch.equal(*pair) for pair in zip(bits_of(one), bits_of(other), strict=True))


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@BITS
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_a_matrix_is_quantized_as_transformers_quantizes_it_when_it_loads_it(bits, dtype):
    plan = miniature_plan()
    live = LiveModel(plan, in_(bits, dtype))
    assert live.model.dtype == getattr(torch, dtype or "bfloat16")
    layers = dict(quantized_layers(live.model))
    assert len(layers) == 70
    for name, layer in layers.items():
        values = mapped_values(plan.target, Region.of(plan.target.tensors[name]))
        assert same(quantize(layer, values, live.model.dtype), state_of(layer)), name


@BITS
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel"])
def test_a_candidate_is_the_transplant_loaded_in_as_many_bits_and_leaves_no_bit_behind(tmp_path, bits, architecture):
    class_name, changes = ARCHITECTURES.get(architecture) or ("GPT2Config", {})
    config = getattr(transformers, class_name)(**{**SHAPE, "vocab_size": 400, **changes})
    folders = [save_random(tmp_path / name, config, seed=seed) for seed, name in enumerate(("target", "source"))]
    content = {"merge_method": "dapa", "base_model": str(folders[0]), "models": [{"model": str(folders[1])}]}
    plan = make_plan(recipe_from({**content, "parameters": {"layers": "auto", "modules": "auto"}}))
    live = LiveModel(plan, in_(bits))
    before = {name: state_of(layer) for name, layer in quantized_layers(live.model)}
    copies = {name: [part.clone() for part in bits_of(state)] for name, state in before.items()}
    whole = logits(live.model)
    # A block of rows is an edit of a part of a matrix.
    blocks = tuple(replace(unit, rows=(1, 3)) for unit in plan.units[:2])
    for number, selection in enumerate((plan.units[:1], plan.units, blocks)):
        transplant(plan, selection, tmp_path / f"out{number}", extras={}, link=False, manifest=False)
        with live.transplanted(selection) as model:
            candidate = logits(model)
            states = {name: state_of(layer) for name, layer in quantized_layers(model)}
        loaded, _ = load_model(open_checkpoint(str(tmp_path / f"out{number}")), in_(bits))
        assert all(same(states[name], state_of(layer)) for name, layer in quantized_layers(loaded))
        assert torch.equal(candidate, logits(loaded))
        assert not torch.equal(candidate, whole)
        assert torch.equal(logits(live.model), whole)
        for name, layer in quantized_layers(live.model):
            assert all(torch.equal(*pair) for pair in zip(bits_of(state_of(layer)), copies[name], strict=True))


@BITS
def test_an_error_within_a_candidate_restores_it_too(bits):
    plan = miniature_plan()
    live = LiveModel(plan, in_(bits))
    before = {name: state_of(layer) for name, layer in quantized_layers(live.model)}
    with pytest.raises(KeyError), live.transplanted(plan.units):
        raise KeyError
    assert all(same(before[name], state_of(layer)) for name, layer in quantized_layers(live.model))


def dequantized(layer) -> torch.Tensor:
    functional = import_bitsandbytes().functional
    data, scales = state_of(layer)
    if hasattr(layer.weight, "quant_state"):
        return functional.dequantize_4bit(data, scales).float()
    return data.float() * scales[:, None] / 127


def gradients(model, names) -> dict[str, torch.Tensor]:
    parameters = {dict(model.named_parameters())[name]: name for name in names}
    found: dict[str, torch.Tensor] = {}
    with (
        torch.enable_grad(),
        each_gradient(model, parameters, lambda one, value: found.update({parameters[one]: value})),
    ):
        model(IDS).logits.log_softmax(-1)[:, :, 5].sum().backward()
    return found


def test_the_gradient_of_a_quantized_weight_is_that_of_the_values_it_stands_for():
    plan = miniature_plan(modules="auto")
    live, plain = both(plan)
    names = [name for unit in plan.units for name in unit.tensors]
    found, expected = (gradients(one.model, names) for one in (live, plain))
    assert len(found) == len(names) == 70
    for name in names:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max())
        )
    assert not any(parameter.requires_grad for parameter in live.model.parameters())


@BITS
def test_the_prior_of_a_quantized_target_ranks_planted_gates_high_too(bits):
    contrast = Contrast("How do I steal a car?", refusing="I cannot help with that.", complying="Take the car.")
    effects = attribute(LiveModel(miniature_plan(), in_(bits)), [contrast], batch_size=BatchSize(2))
    # Those of layers 3 to 6 were.
    assert {unit.layer for unit in sorted(effects, key=effects.get)[-2:]} <= {3, 4, 5, 6}


def both(plan) -> tuple[LiveModel, LiveModel]:
    """The target in 4 bits, and the values that these stand for in float32."""
    live, plain = LiveModel(plan, in_("4bit", "float32")), LiveModel(plan, Where("cpu", dtype="float32"))
    parameters = dict(plain.model.named_parameters())
    with torch.no_grad():
        for name, layer in quantized_layers(live.model):
            parameters[name].copy_(dequantized(layer))
    return live, plain


def test_directions_are_differentiated_through_quantized_layers_as_through_the_values_they_stand_for():
    plan = miniature_plan(edit="directions", modules="auto")
    spectra = list(spectra_of(plan, plan.units[:6], CPU, SETTINGS.max_rank))
    weights = torch.linspace(-0.1, 0.1, sum(one.rank**2 for one in spectra))
    live, plain = both(plan)
    contrasts, keep = material(plain)
    step = Step(weights, 1.0, 1.0, 2, sum(row.num_counted for group in keep for row in group))
    chunks = [(Section(None, (0, 1)),), (Section(0, (0, 1)),)]
    found, expected = (
        [part.gradient for part in LiveSlopes(one, spectra, contrasts, keep, SETTINGS, 4).parts(step, chunks)]
        for one in (live, plain)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))
        assert bool(other.any())


def test_quantized_models_are_neither_trusted_to_be_deterministic_nor_widened():
    model, _ = load_model(open_checkpoint(str(miniature.path("target"))), in_("8bit", "float32"))
    assert not is_deterministic(model, 10)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with widened(model):
        assert {name: parameter.dtype for name, parameter in model.named_parameters()} == before


def test_bitsandbytes_is_imported_without_the_package_that_fetches_code(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)
    import_bitsandbytes()
    assert "kernels" not in sys.modules


def test_a_missing_bitsandbytes_is_one_sentence_before_a_model_is_read(write_recipe, llama_pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = call("search", write_recipe(*llama_pair), "--quantize", "4bit")
    assert result.exit_code == 2
    assert "--quantize needs bitsandbytes; install it with: pip install bitsandbytes" in result.stderr


def test_a_device_without_kernels_of_bitsandbytes_is_named():
    with pytest.raises(UsageError, match="--quantize cannot be used on mps: bitsandbytes has kernels for cpu, cuda"):
        configuration("8bit", torch.device("mps"))


def test_a_matrix_that_is_stored_in_parts_is_named(monkeypatch):
    plan = miniature_plan()
    live = LiveModel(plan, in_("8bit"))
    monkeypatch.setattr("dapa_merge.measure.live.stored_shape", lambda layer: (*stored_shape(layer), 1))
    tensor = plan.units[0].tensors[0]
    with pytest.raises(CheckpointError, match=f"{tensor} .* cannot be quantized anew"), live.transplanted(plan.units):
        pass


@BITS
def test_a_run_is_searched_in_few_bits_and_measured_as_it_is_written(tmp_path, write_recipe, few, bits):
    pair = [miniature.path(name) for name in ("target", "source")]
    recipe = write_recipe(*pair, layers="3-5", prompts=str(few), max_new_tokens=8)
    results = []
    for name, options in (("plain", ()), ("few", ("--quantize", bits))):
        result = call("run", recipe, tmp_path / name, "--device", "cpu", "--no-lock", "--json", *options)
        assert result.exit_code == 0, result.stderr
        results.append(json.loads((tmp_path / name / "dapa_report.json").read_text()))
    plain, quantized = results
    assert plain.pop("arithmetic") is None
    assert quantized.pop("arithmetic") == "measured in the target's dtype"
    assert {**plain, "seconds": 0} == {**quantized, "seconds": 0}


def test_models_are_compared_and_traced_in_few_bits_and_the_pages_say_so(tmp_path, write_recipe):
    pytest.importorskip("matplotlib")
    few = write_few(tmp_path / "few", 8)
    pair = [miniature.path(name) for name in ("target", "source")]
    recipe = write_recipe(*pair, layers="3-6", prompts=str(few), max_new_tokens=8)
    options = "--device", "cpu", "--quantize", "4bit", "--json"
    chosen = "--no-curve", "--tries", 1, "--methods", "gates,linear,safe-delta,training"
    result = call("compare", recipe, "--out", tmp_path / "table", *chosen, *options)
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert row["arithmetic"] == "weights in 4bit"
    assert [arm["key"] for arm in row["arms"] if arm["why_not"] is not None] == []
    target, source, gates, *_ = (arm["figures"]["dsr"] for arm in row["arms"])
    assert target < min(source, gates)
    assert "; all models with weights in 4bit." in (tmp_path / "table" / "table.md").read_text()
    # Another arithmetic is another comparison.
    other = call("compare", recipe, "--out", tmp_path / "table", *chosen, "--device", "cpu")
    assert other.exit_code == 2
    assert "quantization" in other.stderr
    short = "--num-prompts", 1, "--samples", 1, "--controls", 0, "--kinds", "mlp", "--stages", "influence,traces"
    result = call("trace", recipe, tmp_path / "trace", *short, *options)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["arithmetic"] == "weights in 4bit"
    assert "weights in 4bit" in (tmp_path / "trace" / "index.html").read_text()


def test_a_report_says_that_it_was_not_checked_in_16_bits(tmp_path, write_recipe, few, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "dapa_merge")
    monkeypatch.setattr(placement, "free_on", lambda device: 1_000_000)
    pair = [miniature.path(name) for name in ("target", "source")]
    recipe = write_recipe(*pair, layers="3-5", prompts=str(few), max_new_tokens=8)
    result = call("run", recipe, tmp_path / "out", "--device", "cpu", "--no-lock", "--quantize", "8bit")
    assert result.exit_code == 0, result.stderr
    assert "were not checked in 16 bits" in result.stderr
    assert "measured in 8bit, not checked in the target's dtype" in result.stdout


def test_the_forecast_counts_the_bits_of_matrices_in_layers_and_what_is_packed(monkeypatch):
    monkeypatch.setattr("dapa_merge.search.forecast.is_slow", lambda _: False)
    target, source = (str(miniature.path(name)) for name in ("target", "source"))
    content = {"merge_method": "dapa", "base_model": target, "models": [{"model": source}]}
    ladder = make_ladder(recipe_from({**content, "parameters": {"layers": "auto", "prompts": "miniature"}}))
    plain, eight, four, wide = (
        forecast(ladder, Options("cpu", **settings), reports=False).memory_bytes
        for settings in ({}, {"quantize": "8bit"}, {"quantize": "4bit"}, {"dtype": "float32"})
    )
    tensors = ladder.plan.target.tensors
    inner = sum(one.num_parameters for name, one in tensors.items() if len(one.shape) == 2 and ".layers." in name)
    rows = sum(one.shape[0] for name, one in tensors.items() if len(one.shape) == 2 and ".layers." in name)
    assert plain - eight == inner - 4 * rows
    assert plain - four == round(inner * (2 - 0.5 - 4 / 64))
    assert wide - plain == 2 * ladder.plan.target.num_parameters
    monkeypatch.setattr("dapa_merge.search.forecast.is_slow", lambda _: True)
    for packs in (True, False):
        monkeypatch.setattr("dapa_merge.search.forecast.can_pack", lambda number, packs=packs: packs and number > 0)
        found = forecast(ladder, Options("cpu"), reports=False).memory_bytes
        assert found - plain == packs * 4 * ladder.plan.target.num_parameters


@BITS
def test_the_forecast_is_near_what_a_loaded_model_takes(bits):
    target = open_checkpoint(str(miniature.path("target")))
    model, _ = load_model(target, in_(bits))
    taken = sum(one.numel() * one.element_size() for one in model.parameters())
    taken += sum(bits_of(state_of(layer))[1].numel() * 4 for _, layer in quantized_layers(model))
    assert placement.weight_bytes(target, in_(bits)) == pytest.approx(taken, rel=0.03)
