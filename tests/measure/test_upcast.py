"""16-bit layers on a processor without 16-bit arithmetic, against the same layers in float32."""

from __future__ import annotations

import pytest
import torch
from conftest import save_random, tiny_llama

from dapa_merge.checkpoint.open import open_checkpoint
from dapa_merge.measure import determinism
from dapa_merge.measure.determinism import batch_invariant
from dapa_merge.measure.live import load_model
from dapa_merge.measure.perplexity import ScoredText, losses

TEXTS = [ScoredText([3, 4, 5, 6, 7, 8], 2), ScoredText([9, 3, 5], 1)]


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(determinism, "is_slow", lambda _: True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 24), (24,)])
@pytest.mark.parametrize("piece", [1 << 24, 48])
def test_a_layer_and_its_gradients_are_those_of_float32_rounded_once(slow, monkeypatch, dtype, shape, piece):
    monkeypatch.setattr(determinism, "PIECE", piece)
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 10).to(dtype)
    exact = torch.nn.Linear(24, 10)
    exact.load_state_dict(layer.state_dict())
    states = torch.randn(shape).to(dtype).requires_grad_()
    wide = states.detach().float().requires_grad_()
    with batch_invariant(layer):
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
