"""16-bit layers on a processor without 16-bit arithmetic, against the same layers in float32."""

from __future__ import annotations

import copy

import psutil
import pytest
import torch
from conftest import save_random, tiny_llama

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure import determinism
from dapa_merge.measure.determinism import batch_invariant, can_pack, widened
from dapa_merge.measure.live import free, load_model
from dapa_merge.measure.perplexity import ScoredText, losses

TEXTS = [ScoredText([3, 4, 5, 6, 7, 8], 2), ScoredText([9, 3, 5], 1)]


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(determinism, "is_slow", lambda _: True)
    monkeypatch.setattr(determinism, "MIN_PACKED", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 24), (24,)])
@pytest.mark.parametrize("piece", [1 << 24, 48])
@pytest.mark.parametrize("packs", [True, False])
def test_a_layer_and_its_gradients_are_those_of_float32_rounded_once(slow, monkeypatch, dtype, shape, piece, packs):
    monkeypatch.setattr(determinism, "PIECE", piece)
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 10).to(dtype)
    exact = torch.nn.Linear(24, 10)
    exact.load_state_dict(layer.state_dict())
    states = torch.randn(shape).to(dtype).requires_grad_()
    wide = states.detach().float().requires_grad_()
    with batch_invariant(layer, packs=packs):
        found = layer(states)
    expected = exact(wide)
    weights = torch.randn(expected.shape).to(dtype)
    # After the block, as where a loss is differentiated.
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    of_layer = [found, states.grad, layer.weight.grad, layer.bias.grad]
    of_exact = [expected, wide.grad, exact.weight.grad, exact.bias.grad]
    for one, other in zip(of_layer, of_exact, strict=True):
        assert one.dtype == dtype
        # A sum may be rounded otherwise where its order is another one.
        torch.testing.assert_close(one, other.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_no_wide_copy_of_a_weight_is_kept_for_the_backward_pass(slow):
    layer = torch.nn.Linear(64, 32, bias=False).to(torch.bfloat16).requires_grad_(False)
    states = torch.randn(4, 64).to(torch.bfloat16).requires_grad_()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one)
    with hooks, batch_invariant(layer):
        layer(states).sum()
    assert [one.data_ptr() for one in kept] == [layer.weight.data_ptr()]


def test_likelihoods_can_be_differentiated_by_what_is_trained(slow, tmp_path):
    folder = save_random(tmp_path / "model", tiny_llama(vocab_size=300), seed=3, dtype=torch.bfloat16)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        model, _ = load_model(open_checkpoint(str(folder)), torch.device("cpu"))
        model.to(dtype)
        weight = model.model.layers[0].mlp.gate_proj.weight.requires_grad_()
        losses(model, 0, TEXTS).sum().backward()
        gradients.append(weight.grad.float().flatten())
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def packed(layer: torch.nn.Linear) -> torch.Tensor:
    return layer.__dict__[determinism.PACKED].weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("least", [0, 1 << 20])
def test_a_packed_or_small_layer_computes_each_token_alike_in_any_number_and_piece(slow, monkeypatch, bias, least):
    monkeypatch.setattr(determinism, "MIN_PACKED", least)
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(224, 608, bias=bias).to(torch.bfloat16)
    states = torch.randn(300, 224, generator=generator).to(torch.bfloat16)
    with torch.inference_mode(), batch_invariant(layer, packs=True):
        expected = layer(states)
        for number in (1, 2, 3, 5, 16, 33, 100):
            assert torch.equal(torch.cat([layer(part) for part in states.split(number)]), expected)
        monkeypatch.setattr(determinism, "PIECE", 7 * 608)
        assert torch.equal(layer(states), expected)
    # What is too small to be packed has no copy.
    assert (determinism.PACKED in layer.__dict__) == (least == 0)


def test_a_packed_weight_is_kept_until_it_changes_in_place_and_freed_with_the_model(slow):
    layer = torch.nn.Linear(24, 10).to(torch.bfloat16)
    states = torch.randn(5, 24).to(torch.bfloat16)
    with torch.inference_mode(), batch_invariant(layer, packs=True):
        layer(states)
        first = packed(layer)
        layer(states)
        assert packed(layer) is first
    with batch_invariant(layer, packs=True):
        for change in (
            # As edits, and as `widened` does.
            lambda: layer.weight[2:4].copy_(torch.ones(2, 24)),
            lambda: setattr(layer.weight, "data", layer.weight.data * 2),
        ):
            with torch.no_grad():
                change()
            with torch.inference_mode():
                found = layer(states)
            assert packed(layer) is not first
            first = packed(layer)
            expected = torch.nn.functional.linear(states.float(), layer.weight.float(), layer.bias.float())
            torch.testing.assert_close(found, expected.bfloat16(), rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-6)
        with torch.inference_mode():
            layer.weight[0] = 3.0
            layer(states)
        assert packed(layer) is not first
    assert copy.deepcopy(layer).__dict__[determinism.PACKED] is None
    free(layer)
    assert determinism.PACKED not in layer.__dict__


def test_weights_are_packed_where_they_take_a_small_part_of_the_memory(slow, monkeypatch):
    total = psutil.virtual_memory().total
    assert can_pack(total // 16)
    assert not can_pack(total // 16 + 1)
    layer = torch.nn.Linear(24, 10).to(torch.bfloat16)
    monkeypatch.setattr(determinism, "SHARE", 0.0)
    with batch_invariant(layer):
        layer(torch.randn(5, 24).to(torch.bfloat16))
    assert determinism.PACKED not in layer.__dict__


def test_gradients_are_computed_in_float32_where_a_second_copy_of_the_model_fits(slow, tmp_path, monkeypatch):
    folder = save_random(tmp_path / "model", tiny_llama(vocab_size=300), seed=3, dtype=torch.bfloat16)
    model, _ = load_model(open_checkpoint(str(folder)), torch.device("cpu"))
    number = sum(parameter.numel() for parameter in model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses(model, 0, TEXTS)
    assert any(determinism.PACKED in module.__dict__ for module in model.modules())
    monkeypatch.setattr(determinism, "MAX_WIDENED", 0)
    monkeypatch.setattr(determinism, "SHARE", 4 * number / psutil.virtual_memory().total)
    with widened(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not any(determinism.PACKED in module.__dict__ for module in model.modules())
        wide = losses(model, 0, TEXTS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(losses(model, 0, TEXTS), wide, rtol=0.05, atol=0)
    monkeypatch.setattr(determinism, "SHARE", 3 * number / psutil.virtual_memory().total)
    with widened(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    monkeypatch.setattr(determinism, "SHARE", 1.0)
    monkeypatch.setattr(determinism, "is_slow", lambda _: False)
    with widened(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_torch_without_that_kernel_does_without(monkeypatch):
    def fail(_weight):
        raise NotImplementedError("there is no such operator")

    monkeypatch.setattr(determinism, "_pack", fail)
    determinism._has_packed_kernel.cache_clear()
    assert not can_pack(1)
    determinism._has_packed_kernel.cache_clear()


def test_whether_there_is_that_kernel_does_not_depend_on_what_torch_uses_by_default():
    has_kernel = can_pack(1)
    determinism._has_packed_kernel.cache_clear()
    with torch.device("meta"):
        assert can_pack(1) == has_kernel
    determinism._has_packed_kernel.cache_clear()


def test_a_packed_model_answers_with_its_edits(slow, tmp_path):
    folder = save_random(tmp_path / "model", tiny_llama(vocab_size=300), seed=3, dtype=torch.bfloat16)
    found = {}
    for packs in (True, False):
        model, _ = load_model(open_checkpoint(str(folder)), torch.device("cpu"))
        logits = []
        with torch.inference_mode(), batch_invariant(model, packs=packs):
            for scale in (1, 2):
                model.model.layers[0].mlp.gate_proj.weight.mul_(scale)
                logits.append(model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits)
        assert not torch.equal(*logits)
        found[packs] = torch.stack(logits)
    torch.testing.assert_close(found[True], found[False], rtol=0.05, atol=0.02)
